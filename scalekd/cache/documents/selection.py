"""Which part of a cache is at a location, when not all of it is.

A part has the whole cache's plan and manifest, unchanged, its tables, and the records and files of
some passes, shards and targets. One document below ``selection/`` says which. Releases before this
one wrote a document of the next number whenever a part grew; the one of the highest number counts.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from scalekd.cache.documents import CacheDocument, canonical
from scalekd.cache.documents.manifest import Sha256
from scalekd.cache.documents.stored import read_document
from scalekd.cache.layout import SAMPLES, SELECTION_FOLDER, Unit
from scalekd.errors import CacheMismatch, UsageError
from scalekd.storage import Storage
from scalekd.storage.locks import lock

_MAX_BYTES = 1 << 20
_MAX_NUMBER = 4096  # a part grows a few times

Number = Annotated[int, Field(ge=0, lt=1 << 20)]
Ranges = Annotated[tuple[tuple[Number, Number], ...], Field(max_length=1 << 14)]
Target = Literal["stage3", "stage4", "logits"]


class Selection(CacheDocument):
    """A part of a cache: the product of some passes, some shards and some targets.

    Attributes:
        cache_id: Identifier of the whole cache.
        passes: First and last pass of each selected range; all passes if ``None``.
        shards: First and last shard of each selected range; all shards if ``None``.
        targets: Selected groups of target arrays; all groups if ``None``. Views are always present.
    """

    cache_id: Sha256
    passes: Ranges | None = None
    shards: Ranges | None = None
    targets: tuple[Target, ...] | None = None

    @property
    def is_all(self) -> bool:
        return self.passes is None and self.shards is None and self.targets is None

    def has_unit(self, unit: Unit) -> bool:
        """Whether a pass, or the samples, which every part has, belongs to it."""
        return unit == SAMPLES or _contains(self.passes, int(unit))

    def has_shard(self, shard: int) -> bool:
        return _contains(self.shards, shard)

    def has_target(self, group: str) -> bool:
        """Whether a group of arrays belongs to it; groups other than targets always do."""
        return self.targets is None or group not in get_args(Target) or group in self.targets

    def has_file(self, relative: str) -> bool:
        """Whether a file of a selected shard belongs to it: ``passes/0000/stage4/codes/c/0``."""
        parts = relative.split("/")
        if parts[0] != "passes" or len(parts) < 3 or not parts[1].isdecimal():
            return True
        return self.has_unit(int(parts[1])) and self.has_target(parts[2])

    @property
    def has_tail(self) -> bool:
        """Whether the teacher's tail belongs to it: it is of use with features alone."""
        return self.targets is None or bool({"stage3", "stage4"} & set(self.targets))

    def joined(self, other: "Selection") -> "Selection":
        """The smallest part that includes both: the product of what both have of each."""
        targets = None
        if self.targets is not None and other.targets is not None:
            targets = tuple(sorted({*self.targets, *other.targets}))
        return Selection(
            cache_id=self.cache_id,
            passes=_joined(self.passes, other.passes),
            shards=_joined(self.shards, other.shards),
            targets=targets,
        )

    def __str__(self) -> str:
        texts = [
            f"passes {_spell(self.passes)}" if self.passes is not None else "",
            f"shards {_spell(self.shards)}" if self.shards is not None else "",
            f"targets {', '.join(self.targets) or 'none'}" if self.targets is not None else "",
        ]
        return ", ".join(filter(None, texts)) or "all of it"


def selection_path(number: int) -> str:
    """Path of the selection of a number, from 1 on; what is written now is the first."""
    return f"{SELECTION_FOLDER}/{number:06d}.json"


def read_selection(storage: Storage) -> Selection | None:
    """Read the selection of a part; ``None`` where a whole cache is.

    Raises:
        CacheCorrupt: It is damaged.
    """
    number = _last_number(storage)
    if not number:
        return None
    path = selection_path(number)
    return read_document(storage, path, Selection, "the selection of a part", max_bytes=_MAX_BYTES)


def write_selection(storage: Storage, selection: Selection) -> None:
    """Write or replace the selection; hold :func:`selection_lock` meanwhile."""
    storage.commit(selection_path(max(1, _last_number(storage))), canonical(selection))


@contextlib.contextmanager
def selection_lock(storage: Storage, *, create: bool = False) -> Iterator[None]:
    """Keep other processes from changing the selection; has no effect on a remote store.

    With ``create``, the location may be about to become that of a part.

    A remote part that two processes widen at once may lack, in its selection, what the first
    brought; widening it again brings nothing and completes the selection.
    """
    if storage.root is None:
        yield
        return
    folder = storage.root / SELECTION_FOLDER
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():  # a whole cache, which stays one
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def _last_number(storage: Storage) -> int:
    number = 0
    while number < _MAX_NUMBER and storage.exists(selection_path(number + 1)):
        number += 1
    return number


def refuse_part(storage: Storage, doing: str) -> None:
    """Check that a location is not that of a part of a cache.

    Raises:
        UsageError: It is.
    """
    part = read_selection(storage)
    if part is not None and not part.is_all:
        raise UsageError(
            f"{storage.location}: holds a part of a cache ({part}), which cannot be {doing}; fetch"
            " the rest with `scalekd cache pull` first"
        )


def check_owner(storage: Storage, selection: Selection | None, cache_id: str) -> None:
    """Raise ``CacheMismatch`` if ``selection`` belongs to another cache than ``cache_id``."""
    if selection is not None and selection.cache_id != cache_id:
        raise CacheMismatch(
            f"{storage.locate(SELECTION_FOLDER)}: is of cache {selection.cache_id[:12]}…, and the"
            f" plan of {cache_id[:12]}…: files of two caches were mixed"
        )


def ranges_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive numbers, as first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1] = found[-1][0], number
        else:
            found.append((number, number))
    return tuple(found)


def _contains(ranges: tuple[tuple[int, int], ...] | None, number: int) -> bool:
    return ranges is None or any(first <= number <= last for first, last in ranges)


def _joined(
    one: tuple[tuple[int, int], ...] | None, other: tuple[tuple[int, int], ...] | None
) -> tuple[tuple[int, int], ...] | None:
    if one is None or other is None:
        return None
    found: list[tuple[int, int]] = []
    for first, last in sorted((*one, *other)):
        if found and first <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(last, found[-1][1])
        else:
            found.append((first, last))
    return tuple(found)


def _spell(ranges: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges) or "none"
