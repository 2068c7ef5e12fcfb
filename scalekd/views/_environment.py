"""The versions that decide a view's pixels."""

import platform
from importlib import metadata

from PIL import features


def pixel_environment() -> dict[str, str]:
    """What to compare when a replayed view differs from the one the teacher saw.

    Returns:
        Name to version: ``pillow`` (resize, colour, geometry), ``libjpeg`` (name and version) and
        ``libwebp`` (lossy decoders), ``torchvision`` (applies the operations), ``numpy`` (raw
        random bits), ``python``, and ``machine``, the processor family: compilers may fuse
        multiply and add on some, which can move the last bit of a blend or a rotation.
        PNG and the other lossless formats decode to the same pixels in every version.
    """
    turbo = features.version("libjpeg_turbo")
    libjpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
    return {
        "pillow": metadata.version("pillow"),
        "libjpeg": libjpeg,
        "libwebp": features.version("webp") or "none",
        "torchvision": metadata.version("torchvision"),
        "numpy": metadata.version("numpy"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "machine": platform.machine(),
    }
