"""Measure speed, and write what was found.

    python -m benchmarks.speed --quick            # every question, at most ten minutes
    python -m benchmarks.speed                    # the full form
    python -m benchmarks.speed --only loader      # one question; the others' results stay

Results go to ``benchmarks/results/speed.json`` (``speed-quick.json`` with ``--quick``).
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed._measure import Settings, environment
from benchmarks.speed.tables import markdown

QUESTIONS = (
    *(
        "cache_teacher",
        "scheduling",
        "step",
        "updates",
        "pairs",
        "loader",
        "embedded",
        "encoding",
        "formats",
        "growth",
        "profiles",
    ),
)
_RESULTS = Path(__file__).parents[1] / "results"
_DATA = Path(__file__).parents[3] / "shared" / "data"  # beside the repository


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer views and repetitions")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="repeat for several")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument(
        "--data", type=Path, help="folder with cifar10, teacher and imagenet-sample"
    )
    parser.add_argument(
        "--work", type=Path, help="folder to work in, kept; default: a temporary one"
    )
    arguments = parser.parse_args()
    data = arguments.data or _DATA
    missing = [n for n in ("cifar10", "teacher", "imagenet-sample") if not (data / n).is_dir()]
    if missing:
        parser.error(f"{data} has no folder {missing[0]}; give the folder of the data with --data")
    path = arguments.json or _RESULTS / ("speed-quick.json" if arguments.quick else "speed.json")
    if not path.parent.is_dir():
        parser.error(f"--json {path}: there is no folder {path.parent}")
    torch.set_num_threads(1)  # what one core does; two on a busy machine wait for one another
    with tempfile.TemporaryDirectory(prefix="scalekd-speed-") as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        settings = Settings(quick=arguments.quick, data=data.resolve(), work=work.resolve())
        for name in arguments.only or QUESTIONS:
            write(path, name, answer(name, settings))
    print(markdown(read(path)))


def answer(name: str, settings: Settings) -> dict[str, Any]:
    """Run the module of one question."""
    print(f"{name}: started", file=sys.stderr, flush=True)
    load, started = os.getloadavg()[0], time.monotonic()
    result = importlib.import_module(f"benchmarks.speed.{name}").run(settings)
    seconds = time.monotonic() - started
    print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        **result,
        "quick": settings.quick,
        "seconds": round(seconds, 1),
        "environment": environment(_command(name, settings), load_before=load),
    }


def _command(name: str, settings: Settings) -> str:
    return f"python -m benchmarks.speed{' --quick' * settings.quick} --only {name}"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, name: str, found: dict[str, Any]) -> None:
    """Put one question's results beside the others'."""
    text = json.dumps({**read(path), name: found}, indent=1, sort_keys=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
