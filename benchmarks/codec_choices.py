"""What each constant of the transform codec is worth: bits a value at one spatial error.

    python -m benchmarks.codec_choices --features /tmp/features/features-mid.npz

Fits the codec at 1 % with one constant changed at a time, and prints bits a value and the error on
held-out views. Where the error differs too, bits are brought to the error of the first line by the
slope of the Gaussian bound at that error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.codecs import Bound, parse_shape
from scalekd.codecs import _analysis, _decoder, _fit, _quantiser, fit_codec, summarise, view_errors

_CHANGES: tuple[tuple[str, tuple[Any, ...], tuple[float, ...]], ...] = (
    ("_TRELLIS_SIGMA", (_fit,), (0.4, 0.65, 1.0)),
    ("_DROP_SIGMA", (_fit,), (0.12, 0.25, 0.4)),
    ("GAIN_STEPS", (_analysis, _decoder), (4, 8, 16)),
    ("_BIT_PRICE", (_quantiser,), (0.15, 0.30, 0.45)),
)
_BLOCK_VIEWS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--error", type=float, default=0.01)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with np.load(options.features) as arrays:
        calibration, test = arrays["calibration"], arrays["test"]
    shape = parse_shape(test, None, 0)
    bound = Bound(calibration, test, shape)
    rows: list[dict[str, Any]] = []

    def measure(constant: str, value: float | None) -> None:
        codec = fit_codec(f"transform:error={options.error}", shape, [calibration])
        num_bytes, errors = 0, []
        for start in range(0, len(test), _BLOCK_VIEWS):
            block = test[start : start + _BLOCK_VIEWS]
            planes = codec.encode(block)
            num_bytes += sum(map(len, codec.pack(planes).values()))
            errors.append(view_errors(block, codec.decode(planes), shape))
        error = summarise(errors).spatial.mean
        bits = 8 * num_bytes / test.size
        least, reference = bound(error), bound(rows[0]["error"] if rows else error)
        at_one_error = bits if least is None or reference is None else bits - (least - reference)
        rows.append(
            {"constant": constant, "value": value, "bits": bits, "error": error}
            | {"bits_at_one_error": at_one_error}
        )
        print(
            f"{constant:16} {'' if value is None else value!s:>6}  {bits:.4f} bits"
            f"  {100 * error:.3f} %  {at_one_error:.4f} at one error"
            f" ({at_one_error - rows[0]['bits']:+.4f})",
            flush=True,
        )

    measure("as it is", None)
    for name, modules, values in _CHANGES:
        standing = getattr(modules[0], name)
        for value in values:
            if value == standing:
                continue
            for module in modules:
                setattr(module, name, value)
            measure(name, value)
        for module in modules:
            setattr(module, name, standing)
    if options.output:
        options.output.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
