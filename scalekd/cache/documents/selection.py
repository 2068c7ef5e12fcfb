"""The selection of a partial copy of a cache: its passes, shards and targets.

A partial copy, or *part*, has the plan and the manifest of the whole cache, its tables, and the
records and files of some passes, shards and targets, which a document below ``selection/`` names.
Early releases wrote a document with the next number whenever a part grew; the last one is valid.
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
_MAX_NUMBER = 4096  # of the documents that early releases wrote

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
        """Return whether a pass is selected; the samples always are."""
        return unit == SAMPLES or _contains(self.passes, int(unit))

    def has_shard(self, shard: int) -> bool:
        return _contains(self.shards, shard)

    def has_target(self, group: str) -> bool:
        """Return whether a group of arrays is selected; groups other than targets always are."""
        return self.targets is None or group not in get_args(Target) or group in self.targets

    def has_file(self, relative: str) -> bool:
        """Return whether a file such as ``passes/0000/stage4/codes/c/0`` is selected.

        The shard of the file must be selected.
        """
        parts = relative.split("/")
        if parts[0] != "passes" or len(parts) < 3 or not parts[1].isdecimal():
            return True
        return self.has_unit(int(parts[1])) and self.has_target(parts[2])

    @property
    def has_tail(self) -> bool:
        """Whether the teacher's tail is selected: with any features, which it is used on."""
        return self.targets is None or bool({"stage3", "stage4"} & set(self.targets))

    def joined(self, other: "Selection") -> "Selection":
        """Return the smallest selection that includes both."""
        targets = None
        if self.targets is not None and other.targets is not None:
            targets = tuple(sorted({*self.targets, *other.targets}))
        return Selection(
            cache_id=self.cache_id,
            passes=_union(self.passes, other.passes),
            shards=_union(self.shards, other.shards),
            targets=targets,
        )

    def __str__(self) -> str:
        texts = [
            f"passes {_text(self.passes)}" if self.passes is not None else "",
            f"shards {_text(self.shards)}" if self.shards is not None else "",
            f"targets {', '.join(self.targets) or 'none'}" if self.targets is not None else "",
        ]
        return ", ".join(filter(None, texts)) or "all of it"


def selection_path(number: int) -> str:
    """Return the path of a numbered selection; new parts have number 1 only."""
    return f"{SELECTION_FOLDER}/{number:06d}.json"


def read_selection(storage: Storage) -> Selection | None:
    """Read the selection of a part; ``None`` for a whole cache.

    Raises:
        CacheCorrupt: The document is damaged.
    """
    number = _last_number(storage)
    if not number:
        return None
    path = selection_path(number)
    return read_document(storage, path, Selection, "the selection of a part", max_bytes=_MAX_BYTES)


def write_selection(storage: Storage, selection: Selection) -> None:
    """Write or replace the selection; the caller holds :func:`selection_lock`."""
    storage.commit(selection_path(max(1, _last_number(storage))), canonical(selection))


@contextlib.contextmanager
def selection_lock(storage: Storage, *, create: bool = False) -> Iterator[None]:
    """Lock the selection against other processes of this machine; no effect on a remote store.

    If two processes extend a remote part at the same time, its selection may lack what the first
    one copied; extending it again copies nothing and completes the selection.

    Args:
        storage: Storage of the part.
        create: Whether the location may become a part. Otherwise a whole cache is not locked.
    """
    if storage.root is None:
        yield
        return
    folder = storage.root / SELECTION_FOLDER
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
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
    """Raise ``UsageError`` if a location contains only a part of a cache.

    Args:
        storage: Storage of the cache.
        doing: The refused action as a past participle, such as ``extended``, for the message.
    """
    part = read_selection(storage)
    if part is not None and not part.is_all:
        raise UsageError(
            f"{storage.location}: contains a part of a cache ({part}), which cannot be {doing};"
            " fetch the rest with `scalekd cache pull` first"
        )


def check_owner(storage: Storage, selection: Selection | None, cache_id: str) -> None:
    """Raise ``CacheMismatch`` if ``selection`` belongs to another cache than ``cache_id``."""
    if selection is not None and selection.cache_id != cache_id:
        raise CacheMismatch(
            f"{storage.locate(SELECTION_FOLDER)}: belongs to cache {selection.cache_id[:12]}…, and"
            f" the plan to cache {cache_id[:12]}…: files of two caches were mixed"
        )


def ranges_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Return the first and last number of each run of consecutive numbers."""
    return _merged((number, number) for number in numbers)


def _contains(ranges: tuple[tuple[int, int], ...] | None, number: int) -> bool:
    return ranges is None or any(first <= number <= last for first, last in ranges)


def _union(
    one: tuple[tuple[int, int], ...] | None, other: tuple[tuple[int, int], ...] | None
) -> tuple[tuple[int, int], ...] | None:
    return None if one is None or other is None else _merged((*one, *other))


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Merge ranges that overlap or follow each other."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def _text(ranges: tuple[tuple[int, int], ...]) -> str:
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges) or "none"
