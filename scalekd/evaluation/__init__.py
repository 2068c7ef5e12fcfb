"""Evaluation of models: accuracy, neighbours, linear probes, agreement with a teacher."""

from scalekd.evaluation.evaluator import EvaluationResult, Evaluator
from scalekd.evaluation.label_free import FeatureLossEvaluator, NeighbourEvaluator, halves
from scalekd.evaluation.linear_probe import LinearProbeResult, evaluate_linear_probe
from scalekd.evaluation.neighbours import NeighbourResult, evaluate_neighbours
from scalekd.evaluation.teacher import Answers, cached_answers, live_answers
from scalekd.evaluation.views import EvaluationConfig, EvaluationViews

__all__ = [
    "Answers",
    "EvaluationConfig",
    "EvaluationResult",
    "EvaluationViews",
    "Evaluator",
    "FeatureLossEvaluator",
    "LinearProbeResult",
    "NeighbourEvaluator",
    "NeighbourResult",
    "cached_answers",
    "evaluate_linear_probe",
    "evaluate_neighbours",
    "halves",
    "live_answers",
]
