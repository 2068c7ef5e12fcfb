"""Tars as WebDataset reads them: names and bytes of members."""

import tarfile
import urllib.parse

_BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * _BLOCK_BYTES)
_MAGIC = {b"\x89PNG": "png", b"BM": "bmp", b"P6": "ppm", b"II*\0": "tif", b"MM\0*": "tif"}


def member_stem(key: str) -> str:
    """Return the name of a sample's members without extension.

    WebDataset takes the part of a file's name before the first dot as the key, and keys of
    class folders have dots. So the key is percent-encoded, ``/`` aside, and dots too: only letters,
    digits, ``_``, ``-``, ``~`` and ``/`` stay. ``urllib.parse.unquote`` gives the key back.
    """
    quoted = urllib.parse.quote(key, safe="/~").replace(".", "%2E")
    return quoted if not quoted.startswith(("/", "_")) else f"%{ord(quoted[0]):02X}{quoted[1:]}"


def image_extension(image: bytes) -> str:
    """Extension for an encoded image, by what it is rather than what it was called."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "jpg")


def member(name: str, content: bytes) -> tuple[bytes, int]:
    """One member as bytes of a tar, and where in them its content begins."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.GNU_FORMAT)
    padding = bytes(-len(content) % _BLOCK_BYTES)
    return header + content + padding, len(header)
