"""Codecs that the transform codec is compared with; each is fitted, then coded block by block.

``encode`` turns float16 views into bytes, ``decode_integers`` turns the bytes into the arrays that
were compressed, ``finish`` turns those into features. All of them work on blocks of up to 256
views."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd

from scalekd.codecs import FeatureCodec, measure_errors
from scalekd.codecs.compression import decompress
from scalekd.shapes import FeatureShape

BLOCK = 256
_ZSTD = Zstd(level=3)


@dataclass
class Subject:
    """One row's codec."""

    name: str
    encode: Callable[[np.ndarray], list[bytes]]
    decode_integers: Callable[[list[bytes], int], Any]
    finish: Callable[[Any], np.ndarray]
    target: float | None = None


def float16(shape: FeatureShape, *, zstd: bool) -> Subject:
    def decode(data: list[bytes], views: int) -> np.ndarray:
        raw = _ZSTD.decode(data[0]) if zstd else bytes(bytearray(data[0]))
        flat = np.frombuffer(raw, np.float16)
        return flat.reshape(views, shape.num_tokens, shape.num_channels)

    def encode(block: np.ndarray) -> list[bytes]:
        return [bytes(_ZSTD.encode(block)) if zstd else block.tobytes()]

    return Subject("fp16+zstd" if zstd else "float16", encode, decode, lambda x: x.astype("f4"))


