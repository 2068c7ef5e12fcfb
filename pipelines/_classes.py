"""Logits of a caching job: choose them, match labels with classes, count right answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scalekd.cache.documents.manifest import ClassMap, Plan
from scalekd.codecs import create_logit_codec
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.models.classes import Classes, ClassMatch
from scalekd.teachers import Teacher, match_teacher

_LEAST_VIEWS = 32  # the accuracy on fewer views is not significant
_NUM_DEVIATIONS = 3.0  # an answer drawn at random is above chance by so many in 1 of 700 caches


def choose_logits(
    asked: str | None, teacher: Teacher, *, stages: Sequence[int] = (4,)
) -> tuple[str, str]:
    """Choose the logits that a cache keeps.

    Args:
        asked: Value of ``--logits``: ``full``, ``topk:K`` or ``none``; ``None`` if not given.
        teacher: Teacher that computes the logits.
        stages: Stages whose features the cache keeps.

    Returns:
        The choice as ``full``, ``topk:K`` or ``none``, and a note for the user or ``""``.

    Raises:
        UsageError: Logits are asked for, and the teacher has no classifier or fewer classes.
    """
    num_classes = teacher.spec.num_classes
    if asked is None:
        if num_classes is not None:
            return "full", ""
        kept = (
            "features alone are cached" if stages else "with --stages none, only views are cached"
        )
        return "none", (
            f"{teacher.spec.model} has no logits: {teacher.no_classifier}; {kept} (--logits none)"
        )
    if asked != "none":
        if num_classes is None:
            raise UsageError(
                f"--logits {asked}: {teacher.spec.model} has no logits, since"
                f" {teacher.no_classifier}; pass --logits none, or give the weights of a classifier"
                " (--checkpoint) and the names of its classes (--teacher-classes)"
            )
        create_logit_codec(asked, num_classes)
    return asked, ""


def match_labels(
    data: Classes, teacher: Teacher, class_map: str, output: object, plan: Plan | None
) -> tuple[ClassMatch | None, str]:
    """Find the teacher's class of each label; an existing plan decides.

    A teacher without class names may have more classes than the data. Caching needs no match, so
    its logits are cached and not compared with the labels; training on them requires a class map.

    Args:
        data: Classes of the labels.
        teacher: Teacher that computes the logits.
        class_map: Value of ``--class-map``: ``auto``, ``none`` or a file.
        output: Location of the cache, for messages.
        plan: Plan of the existing cache; ``None`` for a new one.

    Returns:
        The match, or ``None`` if labels are not compared; and a note for the user or ``""``.

    Raises:
        DataError, UsageError: Classes cannot be matched.
        CacheMismatch: ``class_map`` differs from the map in the plan.
    """
    stored = plan.identity.class_map if plan is not None else None
    try:
        match = match_teacher(data, teacher.spec, class_map, stored=stored)
    except DataError as error:
        fewer = data.count < (teacher.spec.num_classes or 0)
        if class_map != "auto" or teacher.spec.class_names is not None or not fewer:
            raise
        note = (
            "labels are not compared with the teacher's answers, and training with its logits will"
            f" need a class map: {error}"
        )
        return None, note
    if plan is not None and class_map != "auto" and stored_map(class_map, match) != stored:
        raise CacheMismatch(
            f"--class-map {class_map}: {output} was begun with other classes; leave"
            " the option out to continue it, choose another --output, or pass --overwrite"
        )
    return match, match.note or ""


def stored_map(class_map: str, match: ClassMatch | None) -> ClassMap | None:
    """Return the form of a match that the plan of a new cache keeps."""
    if match is None or match.count == 0:
        return None
    return "number" if class_map == "none" else match.indices


class TeacherAnswers:
    """Counts how often the teacher's likeliest class is the label.

    Args:
        match: The teacher's class of each label; ``None`` if labels are not compared.
    """

    def __init__(self, match: ClassMatch | None) -> None:
        self._match = match
        self.num_right = self.num_labelled = 0

    def add(self, logits: np.ndarray[Any, Any] | None, labels: np.ndarray[Any, Any]) -> None:
        """Count the answers of a batch.

        Args:
            logits: Scores, ``(view, class)``; ``None`` if the teacher has no classifier.
            labels: Label of each view, or -1, ``(view,)``.
        """
        if logits is None or self._match is None:
            return
        known = labels >= 0
        scores = logits if self._match.indices is None else logits[:, list(self._match.indices)]
        self.num_right += int((scores.argmax(axis=1) == labels)[known].sum())
        self.num_labelled += int(known.sum())

    def __add__(self, other: "TeacherAnswers") -> "TeacherAnswers":
        both = TeacherAnswers(self._match)
        both.num_right = self.num_right + other.num_right
        both.num_labelled = self.num_labelled + other.num_labelled
        return both

    @property
    def top1(self) -> float | None:
        """Percent of the labelled views whose answer is the label; ``None`` without such views."""
        return 100 * self.num_right / self.num_labelled if self.num_labelled else None

    def warning(self) -> str:
        """Return a sentence if the answers are no better than guesses; otherwise ``""``."""
        if self._match is None or self.num_labelled < _LEAST_VIEWS or self._match.count < 2:
            return ""
        chance = 1 / self._match.count
        deviation = (chance * (1 - chance) / self.num_labelled) ** 0.5
        limit = chance + _NUM_DEVIATIONS * deviation
        if self.num_right > limit * self.num_labelled:
            return ""
        return (
            f"the teacher's top-1 on {self.num_labelled:,} labelled views is {self.top1:.1f} %, no"
            f" better than chance with {self._match.count:,} classes: are the labels its classes?"
            " See --class-map and --teacher-classes"
        )
