"""The classes of a model and of a data set, compared by their names.

A class is a name; its number is only its position in one model's or one data set's list. Wherever
a model and a data set meet, :func:`match_classes` finds the model's number of each class of the
data set, so that a subset of the model's classes, or another order, is mapped instead of mixed up.
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

MAX_CLASSES = 1 << 20
MAX_NAME_LENGTH = 1000
_WORDS = ("auto", "none")
_SYNSET = re.compile(r"n\d{8}")
_MAX_FILE_BYTES = 64 << 20
_NUM_SHOWN = 3  # names of each side in a message
_MAX_SHOWN_LENGTH = 60

ADVICE = (
    "give --class-map FILE with the model's class of each label, or --class-map none to go by"
    " numbers"
)


@dataclass(frozen=True)
class Classes:
    """One side of a comparison.

    Attributes:
        owner: What has these classes, for messages, such as ``the teacher swin_l``.
        count: Number of classes; 0 where nothing tells.
        names: Name of each class; ``None`` where unknown.
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
    """How the labels of a data set are classes of a model.

    Attributes:
        indices: The model's class of each label; ``None`` where both number alike.
        count: Number of classes of a student of both.
        names: Their names, numbered like the labels; ``None`` where unknown.
        note: What a person should know about it, in one line.
    """

    indices: tuple[int, ...] | None
    count: int
    names: tuple[str, ...] | None
    note: str | None = None


def classes_of_data(
    owner: str, names: Sequence[str] | None, labels: np.ndarray[Any, Any]
) -> Classes:
    """The classes of a data set; labels below 0 are missing ones.

    Raises:
        DataError: A label has no name though the others do.
    """
    largest = int(labels.max(initial=-1))
    if names and largest >= len(names):
        raise DataError(
            f"{owner}: labels run up to {largest:,}, and only {len(names):,} classes have names;"
            " correct its classes.txt"
        )
    return Classes(owner, len(names) if names else largest + 1, tuple(names) if names else None)


def match_classes(
    data: Classes,
    model: Classes,
    request: str | Path | Sequence[int] = "auto",
    *,
    advice: str = ADVICE,
) -> ClassMatch:
    """Find the model's class of each label of a data set.

    Args:
        data: The classes of the labels; ``count`` is one more than the largest label where there
            are no names.
        model: The classes of the logits.
        request: ``auto``: by name, see :func:`find_by_name`, or by number where a side has no
            names and the counts agree; ``none``: by number; a path: see :func:`read_class_map`; or
            the model's class of each label.
        advice: What to do about classes that cannot be matched, for the message.

    Raises:
        DataError: Classes cannot be matched.
        UsageError: The map asked for does not fit.
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
        raise UsageError(f"the class map names class {max(indices)}, and {model}")
    if data.names is not None and len(indices) > data.count:
        raise UsageError(f"the class map has {len(indices):,} entries, and {data}")
    names = data.names
    if names is None and model.names is not None:
        names = tuple(model.names[index] for index in indices)
    return ClassMatch(_unless_alike(indices, model), len(indices), names)


def _by_name(data: Classes, model: Classes, advice: str) -> ClassMatch:
    data_names = data.names or ()
    found = find_by_name(data_names, model.names or ())
    for name, candidates in zip(data_names, found, strict=True):
        if len(candidates) != 1:
            what = (
                f"{len(candidates)} classes of {model.owner} are called {name[:100]!r}"
                if candidates
                else f"{name[:100]!r} is no class of {model.owner}"
            )
            raise DataError(f"classes cannot be matched: {what}; {data}, {model}; {advice}")
    indices = [candidates[0] for candidates in found]
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
    """Find each of ``wanted`` among ``names``: all positions that the strictest rule gives.

    Rules, from the strictest: the same text; the same but for case, underscores, hyphens and
    spaces; the same ImageNet class by WordNet id (``n01440764``) or description (``tench, Tinca
    tinca``); a synonym in common.
    """
    found: list[list[int]] = [[] for _ in wanted]
    for rule in _RULES:
        if all(found):
            break
        positions: dict[str, list[int]] = defaultdict(list)
        for number, name in enumerate(names):
            for key in dict.fromkeys(rule(name)):
                positions[key].append(number)
        for number, name in enumerate(wanted):
            if not found[number]:
                candidates = {n for key in rule(name) for n in positions.get(key, ())}
                found[number] = sorted(candidates)
    return found


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
    """Description of every ImageNet class by its WordNet id."""
    from timm.data.imagenet_info import ImageNetInfo

    described: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-21k-goog", "imagenet-1k"):  # none holds all others
        info = ImageNetInfo(subset)
        names: list[str] = info.label_names()  # type: ignore[no-untyped-call]
        described |= {name: info.label_name_to_description(name) for name in names}
    return described


@cache
def imagenet_names(count: int) -> tuple[str, ...] | None:
    """WordNet ids of the ImageNet selection that has this many classes, as timm lists them."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    names = tuple(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]
    return names if len(names) == count else None


def _imagenet_names(data: Classes, model: Classes) -> tuple[str, ...] | None:
    """The names of an unnamed model whose number of classes and whose data are ImageNet's."""
    names = imagenet_names(model.count)
    if names is None or data.names is None or not set(data.names) <= set(names):
        return None
    return names


def read_class_map(path: Path, model_names: Sequence[str] | None) -> list[int]:
    """Read a class map: one line a label, the number or the name of the model's class.

    Args:
        path: The file; timm's ``imagenet_a_indices.txt`` and ``imagenet_a_synsets.txt`` are such.
        model_names: Names of the model's classes, where they are known.

    Raises:
        UsageError: It cannot be read, or a line is no class of the model, or is repeated.
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
    """Read the names of a teacher's classes: one line a class, in the order of its logits.

    Without a file there are none.

    Raises:
        UsageError: It cannot be read, or a line is empty, too long or repeated.
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
                " classes are told apart by their names"
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
    lines = [line.strip() for line in text.splitlines()]
    if not lines or len(content) > _MAX_FILE_BYTES or len(lines) > MAX_CLASSES:
        what = "is empty" if not lines else f"has more than {MAX_CLASSES:,} lines"
        raise UsageError(f"{option} {path}: {what}; expected one class a line")
    return lines