def ours(name: str, codec: FeatureCodec, target: float | None = None) -> Subject:
    """A codec of the package, packed as its Zarr chunks are; its decoder runs in torch."""
    import torch

    decoder = codec.decoder()

    def encode(block: np.ndarray) -> list[bytes]:
        return list(codec.pack(codec.encode(block)).values())

    def decode(data: list[bytes], views: int) -> dict[str, np.ndarray]:
        return {
            spec.name: decompress(part, spec.compression, spec.dtype, views * spec.values_per_view)
            .reshape(spec.stored_shape(views))
            .copy()
            for spec, part in zip(codec.planes, data, strict=True)
        }

    def finish(planes: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(decoder(codec.tensors(planes)).numpy())

    return Subject(name, encode, decode, finish, target)


def int8_raw(codec: FeatureCodec) -> Subject:
    """The int8 codec's arrays without entropy coding."""
    subject = ours("int8", codec)

    def encode(block: np.ndarray) -> list[bytes]:
        planes = codec.encode(block)
        return [planes[spec.name].tobytes() for spec in codec.planes]

    def decode(data: list[bytes], views: int) -> dict[str, np.ndarray]:
        return {
            spec.name: np.frombuffer(bytearray(part), spec.dtype).reshape(spec.stored_shape(views))
            for spec, part in zip(codec.planes, data, strict=True)
        }

    subject.encode, subject.decode_integers = encode, decode
    return subject


def int4(shape: FeatureShape) -> Subject:
    """Four bits a value, one half-precision scale for 32 channels, then zstd."""
    size = 32
    padded = -(-shape.num_channels // size) * size

    def encode(block: np.ndarray) -> list[bytes]:
        values = np.zeros((*block.shape[:2], padded), np.float32)
        values[..., : shape.num_channels] = block
        groups = values.reshape(*block.shape[:2], -1, size)
        scale = (np.abs(groups).max(axis=-1) / 7).astype(np.float16)
        safe = np.maximum(scale.astype(np.float32), 1e-8)[..., None]
        codes = np.clip(np.rint(groups / safe), -7, 7).astype(np.int8).reshape(-1, 2) + 8
        packed = (codes[:, 0] | codes[:, 1] << 4).astype(np.uint8)
        return [bytes(_ZSTD.encode(packed)), bytes(_ZSTD.encode(np.ascontiguousarray(scale)))]

    def decode(data: list[bytes], views: int) -> tuple[np.ndarray, np.ndarray]:
        packed = np.frombuffer(_ZSTD.decode(data[0]), np.uint8)
        scale = np.frombuffer(_ZSTD.decode(data[1]), np.float16)
        return packed.reshape(views, -1), scale.reshape(views, shape.num_tokens, -1)

    def finish(arrays: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        packed, scale = arrays
        codes = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
        groups = codes.reshape(*scale.shape, size).astype(np.float32)
        values = groups * scale.astype(np.float32)[..., None]
        return values.reshape(*scale.shape[:2], padded)[..., : shape.num_channels]

    return Subject("int4-groups-of-32", encode, decode, finish)


def channel_basis(calibration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and orthonormal channel basis (component, channel), most energetic first."""
    tokens = calibration.reshape(-1, calibration.shape[-1]).astype(np.float32)
    mean = tokens.mean(axis=0)
    centred = tokens - mean
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    return mean, np.ascontiguousarray(vectors[:, ::-1].T).astype(np.float32)


def pca(shape: FeatureShape, calibration: np.ndarray, held: np.ndarray, target: float) -> Subject:
    """The first components in half precision: as many as the target takes."""
    mean, basis = channel_basis(calibration)
    low, high = 1, shape.num_channels
    rotated = (held.astype(np.float32) - mean) @ basis.T
    while low < high:
        middle = (low + high) // 2
        decoded = rotated[..., :middle] @ basis[:middle] + mean
        if measure_errors(held, decoded, shape).spatial.mean > target:
            low = middle + 1
        else:
            high = middle
    kept = basis[:low]

    def encode(block: np.ndarray) -> list[bytes]:
        return [((block.astype(np.float32) - mean) @ kept.T).astype(np.float16).tobytes()]

    def decode(data: list[bytes], views: int) -> np.ndarray:
        flat = np.frombuffer(bytearray(data[0]), np.float16)
        return flat.reshape(views, shape.num_tokens, len(kept))

    return Subject("pca", encode, decode, lambda x: x.astype(np.float32) @ kept + mean, target)


def klt_zstd(
    shape: FeatureShape, calibration: np.ndarray, held: np.ndarray, target: float
) -> Subject:
    """Channel basis, one uniform step, components byte-shuffled one after the other, zstd."""
    mean, basis = channel_basis(calibration)
    rotated = (held.astype(np.float32) - mean) @ basis.T

    def error(step: float) -> float:
        decoded = np.rint(rotated / step) * step @ basis + mean
        return measure_errors(held, decoded, shape).spatial.mean

    step = bisect(error, 1e-4, 1e2, target)

    def encode(block: np.ndarray) -> list[bytes]:
        codes = np.rint((block.astype(np.float32) - mean) @ (basis.T / step)).astype(np.int16)
        by_component = np.ascontiguousarray(codes.reshape(-1, shape.num_channels).T)
        shuffled = by_component.view(np.uint8).reshape(-1, 2).T
        return [bytes(_ZSTD.encode(np.ascontiguousarray(shuffled)))]

    def decode(data: list[bytes], views: int) -> np.ndarray:
        shuffled = np.frombuffer(_ZSTD.decode(data[0]), np.uint8).reshape(2, -1)
        codes = np.ascontiguousarray(shuffled.T).view(np.int16)
        return codes.reshape(shape.num_channels, views, shape.num_tokens)

    def finish(codes: np.ndarray) -> np.ndarray:
        values = np.moveaxis(codes, 0, -1).astype(np.float32) * step
        return np.asarray(values @ basis + mean)

    return Subject("klt+zstd", encode, decode, finish, target)


def picture(
    shape: FeatureShape,
    calibration: np.ndarray,
    held: np.ndarray,
    target: float,
    *,
    coder: str,
    bits: int,
) -> Subject | None:
    """Truncate, quantise to ``bits``, tile the channels into one picture, code an intra frame.

    None when the coder is not installed. Prefix tokens go beside it in half precision.
    """
    try:
        import imagecodecs
    except ImportError:
        return None
    if not getattr(imagecodecs, coder.upper()).available:
        return None
    height, width = shape.grid
    first = shape.num_prefix_tokens
    across = int(np.ceil(np.sqrt(shape.num_channels)))
    down = -(-shape.num_channels // across)
    sample = calibration[:, first:].astype(np.float32)
    low, high = np.quantile(sample[:: max(1, len(sample) // 200)], [0.0005, 0.9995])
    levels = 2**bits - 1
    dtype = np.uint8 if bits == 8 else np.uint16

    def tile(view: np.ndarray) -> np.ndarray:
        codes = np.rint((np.clip(view, low, high) - low) * (levels / (high - low)))
        channels = np.zeros((across * down, height, width), dtype)
        channels[: shape.num_channels] = codes.T.reshape(-1, height, width)
        grid = channels.reshape(down, across, height, width).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(grid.reshape(down * height, across * width))

    def untile(image: np.ndarray) -> np.ndarray:
        grid = image.reshape(down, height, across, width).transpose(0, 2, 1, 3)
        channels = grid.reshape(-1, height * width)[: shape.num_channels]
        return channels.T.astype(np.float32) * ((high - low) / levels) + low

    def code(image: np.ndarray, quality: float) -> bytes:
        if coder == "jpegxl":
            return bytes(
                imagecodecs.jpegxl_encode(
                    image, distance=quality, effort=5, lossless=False, bitspersample=bits
                )
            )
        return bytes(
            imagecodecs.avif_encode(
                # This binding codes a single channel losslessly whatever the level.
                np.repeat(image[..., None], 3, axis=-1),
                level=round(quality),
                speed=6,
                bitspersample=bits,
                pixelformat="420",
            )
        )

    def uncode(data: bytes) -> np.ndarray:
        decode = imagecodecs.jpegxl_decode if coder == "jpegxl" else imagecodecs.avif_decode
        image = np.asarray(decode(data))
        return image.reshape(down * height, across * width, -1)[..., 0]

    def error(quality: float) -> float:
        decoded = held.astype(np.float32)
        for index, view in enumerate(held[:, first:].astype(np.float32)):
            decoded[index, first:] = untile(uncode(code(tile(view), quality)))
        return measure_errors(held, decoded, shape).spatial.mean

    if coder == "jpegxl":
        quality = bisect(error, 0.01, 25.0, target, iterations=9)
    else:  # integer levels, falling error
        bottom, top = 0, 99
        while bottom < top:
            middle = (bottom + top) // 2
            bottom, top = (middle + 1, top) if error(middle) > target else (bottom, middle)
        quality = float(bottom)

    def encode(block: np.ndarray) -> list[bytes]:
        images = [code(tile(view.astype(np.float32)), quality) for view in block[:, first:]]
        return [block[:, :first].tobytes(), *images]

    def decode(data: list[bytes], views: int) -> tuple[np.ndarray, list[np.ndarray]]:
        prefix = np.frombuffer(data[0], np.float16).reshape(views, first, shape.num_channels)
        return prefix, [uncode(part) for part in data[1:]]

    def finish(arrays: tuple[np.ndarray, list[np.ndarray]]) -> np.ndarray:
        prefix, images = arrays
        patches = np.stack([untile(image) for image in images])
        return np.concatenate([prefix.astype(np.float32), patches], axis=1)

    return Subject(f"picture-{bits}bit+{coder}", encode, decode, finish, target)


def bisect(
    error: Callable[[float], float], low: float, high: float, target: float, *, iterations: int = 16
) -> float:
    """Where a rising error meets the target, by halving on a logarithmic scale."""
    for _ in range(iterations):
        middle = float(np.sqrt(low * high))
        if error(middle) < target:
            low = middle
        else:
            high = middle
        if high / low < 1.002:
            break
    return low
