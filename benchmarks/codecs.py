"""Rate, distortion and speed of feature codecs on one file of features.

    python -m benchmarks.codecs --features F.npz [--json] [--output benchmarks/results/codecs.json]

``F.npz`` holds ``calibration`` and ``test``, each float16 (view, token, channel); everything is
fitted on the first and measured on the second. ``python -m benchmarks.features`` makes such files.

One core, blocks of 256 views, CPU seconds. ``decode`` is bytes to the stored integers, what a
loader's worker does; ``whole decode`` goes on to float32 features on the CPU, what the
training device does otherwise. Errors are relative and squared (``scalekd.codecs.measure``). The
bound is Gaussian reverse water-filling over the coefficients of the mean, the cosine transform and
four radial-band KLTs of the raw features, fitted on the calibration views, with variances of the
test views, at the mean squared error that gives a row's spatial error if spread evenly over the
tokens."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks import _codec_baselines as baselines
from scalekd.codecs import TransformOptions, fit_codec, summarise, view_errors
from scalekd.codecs._spatial import forward, radial_bands
from scalekd.shapes import FeatureShape

_TARGETS = (0.002, 0.005, 0.01, 0.02, 0.05)
_REPEATS = 3


@dataclass
class Row:
    codec: str
    target: float | None
    bytes_per_view: float
    bits_per_value: float
    raw_error: float
    spatial_error: float
    spatial_error_p95: float
    frequency_error: float
    frequency_error_p95: float
    encode_views_per_second: float
    decode_views_per_second: float
    whole_decode_views_per_second: float
    bound_bits_per_value: float | None
    gap_bits_per_value: float | None


class Bound:
    """Gaussian rate of KLT + DCT at a given spatial error, bits a value."""

    def __init__(self, calibration: np.ndarray, test: np.ndarray, shape: FeatureShape) -> None:
        bands = radial_bands(shape, 4)
        channels = shape.num_channels
        mean = np.mean(calibration, axis=0, dtype=np.float64).astype(np.float32)
        moments = np.zeros((int(bands.max()) + 1, channels, channels))
        for block in _blocks(calibration):
            rows = forward(block.astype(np.float32) - mean, shape)
            for band in range(len(moments)):
                flat = rows[:, bands == band].reshape(-1, channels)
                moments[band] += flat.T @ flat
        vectors = [np.linalg.eigh(moment)[1].astype(np.float32) for moment in moments]
        variances = np.zeros((shape.num_tokens, channels))
        inverse = 0.0
        for block in _blocks(test):
            values = block.astype(np.float32)
            lengths = np.square(values[:, shape.num_prefix_tokens :]).sum(axis=-1)
            inverse += float((1 / np.maximum(lengths, 1e-20)).mean(axis=1).sum())
            rows = forward(values - mean, shape)
            for band, basis in enumerate(vectors):
                variances[bands == band] += np.square(rows[:, bands == band] @ basis).sum(axis=0)
        self.num_tokens = shape.num_tokens
        self.variances = variances.reshape(-1) / len(test)
        self.energy = len(test) / inverse  # harmonic mean of the tokens' squared lengths

    def __call__(self, spatial_error: float) -> float | None:
        if spatial_error <= 0:
            return None
        wanted = spatial_error * self.energy * self.num_tokens  # squared error of a view
        low, high = 0.0, float(self.variances.max())
        for _ in range(200):
            level = (low + high) / 2
            filled = float(np.minimum(self.variances, level).sum())
            low, high = (level, high) if filled < wanted else (low, level)
        used = self.variances[self.variances > high]
        return float(0.5 * np.log2(used / high).sum() / len(self.variances))


def _blocks(views: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(views), baselines.BLOCK):
        yield views[start : start + baselines.BLOCK]


def _rate(views: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Views a CPU second, the median of some runs, and the last result."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.process_time()
        result = work()
        seconds.append(time.process_time() - start)
    return views / max(statistics.median(seconds), 1e-9), result


def measure(subject: baselines.Subject, test: np.ndarray, shape: FeatureShape, bound: Bound) -> Row:
    """Code the test views block by block; the first block is the timed one."""
    size, parts = 0, []
    encode_rate = decode_rate = whole_rate = 0.0
    for index, block in enumerate(_blocks(test)):
        if index == 0:
            subject.finish(subject.decode_integers(subject.encode(block[:8]), 8))  # warm up
            encode_rate, data = _rate(len(block), lambda: subject.encode(block))  # noqa: B023
            decode_rate, arrays = _rate(
                len(block),
                lambda: subject.decode_integers(data, len(block)),  # noqa: B023
            )
            finish_rate, decoded = _rate(len(block), lambda: subject.finish(arrays))  # noqa: B023
            whole_rate = 1 / (1 / decode_rate + 1 / finish_rate)
        else:
            data = subject.encode(block)
            decoded = subject.finish(subject.decode_integers(data, len(block)))
        size += sum(map(len, data))
        parts.append(view_errors(block, decoded, shape))
    errors = summarise(parts)
    bits = 8 * size / test.size
    least = bound(errors.spatial.mean)
    return Row(
        codec=subject.name,
        target=subject.target,
        bytes_per_view=size / len(test),
        bits_per_value=bits,
        raw_error=errors.raw.mean,
        spatial_error=errors.spatial.mean,
        spatial_error_p95=errors.spatial.p95,
        frequency_error=errors.frequency.mean,
        frequency_error_p95=errors.frequency.p95,
        encode_views_per_second=encode_rate,
        decode_views_per_second=decode_rate,
        whole_decode_views_per_second=whole_rate,
        bound_bits_per_value=least,
        gap_bits_per_value=None if least is None else bits - least,
    )


def run(
    calibration: np.ndarray, test: np.ndarray, shape: FeatureShape, targets: tuple[float, ...]
) -> tuple[list[Row], list[str]]:
    """Rows of all codecs, and notes on those that were left out."""
    bound = Bound(calibration, test, shape)
    tune = calibration[:: max(1, len(calibration) // 128)][:128]
    main = 0.01
    int8 = fit_codec("int8", shape)
    makers: list[Callable[[], baselines.Subject | None]] = [
        lambda: baselines.float16(shape, zstd=False),
        lambda: baselines.float16(shape, zstd=True),
        lambda: baselines.ours("fp16+pcodec", fit_codec("float16", shape)),
        lambda: baselines.int8_raw(int8),
        lambda: baselines.ours("int8+zstd", int8),
        lambda: baselines.int4(shape),
        lambda: baselines.pca(shape, calibration, tune, main),
        lambda: baselines.klt_zstd(shape, calibration, tune, main),
    ]
    pictures = [("jpegxl", 8), ("jpegxl", 10), ("avif", 8)]
    for coder, bits in pictures:
        makers.append(
            lambda coder=coder, bits=bits: baselines.picture(  # type: ignore[misc]
                shape, calibration, tune[:16], main, coder=coder, bits=bits
            )
        )
    for target in targets:
        makers.append(
            lambda target=target: baselines.ours(  # type: ignore[misc]
                "transform",
                fit_codec(f"transform:error={target}", shape, [calibration]),
                target,
            )
        )
    rows, notes = [], []
    for index, make in enumerate(makers):
        subject = make()
        if subject is None:
            coder, bits = pictures[index - 8]
            notes.append(f"picture-{bits}bit+{coder} skipped: imagecodecs is missing or without it")
            continue
        few = subject.name.startswith("picture")
        rows.append(measure(subject, test[:64] if few else test, shape, bound))
        print(_line(rows[-1]), file=sys.stderr, flush=True)
    return rows, notes


def parse_shape(views: np.ndarray, grid: str | None, num_prefix_tokens: int) -> FeatureShape:
    """The grid given, or the one closest to a square that has as many tokens."""
    _, tokens, channels = views.shape
    patches = tokens - num_prefix_tokens
    if grid:
        height, width = (int(part) for part in grid.lower().split("x"))
    else:
        height = next(size for size in range(int(patches**0.5), 0, -1) if patches % size == 0)
        width = patches // height
    shape = FeatureShape((height, width), channels, num_prefix_tokens)
    if shape.num_tokens != tokens:
        raise SystemExit(f"{tokens} tokens are not {num_prefix_tokens} + {height} x {width}")
    return shape


_HEADER = (
    f"{'codec':22} {'target':>6} {'B/view':>9} {'bits':>7} {'raw %':>7} {'spatial %':>9} {'p95':>6}"
    f" {'freq %':>7} {'p95':>6} {'enc/s':>7} {'dec/s':>8} {'whole/s':>8} {'bound':>6} {'gap':>7}"
)


def _line(row: Row) -> str:
    bound = "" if row.bound_bits_per_value is None else f"{row.bound_bits_per_value:6.3f}"
    gap = "" if row.gap_bits_per_value is None else f"{row.gap_bits_per_value:+7.3f}"
    return (
        f"{row.codec:22} {row.target or '':>6} {row.bytes_per_view:9.0f} {row.bits_per_value:7.3f}"
        f" {100 * row.raw_error:7.3f} {100 * row.spatial_error:9.3f}"
        f" {100 * row.spatial_error_p95:6.3f} {100 * row.frequency_error:7.3f}"
        f" {100 * row.frequency_error_p95:6.2f} {row.encode_views_per_second:7.0f}"
        f" {row.decode_views_per_second:8.0f} {row.whole_decode_views_per_second:8.0f}"
        f" {bound:>6} {gap:>7}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--grid", help="rows x columns, as 7x7; default: closest to a square")
    parser.add_argument("--prefix-tokens", type=int, default=0)
    parser.add_argument(
        "--targets", help="comma-separated; default: " + ",".join(map(str, _TARGETS))
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("--output", type=Path, help="write that object here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)  # one core is what the figures are about

    with np.load(arguments.features, allow_pickle=False) as file:
        calibration, test = (np.asarray(file[name], np.float16) for name in ("calibration", "test"))
    shape = parse_shape(calibration, arguments.grid, arguments.prefix_tokens)
    targets = _TARGETS
    if arguments.targets:
        targets = tuple(float(part) for part in arguments.targets.split(","))
    for target in targets:
        TransformOptions(target)
    rows, notes = run(calibration, test, shape, targets)
    print(_HEADER)
    for row in rows:
        print(_line(row))
    for note in notes:
        print(note)
    report = {
        "features": arguments.features.name,
        "shape": asdict(shape),
        "calibration_views": len(calibration),
        "test_views": len(test),
        "machine": platform.processor() or platform.machine(),
        "rows": [asdict(row) for row in rows],
        "notes": notes,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
