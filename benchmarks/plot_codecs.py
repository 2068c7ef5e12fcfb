"""Draw the rate-distortion chart of docs/codec.md from committed results.

    python -m benchmarks.plot_codecs benchmarks/results/codecs-mid.json \
        benchmarks/results/codecs-final.json --output docs/img/codec-rate-distortion.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_TITLES = {"features-mid.npz": "before the last two blocks", "features-final.npz": "after the norm"}


def draw(axes: Axes, report: dict[str, Any]) -> None:
    curve = sorted(
        (row for row in report["rows"] if row["codec"] == "transform"),
        key=lambda row: row["spatial_error"],
    )
    errors = [100 * row["spatial_error"] for row in curve]
    axes.plot(errors, [row["bits_per_value"] for row in curve], "o-", label="transform", zorder=3)
    bound = [row["bound_bits_per_value"] for row in curve]
    axes.plot(errors, bound, "--", color="grey", label="Gaussian bound, KLT + DCT")
    for row in report["rows"]:
        if row["codec"] == "transform" or row["spatial_error"] <= 0:
            continue
        axes.plot(100 * row["spatial_error"], row["bits_per_value"], "s", label=row["codec"])
    name = report["features"]
    axes.set_title(_TITLES.get(name, name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("spatial-target error, %")
    axes.set_ylabel("bits a value")
    axes.grid(which="both", alpha=0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in arguments.results]
    figure, axes = plt.subplots(
        1, len(reports), figsize=(5.5 * len(reports), 4.4), squeeze=False, layout="constrained"
    )
    for panel, report in zip(axes[0], reports, strict=True):
        draw(panel, report)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
