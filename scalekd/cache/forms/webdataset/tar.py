"""Members of WebDataset tars: their names and bytes."""

import tarfile
import urllib.parse

_BLOCK_BYTES = 512
END_OF_ARCHIVE = bytes(2 * _BLOCK_BYTES)
_MAGIC = {b"\x89PNG": "png", b"BM": "bmp", b"P6": "ppm", b"II*\0": "tif", b"MM\0*": "tif"}


def member_stem(key: str) -> str:
    """Return the name of a sample's members, without extension.

    WebDataset takes the part of a name before the first dot as the key, but keys of image folders
    contain dots. The key is therefore percent-encoded, except letters, digits, ``_``, ``-``, ``~``
    and ``/``. ``urllib.parse.unquote`` returns the key.
    """
    quoted = urllib.parse.quote(key, safe="/~").replace(".", "%2E")
    return quoted if not quoted.startswith(("/", "_")) else f"%{ord(quoted[0]):02X}{quoted[1:]}"


def image_extension(image: bytes) -> str:
    """Return the extension for an encoded image, by its content."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((name for magic, name in _MAGIC.items() if image.startswith(magic)), "jpg")


def member(name: str, content: bytes) -> tuple[bytes, int]:
    """Return the bytes of a member in a tar, and the offset of its content in them."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.GNU_FORMAT)
    padding = bytes(-len(content) % _BLOCK_BYTES)
    return header + content + padding, len(header)
