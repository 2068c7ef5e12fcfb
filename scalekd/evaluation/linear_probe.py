"""Linear classification on a student's frozen features, by scikit-learn.

The protocol: pooled features of one view of each image, standardised by the mean and deviation of
the training split; multinomial logistic regression with an L2 penalty (`LogisticRegression`,
L-BFGS). Its inverse strength ``C`` is chosen on a fifth of each class of the training split, and
the classifier is then fitted on all of it. A seed decides that fifth. All features of both splits
stay in memory.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from scalekd.distributed import Coordinator
from scalekd.errors import UsageError
from scalekd.evaluation.neighbours import pooled_features
from scalekd.evaluation.views import EvaluationConfig, EvaluationViews

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C: features are standardised, so that the best lies within them for 10 to 100,000
images of 64 to 2,048 features; the smallest, which penalises most, wins among equals."""

_HELD_OUT = 0.2
_MAX_ITERATIONS = 1000

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class LinearProbeResult:
    """Accuracy of a linear classifier on frozen features.

    Attributes:
        linear_top1: Percent of images whose class has the highest score, mean over the seeds.
        linear_top5: Percent of images whose class is among the five highest scores.
        linear_top1_of_seeds: Top-1 of each seed.
        linear_strengths: C that each seed chose.
        linear_num_images: Number of images that the classifier was fitted on.
    """

    linear_top1: float
    linear_top5: float
    linear_top1_of_seeds: tuple[float, ...]
    linear_strengths: tuple[float, ...]
    linear_num_images: int


def evaluate_linear_probe(
    model: nn.Module,
    queries: EvaluationViews,
    training: EvaluationViews,
    config: EvaluationConfig,
    *,
    seeds: Sequence[int] = (0,),
    class_map: Sequence[int] | None = None,
) -> LinearProbeResult:
    """Fit a classifier on one split's features and score it on another; collective.

    Args:
        model: A bare timm model, in eval mode, on the device.
        queries: Views of the split that is scored.
        training: Views of the split that the classifier is fitted on.
        config: Size and preprocessing of the model's input.
        seeds: Seed of each repetition.
        class_map: Class in ``training`` of each label of ``queries``, if they are numbered
            differently.

    Raises:
        UsageError: The training split has one class, or no class of two images.
        DataError: An image is corrupt.
    """
    labels = training.images.labels.astype(np.int64)
    divisions = [_held_out(labels, seed, training.images.location) for seed in seeds]
    coordinator = Coordinator(queries.accelerator.num_processes)
    features = pooled_features(model, training, config, coordinator).numpy()
    query_features = pooled_features(model, queries, config, coordinator).numpy()
    truth = queries.images.labels.astype(np.int64)
    if class_map is not None:
        truth = np.asarray(class_map)[truth]

    def results() -> list[tuple[float, float, float]] | None:
        if not queries.accelerator.is_main_process:
            return None
        return [_probe(features, labels, held, query_features, truth) for held in divisions]

    shares = coordinator.collect(coordinator.together(results))
    scores = next(share for share in shares if share is not None)
    first, fifth, strengths = (tuple(column) for column in zip(*scores, strict=True))
    return LinearProbeResult(
        float(np.mean(first)), float(np.mean(fifth)), first, strengths, len(labels)
    )


def _held_out(labels: Array, seed: int, location: str) -> Array:
    """Mark a fifth of each class, at least one image and never all of it."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    classes = np.unique(labels)
    if len(classes) < 2:
        raise UsageError(f"--linear-probe: {location} has one class, and a classifier needs two")
    for number in classes:
        members = random.permutation(np.flatnonzero(labels == number))
        count = min(len(members) - 1, max(1, round(_HELD_OUT * len(members))))
        held[members[:count]] = True
    if not held.any():
        raise UsageError(
            f"--linear-probe: no class of {location} has two images, one of which could choose the"
            " strength of the penalty"
        )
    return held


def _probe(
    features: Array, labels: Array, held: Array, query_features: Array, truth: Array
) -> tuple[float, float, float]:
    """Return top-1 and top-5 on the queries, and the chosen C."""
    scores = {}
    classifier = _classifier()
    for strength in STRENGTHS:  # from strong to weak penalty, each starting from the last
        _fit(classifier, features[~held], labels[~held], strength)
        scores[strength] = _accuracy(classifier, features[held], labels[held])[0]
    best = max(STRENGTHS, key=lambda strength: scores[strength])
    classifier = _classifier()
    _fit(classifier, features, labels, best)
    return *_accuracy(classifier, query_features, truth), best


def _classifier() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    return make_pipeline(StandardScaler(), regression)


def _fit(classifier: Any, features: Array, labels: Array, strength: float) -> None:
    from sklearn.exceptions import ConvergenceWarning

    classifier.set_params(logisticregression__C=strength)
    with warnings.catch_warnings():  # after 1,000 steps the accuracy no longer changes
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, labels)


def _accuracy(classifier: Any, features: Array, labels: Array) -> tuple[float, float]:
    scores = classifier.decision_function(features)
    if scores.ndim == 1:  # two classes
        scores = np.stack([-scores, scores], axis=1)
    ranked = classifier.classes_[np.argsort(-scores, axis=1, kind="stable")[:, :5]]
    hits = ranked == labels[:, None]
    return 100 * float(hits[:, 0].mean()), 100 * float(hits.any(axis=1).mean())
