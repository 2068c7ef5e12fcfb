"""Put runs of two releases side by side, which were measured in turn.

    python -m benchmarks.speed.compare --before old-1.json old-2.json \\
        --after new-1.json new-2.json --releases e33bf9d 2b30a24 --json compared.json

The files are results of ``python -m benchmarks.speed --quick --json FILE``, each from a checkout
of its release. A figure is the median over the runs; a ratio that changes by less than the runs of
one release differ from one another shows no change.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

CIFAR = "cifar10, ViT-S/14 at 112 px"
PHOTOGRAPHS = "photographs, Swin-L's shape at 224 px"


def _micro(*path: str) -> Callable[[Result], float]:
    """Return a function that reads the processor time of a view."""

    def read(run: Result) -> float:
        found = run
        for name in (*path, "cpu_us"):
            found = found[name]
        return float(found)  # type: ignore[arg-type]

    return read


def _step(student: str) -> dict[str, Callable[[Result], float]]:
    path = ("step", "students", student)
    return {
        f"cached step / online, {student}": lambda r: r["step"]["students"][student][
            "cached_over_online"
        ],
        f"cached step, {student}, µs per view": _micro(*path, "per_view", "cached"),
        f"online step, {student}, µs per view": _micro(*path, "per_view", "online"),
    }


FIGURES: dict[str, Callable[[Result], float]] = {
    "caching decoded views / forward": lambda r: r["cache_teacher"]["over_forward"]["write"]["cpu"],
    "caching from files / forward": lambda r: r["cache_teacher"]["over_forward"]["draw_and_write"][
        "cpu"
    ],
    "caching decoded views, µs per view": _micro("cache_teacher", "per_view", "write"),
    **_step("resnet18"),
    **_step("vit_tiny_patch16_224"),
    "loader with / without targets, CIFAR-10": lambda r: r["loader"]["sets"][CIFAR][
        "rate_with_over_without"
    ],
    "loader with targets, CIFAR-10, µs per view": _micro(
        "loader", "sets", CIFAR, "per_view", "with"
    ),
    "loader with / without targets, photographs": lambda r: r["loader"]["sets"][PHOTOGRAPHS][
        "rate_with_over_without"
    ],
    "loader with targets, photographs, µs per view": _micro(
        "loader", "sets", PHOTOGRAPHS, "per_view", "with"
    ),
}
"""Ratios within one run, and processor times, by name."""


def compared(before: Sequence[Result], after: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the values of each figure in all runs of both releases."""
    return [
        {"figure": name, "before": _values(before, figure), "after": _values(after, figure)}
        for name, figure in FIGURES.items()
    ]


def _values(runs: Sequence[Result], figure: Callable[[Result], float]) -> list[float]:
    return [round(figure(run), 4) for run in runs]


def rows(result: Result) -> list[list[str]]:
    """Return the rows of the document's table: figure, and median and extremes of each release."""
    return [
        [row["figure"], *(_median_and_range(row[when]) for when in ("before", "after"))]
        for row in result["rows"]
    ]


def _median_and_range(values: Sequence[float]) -> str:
    form = ",.0f" if min(values) > 10 else ".3f"
    middle, least, most = (
        format(value, form) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, nargs="+", required=True)
    parser.add_argument("--after", type=Path, nargs="+", required=True)
    parser.add_argument("--releases", nargs=2, required=True, help="commits before and after")
    parser.add_argument("--json", type=Path, required=True, help="file of the result")
    arguments = parser.parse_args()
    before, after = (
        [json.loads(path.read_text()) for path in paths]
        for paths in (arguments.before, arguments.after)
    )
    environments = [run[name]["environment"] for run in (*before, *after) for name in run]
    loads = [load for environment in environments for load in environment["load_average"]]
    result = {
        "releases": arguments.releases,
        "rows": compared(before, after),
        "processor": environments[0]["processor"],
        "cores": environments[0]["cores"],
        "date": environments[-1]["date"],
        "load_average": [min(loads), max(loads)],
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
