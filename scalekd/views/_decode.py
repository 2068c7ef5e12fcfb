"""Decoding of images to RGB pixels, for teacher and student.

Pillow always decodes at full size: libjpeg's draft mode is faster but gives other pixels. EXIF
orientation is ignored, as in timm, torchvision and every published ImageNet recipe. Alpha is
dropped and CMYK converted as ``Image.convert("RGB")`` does, which is what timm calls. One thing
differs from timm: 16-bit gray images keep their upper eight bits, where ``convert`` would clip
nearly every value to white.
"""

import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from scalekd.errors import DataError
from scalekd.views._component import MAX_PIXELS, MAX_SIDE

# Other formats are excluded: they are not used for training, and some, such as EPS, run programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def decode_image(data: bytes, *, key: str) -> Image.Image:
    """Decode an image.

    Args:
        data: JPEG, PNG, WebP, BMP, GIF (first frame), TIFF (first page) or PPM.
        key: Key of the sample, for error messages.

    Returns:
        RGB image of the encoded size, without EXIF rotation.

    Raises:
        DataError: The bytes are not such an image, are truncated or detectably damaged, or the
            image is larger than 89 megapixels or 65,535 pixels on a side.
    """
    try:
        with _truncation_is_an_error():
            return _decode(data, key)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's errors for damaged bytes have no common base class
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not a {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} image"
        raise DataError(
            f"sample {key}: its {len(data):,} bytes cannot be decoded: {reason}. Replace or "
            "remove it; only cache-teacher can leave such samples out, with --skip-corrupt"
        ) from error


def _decode(data: bytes, key: str) -> Image.Image:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise DataError(
            f"sample {key}: {width:,} x {height:,} px; views are drawn from images of at most "
            f"{MAX_PIXELS:,} pixels and {MAX_SIDE:,} on a side. Shrink or remove it"
        )
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        return _upper_byte(image, key)
    if image.mode == "F":
        raise DataError(f"sample {key}: floating-point images have no fixed range of values")
    # Transparency does not change the RGB result, but makes Pillow warn or do more work.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _upper_byte(image: Image.Image, key: str) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise DataError(f"sample {key}: gray values beyond 16 bits; save it with 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


class _Strictness:
    """Number of running decodes, and the value of the switch before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.previous = False


_strictness = _Strictness()
if hasattr(os, "register_at_fork"):
    # A child must not inherit a held lock, or counted decodes, of threads that it does not have.
    os.register_at_fork(after_in_child=lambda: _strictness.__init__())  # type: ignore[misc]


@contextmanager
def _truncation_is_an_error() -> Iterator[None]:
    """Keep Pillow's process-wide ``LOAD_TRUNCATED_IMAGES`` off while images are decoded.

    Other libraries may switch it on, and then a truncated image is decoded with gray pixels and
    without an error. It is restored when the last concurrent decode ends.
    """
    with _strictness.lock:
        if _strictness.running == 0:
            _strictness.previous = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _strictness.running += 1
    try:
        yield
    finally:
        with _strictness.lock:
            _strictness.running -= 1
            if _strictness.running == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _strictness.previous
