"""CIFAR-10 as two image sets with different classes, written as class folders."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

HELD_OUT = ("automobile", "bird", "dog", "ship")

# Images per class; `None` is all that are left. Splits of one source follow one another, so that no
# image is in two of them.
PRETRAINING: Mapping[str, Mapping[str, int | None]] = {
    "train": {"few": 96},  # 576 in all, whole batches of 32
    "val": {"val": None},
}
TRANSFER: Mapping[str, Mapping[str, int | None]] = {
    "train": {"train": 500, "dev": 250},  # the setting was chosen on dev
    "val": {"val": None},
}


def write_image_sets(cifar10: Path, output: Path, *, per_class: int | None = None) -> None:
    """Write ``pretrain`` and ``transfer`` below ``output``, each with ``SPLIT/CLASS/KEY.jpg``.

    Args:
        cifar10: Tars of images (``jpg``) and labels (``cls``), and ``classes.txt``.
        output: Folder of both sets; what exists already is kept.
        per_class: Largest number of images of a class in a split, for tests.
    """
    if (output / "complete").exists():
        return
    classes = (cifar10 / "classes.txt").read_text().split()
    seen: Counter[tuple[str, str]] = Counter()
    for source in ("train", "val"):
        for key, label, image in _samples(cifar10, source):
            name = classes[label]
            subset, splits = (
                ("transfer", TRANSFER) if name in HELD_OUT else ("pretrain", PRETRAINING)
            )
            split = _split(splits[source], seen[source, name], per_class)
            seen[source, name] += 1
            if split is None:
                continue
            path = output / subset / split / name / f"{key}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    (output / "complete").touch()


def _split(splits: Mapping[str, int | None], index: int, per_class: int | None) -> str | None:
    """Return the split of a class's image by its position among them."""
    for name, count in splits.items():
        limit = per_class if count is None else min(count, per_class or count)
        if limit is None or index < limit:
            return name
        index -= limit
    return None


def _samples(cifar10: Path, source: str) -> Iterator[tuple[str, int, bytes]]:
    """Yield key, label and JPEG of every image of a source, in the order of its tars."""
    for path in sorted(cifar10.glob(f"{source}-*.tar")):
        with tarfile.open(path) as tar:
            label = -1
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                key, _, kind = member.name.partition(".")
                if kind == "cls":
                    label = int(file.read())
                else:
                    yield key, label, file.read()
