"""WebDataset shards: tar files in which members with one base name are one sample."""

import posixpath
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from scalekd.errors import DataError
from scalekd.images.labels import MAX_LABEL_BYTES, LabelReader, ShardLabels, joined
from scalekd.images.left_out import LeftOut, shown
from scalekd.images.members import content, members
from scalekd.images.samples import IMAGE_EXTENSIONS, Rows, check_not_empty, encoded_keys
from scalekd.images.stored import StoredImages
from scalekd.storage import NotStored, Storage, StoredFile
from scalekd.storage.in_flight import REQUESTS_IN_FLIGHT, submit
from scalekd.text import printable, split_lines

_CLASS_FILES = ("classes.txt", "classnames.txt")
_MAX_CLASS_FILE_BYTES = 16 << 20
_DOTTED = (
    "images whose names have a second dot (the key ends at the first; rename them, or pass what"
    " follows it as --input-key)"
)
_NOT_ASKED_FOR = "images whose extension --input-key does not name"


@dataclass(frozen=True, kw_only=True)
class TarImages(StoredImages):
    """Images of WebDataset shards; the key is WebDataset's ``__key__``.

    Attributes:
        ranks: Position of each sample in the order of the shards.
    """

    ranks: Rows

    _columns: ClassVar[tuple[str, ...]] = (*StoredImages._columns, "ranks")

    @classmethod
    def open(
        cls,
        storage: Storage,
        files: Sequence[StoredFile],
        location: str,
        *,
        labels: LabelReader,
        input_key: str | None = None,
    ) -> Self:
        """Index shards by reading each once, several remote ones at a time.

        Args:
            storage: Storage of the shards, and of a list of classes that names the labels.
            files: The shards, in order.
            location: Name of the shards, for messages.
            labels: Reads the labels.
            input_key: Extensions of the images, with ``;`` between them, as in timm; the
                extensions of the formats that are read when ``None``.

        Raises:
            DataError: A shard is damaged or has no image, a key occurs twice, a label cannot be
                read.
        """
        extensions: tuple[str, ...] = IMAGE_EXTENSIONS
        if input_key:
            extensions = tuple(part.strip(" .") for part in input_key.lower().split(";"))
        left_out, shards = LeftOut(), []
        for file, shard in zip(files, _indexed(storage, files, extensions, labels), strict=True):
            shards.append(shard)
            left_out.extend(shard.left_out)
            if not shard.images and not shard.num_members:
                left_out.add("shards without members", file.path)
        keys = [key for shard in shards for key in shard.images]
        notes = left_out.lines(location)
        check_not_empty(len(keys), location, notes)
        numbered = joined(
            [(tuple(shard.images), shard.labels) for shard in shards],
            _class_names(storage) if labels.labelled else None,
            labels,
            location,
        )
        ranges = np.array(
            [
                (number, *extent)
                for number, shard in enumerate(shards)
                for extent in shard.images.values()
            ],
            np.int64,
        )
        dataset = cls(
            location=location,
            keys=encoded_keys(keys, location),
            labels=numbered.numbers,
            sizes=ranges[:, 2],
            class_names=numbered.class_names,
            notes=(*notes, *numbered.notes),
            storage=storage,
            files=tuple(file.path for file in files),
            versions=tuple(file.version for file in files) if storage.is_remote else (),
            file_numbers=ranges[:, 0].astype(np.int32),
            offsets=ranges[:, 1],
            ranks=np.arange(len(keys), dtype=np.int64),
        )
        return dataset.mixed_unless_shuffled()

    def stored_order(self) -> Self:
        """Return the same samples in the order of the shards."""
        return self.taken(np.argsort(self.ranks))


