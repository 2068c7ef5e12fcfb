"""Comparison of the classes of a model and of a data set, by their names.

A class is a name; its number is only its position in the list of one model or data set.
:func:`match_classes` finds the model's number of each class of a data set, so that a subset of the
model's classes, or another order, is mapped correctly.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from scalekd.errors import DataError, UsageError
from scalekd.text import split_lines

MAX_CLASSES = 1 << 20
MAX_NAME_LENGTH = 1000
_WORDS = ("auto", "none")
_SYNSET = re.compile(r"n\d{8}")
_MAX_FILE_BYTES = 64 << 20
_NUM_SHOWN = 3  # number of names shown in a message
_MAX_SHOWN_LENGTH = 60

ADVICE = (
    "give --class-map FILE with the model's class of each label, or --class-map none to go by"
    " numbers"
)


@dataclass(frozen=True)
class Classes:
    """The classes of a model or of a data set.

    Attributes:
        owner: Name of the model or data set for messages, such as ``the teacher swin_l``.
        count: Number of classes; 0 if unknown.
        names: Name of each class; ``None`` if unknown.
    """

    owner: str
    count: int
    names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        if self.names is None:
            return f"{self.owner} has {self.count:,} classes without names"
        more = ", …" if len(self.names) > _NUM_SHOWN else ""
        shown = ", ".join(name[:_MAX_SHOWN_LENGTH] for name in self.names[:_NUM_SHOWN])
        return f"{self.owner} has {self.count:,} classes ({shown}{more})"


@dataclass(frozen=True)
class ClassMatch:
    """The mapping from the labels of a data set to the classes of a model.

    Attributes:
        indices: The model's class of each label; ``None`` if the numbers are equal.
        count: Number of classes of a student of this data set and model.
        names: Names of the student's classes, numbered like the labels; ``None`` if unknown.
        note: Sentence for the user about the mapping.
    """

    indices: tuple[int, ...] | None
    count: int
    names: tuple[str, ...] | None
    note: str | None = None


def classes_of_data(
    owner: str, names: Sequence[str] | None, labels: np.ndarray[Any, Any]
) -> Classes:
    """Return the classes of a data set; labels below 0 are missing ones.

    Raises:
        DataError: Some labels have names, but not all.
    """
    largest = int(labels.max(initial=-1))
    if names and largest >= len(names):
        raise DataError(
            f"{owner}: labels run up to {largest:,}, and only {len(names):,} classes have names;"
            " correct its classes.txt"
        )
    return Classes(owner, len(names) if names else largest + 1, tuple(names) if names else None)


def check_labels(owner: str, labels: np.ndarray[Any, Any], num_classes: int) -> None:
    """Check that every label is one of a student's classes.

    Raises:
        DataError: A label is too large.
    """
    largest = int(labels.max(initial=-1))
    if largest >= num_classes:
        raise DataError(
            f"{owner}: labels run up to {largest}, and the student has classes 0 to"
            f" {num_classes - 1} (see --num-classes)"
        )


def match_classes(
    data: Classes,
    model: Classes,
    request: str | Path | Sequence[int] = "auto",
    *,
    advice: str = ADVICE,
) -> ClassMatch:
    """Find the model's class of each label of a data set.

    Args:
        data: The classes of the data set; without names, ``count`` is the largest label plus one.
        model: The classes of the model.
        request: ``auto``: by name, see :func:`find_by_name`, or by number if either has no names
            and the counts agree; ``none``: by number; a path: see :func:`read_class_map`; or
            the model's class of each label.
        advice: Advice for the message if classes cannot be matched.

    Raises:
        DataError: Classes cannot be matched.
        UsageError: The requested map does not fit.
    """
    if isinstance(request, Path) or (isinstance(request, str) and request not in _WORDS):
        request = read_class_map(Path(request), model.names)
    if not isinstance(request, str):
        return _by_map(data, model, request)
    if data.count == 0:
        return ClassMatch(None, model.count, model.names)
    if request == "none":
        return _by_number(data, model)
    names = model.names or _imagenet_names(data, model)
    if data.names is not None and names is not None:
        return _by_name(data, Classes(model.owner, model.count, names), advice)
    if data.count != model.count:
        raise DataError(f"classes cannot be matched: {data}, {model}; {advice}")
    unnamed = " and ".join(side.owner for side in (data, model) if side.names is None)
    return ClassMatch(
        None,
        data.count,
        data.names or model.names,
        f"classes are matched by number, {data.count:,} of them, since {unnamed} does not name"
        " its classes",
    )


def _by_number(data: Classes, model: Classes) -> ClassMatch:
    if data.count > model.count:
        raise DataError(f"classes cannot be matched by number: {data}, {model}, which is fewer")
    names = model.names if data.count < model.count else data.names or model.names
    return ClassMatch(None, model.count, names)


def _by_map(data: Classes, model: Classes, indices: Sequence[int]) -> ClassMatch:
    if len(indices) < data.count:
        raise UsageError(
            f"the class map has {len(indices):,} entries and {data}; it needs one for every label"
        )
    if max(indices) >= model.count:
        raise UsageError(f"the class map has class {max(indices)}, but {model}")
    if data.names is not None and len(indices) > data.count:
        raise UsageError(f"the class map has {len(indices):,} entries, and {data}")
    names = data.names
    if names is None and model.names is not None:
        names = tuple(model.names[index] for index in indices)
    return ClassMatch(_unless_alike(indices, model), len(indices), names)


def _by_name(data: Classes, model: Classes, advice: str) -> ClassMatch:
    data_names = data.names or ()
    candidate_lists = find_by_name(data_names, model.names or ())
    for name, candidates in zip(data_names, candidate_lists, strict=True):
        if len(candidates) != 1:
            what = (
                f"{len(candidates)} classes of {model.owner} are called {name[:100]!r}"
                if candidates
                else f"{name[:100]!r} is not a class of {model.owner}"
            )
            raise DataError(f"classes cannot be matched: {what}; {data}, {model}; {advice}")
    indices = [candidates[0] for candidates in candidate_lists]
    owners: dict[int, str] = {}
    for name, index in zip(data_names, indices, strict=True):
        if index in owners:
            raise DataError(
                f"classes cannot be matched: {owners[index][:100]!r} and {name[:100]!r} of"
                f" {data.owner} are one class of {model.owner}; {advice}"
            )
        owners[index] = name
    mapped = _unless_alike(indices, model)
    note = None
    if len(indices) < model.count:
        note = f"{data.owner} has {len(indices):,} of the {model.count:,} classes of {model.owner}"
    elif mapped is not None:
        note = f"{data.owner} and {model.owner} number the same classes differently"
    if note is not None:
        note += "; they are matched by name"
    return ClassMatch(mapped, len(indices), data.names, note)


def _unless_alike(indices: Sequence[int], model: Classes) -> tuple[int, ...] | None:
    return None if list(indices) == list(range(model.count)) else tuple(indices)


def find_by_name(wanted: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Find each of ``wanted`` among ``names``; return all positions by the strictest rule.

    Rules, from the strictest: the same text; the same but for case, underscores, hyphens and
    spaces; the same ImageNet class by WordNet id (``n01440764``) or description (``tench, Tinca
    tinca``); a common synonym.
    """
    matches: list[list[int]] = [[] for _ in wanted]
    for rule in _RULES:
        if all(matches):
            break
        positions: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(names):
            for key in dict.fromkeys(rule(name)):
                positions[key].append(number)
        for number, name in enumerate(wanted):
            if not matches[number]:
                candidates = {n for key in rule(name) for n in positions.get(key, ())}
                matches[number] = sorted(candidates)
    return matches


