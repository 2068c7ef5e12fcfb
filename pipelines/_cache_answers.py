"""The teacher's answers in a cache: their confidence, and how often they equal the label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scalekd.cache import CacheReader, read_logits
from scalekd.errors import DataError, UsageError
from scalekd.models.classes import ClassMatch, classes_of_data, imagenet_names
from scalekd.pipelines._progress import ProgressReport
from scalekd.teachers import TeacherSpec, match_teacher

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ClassAnswers:
    """Answers about the views of one class.

    Attributes:
        label: Number of the class in the data set.
        num_views: Number of views of the class that were read.
        num_right: Number of these views whose likeliest class is the label.
        mistaken_for: Label of the most frequent wrong answer; -1 if no answer is wrong.
    """

    label: int
    num_views: int
    num_right: int
    mistaken_for: int

    @property
    def accuracy(self) -> float:
        """Fraction of the views that are right."""
        return self.num_right / self.num_views


@dataclass(frozen=True)
class Answers:
    """Answers of the teacher about views of one pass.

    Attributes:
        num_views: Number of views that were read.
        confidence: Probability of the likeliest class of each view.
        classes: Answers by class, the least accurate first; empty if labels are not compared.
        match: The teacher's class of each label; ``None`` if labels are not compared.
        why_not: Why labels are not compared with answers; empty if they are.
    """

    num_views: int
    confidence: Rows
    classes: tuple[ClassAnswers, ...]
    match: ClassMatch | None
    why_not: str = ""

    def class_of(self, label: int) -> int | None:
        """Return the teacher's class of a label; ``None`` if it is not known."""
        if self.match is None or label < 0:
            return None
        return label if self.match.indices is None else self.match.indices[label]

    @property
    def accuracy(self) -> float | None:
        """Fraction of all labelled views that are right; ``None`` without a comparison."""
        total = sum(each.num_views for each in self.classes)
        return sum(each.num_right for each in self.classes) / total if total else None


def read_answers(
    reader: CacheReader, spec: TeacherSpec, pass_index: int, num_views: int
) -> Answers | None:
    """Read the logits of blocks spread evenly over a pass; ``None`` if the cache has no logits.

    Args:
        reader: The cache.
        spec: The teacher of the cache.
        pass_index: Number of the pass.
        num_views: Number of views to read, rounded up to whole blocks; all if 0.
    """
    if reader.codecs.logits is None or not reader.part.has_target("logits"):
        return None
    match, why_not = _match(reader, spec)
    blocks = _spread(reader.blocks(), num_views)
    confidence, given, labels = [], [], []
    with ProgressReport("reading logits", sum(count for _, count in blocks)) as progress:
        for first, count in blocks:
            logits = read_logits(reader, pass_index=pass_index, first=first, count=count)
            confidence.append(_softmax(logits).max(axis=1))
            if match is not None:
                chosen = logits if match.indices is None else logits[:, list(match.indices)]
                given.append(chosen.argmax(axis=1))
                labels.append(reader.samples.labels[first : first + count])
            progress.advance(count)
    classes = _by_class(np.concatenate(given), np.concatenate(labels)) if given else ()
    return Answers(sum(map(len, confidence)), np.concatenate(confidence), classes, match, why_not)


def teacher_class_names(spec: TeacherSpec) -> Sequence[str]:
    """Return a name for each of the teacher's classes: its number if it has no name."""
    names = spec.class_names
    if names is None and spec.num_classes and spec.weights_source == "pretrained":
        names = imagenet_names(spec.num_classes)
    return names or [f"class {number}" for number in range(spec.num_classes or 0)]


def likeliest(logits: Rows, count: int) -> list[tuple[int, float]]:
    """Return number and probability of the likeliest classes, likeliest first."""
    probabilities = _softmax(logits[None])[0]
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(int(number), float(probabilities[number])) for number in order]


def _match(reader: CacheReader, spec: TeacherSpec) -> tuple[ClassMatch | None, str]:
    """Match the classes of the data with the teacher's, or say why they are not compared."""
    labels, data = reader.samples.labels, reader.identity.data
    if (labels < 0).all():
        return None, "no sample has a label"
    try:
        classes = classes_of_data(str(reader.location), data.class_names, labels)
        return match_teacher(classes, spec, stored=reader.identity.class_map), ""
    except (DataError, UsageError) as error:
        return None, str(error)


def _spread(blocks: Sequence[tuple[int, int]], num_views: int) -> list[tuple[int, int]]:
    """Return blocks spread evenly that have at least ``num_views`` views; all if 0."""
    size = max(count for _, count in blocks)
    wanted = min(len(blocks), -(-num_views // size)) if num_views else len(blocks)
    chosen = np.unique(np.linspace(0, len(blocks) - 1, wanted).round().astype(int))
    return [blocks[number] for number in chosen]


def _by_class(given: Rows, labels: Rows) -> tuple[ClassAnswers, ...]:
    given, labels = given[labels >= 0], labels[labels >= 0]
    answers = []
    for label in np.unique(labels).tolist():
        here = given[labels == label]
        wrong = here[here != label]
        answers.append(
            ClassAnswers(
                label=label,
                num_views=len(here),
                num_right=len(here) - len(wrong),
                mistaken_for=int(np.bincount(wrong).argmax()) if len(wrong) else -1,
            )
        )
    return tuple(sorted(answers, key=lambda each: (each.accuracy, each.label)))


def _softmax(logits: Rows) -> Rows:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
