"""Evaluation: top-1, top-5, nearest neighbours, agreement with a teacher, subsets of classes."""

from scalekd.evaluation.classes import (
    class_map_by_name,
    imagenet_class_names,
    read_class_map,
)
from scalekd.evaluation.evaluator import EvaluationResult, Evaluator
from scalekd.evaluation.neighbours import NeighbourResult, evaluate_neighbours
from scalekd.evaluation.teacher import Answers, cached_answers, live_answers
from scalekd.evaluation.views import EvaluationConfig, EvaluationViews

__all__ = [
    "Answers",
    "EvaluationConfig",
    "EvaluationResult",
    "EvaluationViews",
    "Evaluator",
    "NeighbourResult",
    "cached_answers",
    "class_map_by_name",
    "evaluate_neighbours",
    "imagenet_class_names",
    "live_answers",
    "read_class_map",
]