@dataclass
class _Shard:
    """The index of one shard.

    Attributes:
        images: Offset and size of the image of each sample, by key, in order.
        labels: Labels by key.
        left_out: Members that are not read.
        num_members: Number of files in the shard.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: ShardLabels = field(default_factory=ShardLabels)
    left_out: LeftOut = field(default_factory=LeftOut)
    num_members: int = 0

    def add_image(self, name: str, key: str, offset: int, size: int) -> None:
        """Add an image; ``name`` is the name of the shard."""
        if key in self.images:
            raise DataError(
                f"{name}: sample {shown(key)} has two images; name the extension of the one to"
                " take with --input-key"
            )
        self.images[key] = offset, size

    def follow(
        self,
        name: str,
        link: tarfile.TarInfo,
        extents: Mapping[str, tuple[int, int]],
        extensions: tuple[str, ...],
        labels: LabelReader,
    ) -> None:
        """Add the image or the label that a link to another member points to."""
        key, extension = key_and_extension(link.name)
        target = link.linkname
        if link.issym():  # relative to the link; that of a hard link is a member's name
            target = posixpath.join(posixpath.dirname(link.name), target)
        target = posixpath.normpath(target)
        other, other_extension = key_and_extension(target)
        if extension in extensions and target in extents:
            self.add_image(name, key, *extents[target])
        elif labels.wants(extension) and extension == other_extension:
            self.labels.copy(other, key)
        else:
            self.left_out.add("links to what is not an image of the shard", link.name)


def _indexed(
    storage: Storage, files: Sequence[StoredFile], extensions: tuple[str, ...], labels: LabelReader
) -> Iterator[_Shard]:
    if not storage.is_remote:
        for file in files:
            yield _index(storage, file, extensions, labels)
        return
    waiting = deque(files)
    coming: deque[Future[_Shard]] = deque()
    while waiting or coming:
        while waiting and len(coming) < REQUESTS_IN_FLIGHT:
            coming.append(submit(_index, storage, waiting.popleft(), extensions, labels))
        yield coming.popleft().result()


def _index(
    storage: Storage, file: StoredFile, extensions: tuple[str, ...], labels: LabelReader
) -> _Shard:
    name, shard = storage.locate(file.path), _Shard()
    extents: dict[str, tuple[int, int]] = {}  # of images, by the member's name
    links: list[tarfile.TarInfo] = []
    first: dict[str, str] = {}  # member of each key that is no image
    counted: set[str] = set()  # keys whose images are left out, which are counted as such
    with storage.open(file.path, version=file.version) as opened:
        for archive, member in members(opened, name, shard.left_out):
            if member.isdir():
                continue
            shard.num_members += 1
            key, extension = key_and_extension(member.name)
            if not key:
                shard.left_out.add("hidden files", member.name)
            elif member.issym() or member.islnk():
                links.append(member)
            elif not member.isreg() or member.issparse():
                shard.left_out.add("sparse files, pipes and devices", member.name)
            elif extension in extensions:
                shard.add_image(name, key, member.offset_data, member.size)
                extents[posixpath.normpath(member.name)] = shard.images[key]
            elif not extension:
                shard.left_out.add("files without an extension", member.name)
            elif extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                has_dot = "." in extension
                shard.left_out.add(_DOTTED if has_dot else _NOT_ASKED_FOR, member.name)
                counted.add(key)
            else:
                first.setdefault(key, member.name)
                if labels.wants(extension):
                    fits = member.size <= MAX_LABEL_BYTES
                    data = content(archive, member) if fits else b""
                    where = f"{name}: {printable(member.name)}"
                    labels.read(extension, data, key, shard.labels, where)
    for link in links:
        shard.follow(name, link, extents, extensions, labels)
    for key, name_of_first in first.items():
        if key not in shard.images and key not in counted:
            shard.left_out.add("samples without an image", name_of_first)
    if shard.num_members and not shard.images:
        left_out = f"; {shard.left_out.summary}" if len(shard.left_out) else ""
        raise DataError(f"{name}: no image in it ({', '.join(extensions)}){left_out}")
    return shard


def key_and_extension(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its base into key and lower-case extension.

    The key of a hidden file is empty: its name begins with the dot.
    """
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return "", extension.lower()
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _class_names(storage: Storage) -> tuple[str, ...] | None:
    for name in _CLASS_FILES:
        try:
            encoded = storage.read(name, max_bytes=_MAX_CLASS_FILE_BYTES)
        except NotStored:
            continue
        try:
            text = encoded.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = storage.locate(name)
            raise DataError(f"{where}: class names are not UTF-8 ({error})") from error
        return tuple(line.strip() for line in split_lines(text.rstrip()))
    return None
