"""Which class of a model each label of a data set is, where the two number them differently.

Subsets of ImageNet (ImageNet-100, -A, -R) number their own classes from 0. A class map gives the
model's class of each label; classes outside the map are not in the running, as is usual for
these sets, and as timm's ``validate.py --valid-labels`` does it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

from scalekd.errors import DataError, UsageError


def class_map_by_name(
    data_names: Sequence[str] | None,
    model_names: Sequence[str] | None,
    *,
    place: str,
    owner: str = "the model",
) -> list[int] | None:
    """Find each class of a data set among the model's by its name.

    Args:
        data_names: Of the data set's classes, where it names them.
        model_names: Of the model's classes, where they are known.
        place: The data set, for messages.
        owner: What has the model's names, for messages.

    Returns:
        The model's class of each label; None where both number alike, or where either has no names
        and numbers are all there is.

    Raises:
        DataError: The data set has a class that the model does not know, or knows twice.
    """
    if data_names is None or model_names is None or tuple(data_names) == tuple(model_names):
        return None
    numbers = {name: number for number, name in enumerate(model_names)}
    times = Counter(model_names)
    for name in data_names:
        if times[name] != 1:
            what = "no class" if name not in numbers else "more than one class"
            raise DataError(
                f"{place}: {owner} has {what} called {name!r}; say which of its classes each label "
                "is with --class-map FILE, or go by the numbers alone with --class-map none"
            )
    return [numbers[name] for name in data_names]


def read_class_map(path: Path, model_names: Sequence[str] | None) -> list[int]:
    """Read a class map: one line a label, the number or the name of the model's class.

    Args:
        path: The file; timm's ``imagenet_a_indices.txt`` and ``imagenet_a_synsets.txt`` are such.
        model_names: Of the model's classes, where they are known.

    Raises:
        UsageError: It cannot be read, or a line is no class of the model, or stands twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-map {path}: cannot be read: {error}") from error
    numbers = {name: number for number, name in enumerate(model_names or ())}
    classes: dict[int, None] = {}
    for place, line in enumerate((line.strip() for line in lines), start=1):
        number = int(line) if line.isascii() and line.isdigit() else numbers.get(line)
        if number is None:
            known = "none of its names" if model_names else "and the names of its classes unknown"
            raise UsageError(
                f"--class-map {path}, line {place}: {line[:80]!r} is not a class number of the "
                f"model, {known}; expected one class a line"
            )
        if number in classes:
            raise UsageError(f"--class-map {path}, line {place}: class {line!r} stands twice")
        classes[number] = None
    if not classes:
        raise UsageError(f"--class-map {path}: is empty; expected one class a line")
    return list(classes)


def imagenet_class_names(
    model: nn.Module, data_names: Sequence[str] | None
) -> tuple[str, ...] | None:
    """WordNet ids of a published ImageNet model's classes, as timm tells them by their number.

    Args:
        model: A timm model that says nothing of its classes but how many they are.
        data_names: Of the data set's classes; unless all are WordNet ids of the model's, nothing
            is known.
    """
    subset = infer_imagenet_subset(model)
    if subset is None or not data_names:
        return None
    try:
        names = ImageNetInfo(subset).label_names()  # type: ignore[no-untyped-call]
    except AssertionError:
        return None  # a subset that timm infers and has no list of
    return tuple(names) if set(data_names) <= set(names) else None
