"""Labels of samples in tar shards: class numbers or class names in one member of each sample."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scalekd.errors import DataError, UsageError
from scalekd.images.left_out import listed, shown

CLS_EXTENSIONS = ("cls", "cls.txt")
MAX_LABEL_BYTES = 1 << 20
_NUMBER = re.compile(r"\s*(-1|\d{1,9})\s*")
_MAX_CLASSES = 1 << 20
_MAX_LABEL = 10**9
_JSON_LABEL = "label"
NO_LABEL = -1

Label = int | str | None


@dataclass
class ShardLabels:
    """Labels of one shard by key.

    Attributes:
        stated: Labels from the member that contains them.
        in_json, in_text: Numbers that may be labels, from ``json`` and ``txt`` members, if no
            member was named; -1 for a ``json`` label of null, ``None`` for anything else.
        problems: Why the ``json`` member of a sample does not give its label.
    """

    stated: dict[str, Label] = field(default_factory=dict)
    in_json: dict[str, int | None] = field(default_factory=dict)
    in_text: dict[str, int | None] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def copy(self, source: str, target: str) -> None:
        """Give one sample the labels of another."""
        columns: Any = self.stated, self.in_json, self.in_text, self.problems
        for column in columns:
            if source in column:
                column[target] = column[source]


@dataclass(frozen=True)
class LabelReader:
    """Reads labels from members of a shard.

    Attributes:
        target_key: Extension of the member that holds the label (``cls``, ``txt``), or a field of
            the ``json`` member, with ``/`` between the keys of nested ones, as in timm. ``None``
            takes ``cls``, or else whole numbers in ``json``'s field ``label`` or in ``txt`` if
            every sample without ``cls`` has one.
        labelled: Whether labels are read.
    """

    target_key: str | None = None
    labelled: bool = True

    def wants(self, extension: str) -> bool:
        """Return whether a member with this extension may contain a label."""
        if not self.labelled:
            return False
        if self.target_key is None:
            return extension in (*CLS_EXTENSIONS, "json", "txt")
        return extension in (self.target_key, "json")

    def read(self, extension: str, data: bytes, key: str, labels: ShardLabels, where: str) -> None:
        """Read the label from a member's content.

        Raises:
            DataError: The member that should contain the label does not contain one, or another
                than the sample has from another member of that kind.
        """
        if self.target_key is None:
            if extension in CLS_EXTENSIONS:
                number = _class_number(data, where)
                if labels.stated.setdefault(key, number) != number:
                    raise DataError(
                        f"{where} holds the label {number}, and another member of the sample"
                        f" {labels.stated[key]}; remove one of them, or pass --labels none"
                    )
            elif extension == "json":
                value = _parsed(data)
                label = value.get(_JSON_LABEL, "") if isinstance(value, dict) else ""
                labels.in_json[key] = NO_LABEL if label is None else as_number(label)
            else:
                labels.in_text[key] = as_number(_decoded(data))
        elif extension == self.target_key and extension != "json":
            text = _decoded(data)
            if text is None or not text.strip():
                raise DataError(f"{where} contains no label, which is a line of text or a number")
            class_number = as_number(text)
            labels.stated[key] = text.strip() if class_number is None else class_number
        elif key not in labels.stated:
            field_label, problem = self._field(_parsed(data))
            if problem:
                labels.problems[key] = f"--target-key {self.target_key}: {where} {problem}"
            else:
                labels.stated[key] = field_label

    def _field(self, value: Any) -> tuple[Label, str | None]:
        """Return the label in a JSON document, or the problem with it."""
        name = _JSON_LABEL if self.target_key == "json" else str(self.target_key)
        if isinstance(value, dict) or self.target_key != "json":
            names = listed(map(str, value)) if isinstance(value, dict) else "none"
            for part in [name] if isinstance(value, dict) and name in value else name.split("/"):
                if not isinstance(value, dict) or part not in value:
                    return None, f"has no field {shown(part)} (fields: {names})"
                value = value[part]
        number = as_number(value)
        if number is None and isinstance(value, str) and value.strip():
            return value.strip(), None
        if number is None and value is not None:
            return None, f"holds {shown(str(value))}, neither a class number nor a class name"
        return number, None


def _class_number(data: bytes, where: str) -> int:
    text = _decoded(data) if len(data) <= 32 else None
    number = None if text is None else as_number(text)
    if number is None:
        raise DataError(
            f"{where} is not a class number; read names of classes with --target-key cls, name"
            " another member that holds the label, or ignore labels with --labels none"
        )
    return number


def as_number(value: Any) -> int | None:
    """Return a class number, -1 for no label, or ``None`` for other values."""
    if isinstance(value, float) and value.is_integer():  # what pandas makes of 3 beside a gap
        value = int(value)
    if isinstance(value, str) and len(value) <= 32 and (match := _NUMBER.fullmatch(value)):
        value = int(match[1])
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if NO_LABEL <= value < _MAX_LABEL else None


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class Labels:
    """Labels of an image set.

    Attributes:
        numbers: Class number of each sample, -1 for a sample without a label.
        class_names: Names in order of number, where labels are names or the set lists them.
        notes: Messages about how labels were read, one line each.
    """

    numbers: np.ndarray[Any, Any]
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


def joined(
    shards: Sequence[tuple[Sequence[str], ShardLabels]],
    class_names: tuple[str, ...] | None,
    reader: LabelReader,
    location: str,
) -> Labels:
    """Number the labels of all shards.

    Args:
        shards: Keys of each shard's samples, in order, and its labels.
        class_names: Names in the set's list of classes, if it has one.
        reader: How labels are read.
        location: Path or name of the set, for messages.

    Raises:
        DataError: A label is a name that the set's list of classes does not have.
        UsageError: No sample has the member that ``--target-key`` names.
    """
    samples = [(key, labels) for keys, labels in shards for key in keys]
    if not reader.labelled:
        return Labels(np.full(len(samples), NO_LABEL, np.int32), None, ())
    notes: list[str] = []
    merged: list[Label] = [labels.stated.get(key) for key, labels in samples]
    rest = [n for n, (key, labels) in enumerate(samples) if key not in labels.stated]
    if reader.target_key is None:
        sources = {"in_json": f"json members, field {_JSON_LABEL}", "in_text": "txt members"}
        for column, members in sources.items():
            values = {n: getattr(samples[n][1], column).get(samples[n][0]) for n in rest}
            # At least one: a note about labels that were read would be wrong without any.
            known = values.values()
            if None not in known and max(known, default=NO_LABEL) > NO_LABEL:
                for number, value in values.items():
                    merged[number] = value
                notes.append(
                    f"{location}: the labels of {len(rest):,} samples are the numbers in their"
                    f" {members}; --labels none ignores them"
                )
                break
    else:
        problems = (samples[n][1].problems.get(samples[n][0]) for n in rest)
        if problem := next(filter(None, problems), None):
            raise DataError(
                f"{problem}; name the member or field that holds the label, or pass --labels none"
            )
        if not any(labels.stated for _, labels in shards):
            raise UsageError(
                f"--target-key {reader.target_key}: {location} has no sample with a member of that"
                " name or with one in json; name the one that holds the label, or pass --labels"
                " none"
            )
    return numbered(merged, class_names, [key for key, _ in samples], location, notes)


def numbered(
    labels: Sequence[Label],
    class_names: tuple[str, ...] | None,
    keys: Sequence[str],
    location: str,
    notes: Sequence[str] = (),
) -> Labels:
    """Number labels that are names, and count samples without a label.

    Args:
        labels: Label of each sample; ``None`` for a sample without one.
        class_names: Names in the set's list of classes, if it has one.
        keys: Keys of the samples.
        location: Path or name of the set, for messages.
        notes: Notes to put first.

    Raises:
        DataError: A label is a name that the list of classes does not have or has twice, a label
            is a number beyond the list, or labels are names and numbers at once.
    """
    numbers, class_names = _numbered(labels, class_names, location)
    if class_names and numbers.max(initial=NO_LABEL) >= len(class_names):
        raise DataError(
            f"{location}: labels run up to {numbers.max():,}, and only {len(class_names):,} classes"
            " have names; correct its list of classes, or pass --labels none"
        )
    missing = np.flatnonzero(numbers < 0)
    if len(missing) and len(missing) == len(numbers):
        notes = (
            *notes,
            f"{location}: none of the {len(numbers):,} samples has a label; if they have labels,"
            " name their member or field with --target-key, otherwise pass --labels none",
        )
    elif len(missing):
        notes = (
            *notes,
            f"{location}: {len(missing):,} of the {len(numbers):,} samples have no label, such as"
            f" {shown(keys[missing[0]])}; they are used where no label is needed. Name the"
            " member or field of their labels with --target-key, or ignore all labels with --labels"
            " none",
        )
    return Labels(numbers, class_names, tuple(notes))


def _numbered(
    labels: Sequence[Label], class_names: tuple[str, ...] | None, location: str
) -> tuple[np.ndarray[Any, Any], tuple[str, ...] | None]:
    names = {label for label in labels if isinstance(label, str)}
    if not names:
        return np.array([NO_LABEL if label is None else label for label in labels], np.int32), (
            class_names
        )
    number = next((label for label in labels if isinstance(label, int) and label >= 0), None)
    if number is not None and class_names is None:
        raise DataError(
            f"{location}: some labels are numbers, such as {number}, and some are names, such as"
            f" {shown(min(names))}; use one of the two, or list the classes in classes.txt"
        )
    if len(names) > _MAX_CLASSES:
        raise DataError(
            f"{location}: the labels are {len(names):,} different texts, such as"
            f" {shown(min(names))}, so they are no classes; name another --target-key, or pass"
            " --labels none"
        )
    class_names = tuple(sorted(names)) if class_names is None else class_names
    number_of: Mapping[str, int] = {name: number for number, name in enumerate(class_names)}
    unknown = sorted(names - number_of.keys())
    if unknown:
        raise DataError(
            f"{location}: {len(unknown):,} labels are not among the {len(class_names):,} classes"
            f" that it lists, such as {shown(unknown[0])}"
        )
    if len(number_of) < len(class_names):
        counts = Counter(class_names)
        if doubled := sorted(name for name in names if counts[name] > 1):
            raise DataError(
                f"{location}: {counts[doubled[0]]} of the classes that it lists are called"
                f" {shown(doubled[0])}, so labels of this name are ambiguous; give the classes"
                " names of their own, or use class numbers as labels"
            )
    numbers = [
        NO_LABEL if label is None else number_of[label] if isinstance(label, str) else label
        for label in labels
    ]
    return np.array(numbers, np.int32), class_names
