"""Members of a tar shard, which is read once from its start to its end."""

import tarfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, cast

from scalekd.errors import DataError
from scalekd.images.left_out import LeftOut

_BLOCK = 512
_PIECE_BYTES = 1 << 20

Member = tuple[tarfile.TarFile, tarfile.TarInfo]


def members(file: BinaryIO, name: str, left_out: LeftOut) -> Iterator[Member]:
    """Yield the members of a tar file in order, with those of archives appended to it.

    A tar file ends with blocks of zeros, and ``cat a.tar b.tar`` leaves them between two archives.

    Args:
        file: The shard, at its start; it need not be able to seek.
        name: Name of the shard, for messages.
        left_out: Counts data after the last archive that is not an archive.

    Raises:
        DataError: The file is damaged or cut short.
    """
    stream = file if file.seekable() else cast(BinaryIO, _Forward(file))
    start: int | None = 0
    try:
        while start is not None:
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    yield archive, member
                    cast(Any, archive).members.clear()  # tarfile would keep them all
                end = archive.offset
            if start and end == start:
                left_out.add("files after the end of an archive", f"{name} from byte {start:,} on")
                return
            _check_end(stream, end, name)
            start = _next_content(stream)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: not a readable tar file ({error})") from error


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the whole content of the member that was yielded last."""
    file: IO[bytes] | None = archive.extractfile(member)
    return b"" if file is None else file.read()


def _check_end(stream: BinaryIO, end: int, name: str) -> None:
    """Raise at damage, where ``tarfile`` ends silently as at the end of an archive."""
    stream.seek(end)
    if stream.read(_BLOCK) != bytes(_BLOCK):
        raise DataError(
            f"{name}: damaged or cut short at byte {end:,}, where there is neither a member nor the"
            " end of the archive; fetch it again"
        )


def _next_content(stream: BinaryIO) -> int | None:
    """Return the start of the next block that is not all zeros; ``None`` at the file's end."""
    while piece := stream.read(_PIECE_BYTES):
        num_zeros = len(piece) - len(piece.lstrip(b"\0"))
        if num_zeros < len(piece):
            return (stream.tell() - len(piece) + num_zeros) // _BLOCK * _BLOCK
    return None


class _Forward:
    """A file that comes over a network, with the seeking that tarfile needs.

    Going forward reads; going back reaches the start of the last piece that was read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next = 0  # position of the next byte
        self._last = b""  # piece that ends there
        self._again = b""  # bytes that were read before and come next

    def read(self, count: int) -> bytes:
        data, self._again = self._again[:count], self._again[count:]
        if len(data) < count:
            data += self._file.read(count - len(data))
        self._next += len(data)
        self._last = data
        return data

    def tell(self) -> int:
        return self._next

    def seek(self, offset: int, whence: int = 0) -> int:
        back = self._next - offset
        if whence or back > len(self._last):
            raise OSError(f"cannot go back to byte {offset:,} of a stream")
        if back > 0:
            self._again = self._last[-back:] + self._again
            self._last = self._last[:-back]
            self._next = offset
        while self._next < offset and self.read(min(_PIECE_BYTES, offset - self._next)):
            pass
        return self._next

    def close(self) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