def _folded(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", name.casefold()).split())


def _as_described(name: str) -> list[str]:
    lemma = _lemmas().get(name) if _SYNSET.fullmatch(name) else None
    return [_folded(name), *([_folded(lemma)] if lemma else [])]


def _synonyms(name: str) -> list[str]:
    return [_folded(part) for text in _as_described(name) for part in text.split(",")]


_RULES: tuple[Callable[[str], Iterable[str]], ...] = (
    lambda name: [name],
    lambda name: [_folded(name)],
    _as_described,
    _synonyms,
)


@cache
def _lemmas() -> Mapping[str, str]:
    """Return the description of every ImageNet class by its WordNet id."""
    from timm.data.imagenet_info import ImageNetInfo

    described: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-21k-goog", "imagenet-1k"):  # none contains all others
        info = ImageNetInfo(subset)
        names: list[str] = info.label_names()  # type: ignore[no-untyped-call]
        described |= {name: info.label_name_to_description(name) for name in names}
    return described


@cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """Return the WordNet ids of timm's ImageNet subset with this many classes."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    names = tuple(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]
    return names if len(names) == count else None


def _imagenet_names(data: Classes, model: Classes) -> tuple[str, ...] | None:
    """Return ImageNet's names for an unnamed model if its class count and the data fit."""
    names = imagenet_names(model.count)
    if names is None or data.names is None or not set(data.names) <= set(names):
        return None
    return names


def read_class_map(path: Path, model_names: Sequence[str] | None) -> list[int]:
    """Read a class map: one line per label, with the number or name of the model's class.

    Args:
        path: Path of the file, such as timm's ``imagenet_a_indices.txt`` and
            ``imagenet_a_synsets.txt``.
        model_names: Names of the model's classes, if known.

    Raises:
        UsageError: The file cannot be read, or a line is not a class of the model, or is repeated.
    """
    lines = _lines(path, "--class-map")
    numbers = [int(line) if line.isascii() and line.isdigit() else None for line in lines]
    named = [line for line, number in zip(lines, numbers, strict=True) if number is None]
    matches = iter(find_by_name(named, model_names or ()))
    classes: dict[int, None] = {}
    for index, (line, number) in enumerate(zip(lines, numbers, strict=True), start=1):
        if number is None:
            candidates = next(matches)
            if len(candidates) != 1:
                known = (
                    "none of its names" if model_names else "and the names of its classes unknown"
                )
                if candidates:
                    known = f"but the name of {len(candidates)} of its classes"
                raise UsageError(
                    f"--class-map {path}, line {index}: {line[:80]!r} is not a class number of the"
                    f" model, {known}; expected one class a line"
                )
            number = candidates[0]
        if number in classes:
            raise UsageError(f"--class-map {path}, line {index}: class {line[:80]!r} is repeated")
        classes[number] = None
    return list(classes)


def read_class_names(path: Path | None) -> tuple[str, ...] | None:
    """Read the names of a teacher's classes: one line per class, in the order of its logits.

    Returns ``None`` without a file.

    Raises:
        UsageError: The file cannot be read, or a line is empty, too long or repeated.
    """
    if path is None:
        return None
    names = tuple(_lines(path, "--teacher-classes"))
    seen: dict[str, int] = {}
    for index, name in enumerate(names, start=1):
        if not name or len(name) > MAX_NAME_LENGTH:
            raise UsageError(
                f"--teacher-classes {path}, line {index}: expected a name of at most"
                f" {MAX_NAME_LENGTH:,} characters"
            )
        if name in seen:
            raise UsageError(
                f"--teacher-classes {path}: lines {seen[name]} and {index} are both {name[:80]!r};"
                " names of classes must be unique"
            )
        seen[name] = index
    return names


def _lines(path: Path, option: str) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: cannot be read: {error}") from error
    lines = [line.strip() for line in split_lines(text)]
    if not lines or len(content) > _MAX_FILE_BYTES or len(lines) > MAX_CLASSES:
        what = "is empty" if not lines else f"has more than {MAX_CLASSES:,} lines"
        raise UsageError(f"{option} {path}: {what}; expected one class a line")
    return lines
