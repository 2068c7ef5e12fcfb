"""Where both stages spend their time, by what the processors do: py-spy's samples, sorted.

``scalekd cache-teacher`` and ``scalekd train-student`` run as users run them, workers included.
What is paid once, start-up and calibration, is left out of the shares and counted beside them. A
sample belongs to the innermost frame that a rule knows; what no rule knows is listed by function.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.speed import _inputs
from benchmarks.speed._measure import Settings

_RULES = (
    ("entropy coding", r"pcodec|numcodecs|_decode_(blosc|zstd|pcodec)"),
    ("transform codec, encoding", r"codecs/(_quantiser|_trellis|_analysis|_fit|transform)\.py"),
    ("transform codec, decoding", r"codecs/_decoder\.py"),
    ("packing views' parameters", r"\b(un)?pack_views? \("),
    ("image decode and drawing", r"PIL/|views/_(decode|view|crop|flip|rand|jitter|erase|policy)"),
    ("reading images", r"data/samples\.py"),
    ("indexing the image set", r"data/index\.py|tarfile\.py"),
    ("optimiser", r"torch/optim|timm/optim"),
    ("backward", r"torch/autograd"),
    ("losses", r"distillation/losses\.py"),
    ("teacher's tail", r"teachers/tail\.py"),
    ("projectors", r"distillation/projector\.py"),
    ("model", r"teachers/teacher\.py|students/student\.py|teachers/families\.py"),
    ("files and their hashes", r"cache/files\.py|storage/|hashlib"),
    ("writing through zarr", r"zarr/|cache/forms/store\.py"),
    ("reading the cache", r"cache/(reader|chunks)\.py|data/blocks\.py"),
    ("checkpoints", r"training/(checkpoint|run_folder|state)\.py"),
    ("batches between processes", r"multiprocessing|data/_workers|torch/utils/data"),
    ("waiting", r"threading\.py|selectors\.py|queue\.py|socket\.py"),
)
_COMPILED = [(name, re.compile(pattern)) for name, pattern in _RULES]
_BEGUN = ("(pipelines/", "(scalekd/loading/", "(scalekd/cache/")
_RATE = 100


def run(settings: Settings) -> dict[str, Any]:
    py_spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if py_spy is None:
        return {"left_out": "py-spy is not installed (the bench extra has it)"}
    cache, views = settings.work / "profiled-cache", 256 if settings.quick else 2048
    config = _inputs.cifar_config(settings)
    shutil.rmtree(cache, ignore_errors=True)
    data = ["--data-dir", config.data_dir]
    teacher = [
        *("cache-teacher", "--model", config.teacher.model, *data, "--output", str(cache)),
        *("--aug", config.aug, "--limit", str(views), "--passes", "2", "-j", "1"),
    ]
    run_folder = settings.work / "profiled-run"
    shutil.rmtree(run_folder, ignore_errors=True)
    student = [
        *("train-student", "--cache", str(config.output), *data, "--model", "resnet18"),
        *("--img-size", "64", "--epochs", "1", "-b", "64", "-j", "1", "--val-split", "none"),
        *("--amp", "no", "--output", str(run_folder)),
    ]
    return {
        "views": {"cache-teacher": 2 * views, "train-student": _inputs.cifar_views(settings)},
        "stages": {
            "cache-teacher": _profile(py_spy, teacher, settings.work),
            "train-student": _profile(py_spy, student, settings.work),
        },
    }


def _profile(py_spy: str, command: list[str], work: Path) -> dict[str, Any]:
    raw = work / "profile.raw"
    # Blocking: a stack read while it changes would be sorted wrongly.
    arguments = [py_spy, "record", "--format", "raw", "--rate", str(_RATE), "--subprocesses"]
    program = [sys.executable, "-m", "scalekd", *command]
    result = subprocess.run(
        [*arguments, "-o", str(raw), "--", *program], capture_output=True, text=True, check=False
    )
    if result.returncode or not raw.exists():
        return {"left_out": result.stderr.strip()[-400:]}
    return sort_samples(raw.read_text())


def sort_samples(text: str) -> dict[str, Any]:
    """Shares of categories and of unknown functions.

    Args:
        text: Lines of ``frame;frame;… count``, outermost frame first.
    """
    known: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    start_up = calibration = 0
    for line in text.splitlines():
        stack, _, number = line.rpartition(" ")
        frames, count = stack.split(";"), int(number)
        begun = any(sign in stack for sign in _BEGUN)
        if not begun or "<frozen importlib" in stack:
            start_up += count
            continue
        if "pipelines/_calibrate.py" in stack:
            calibration += count
            continue
        name = _category(frames)
        if name is None:
            unknown[re.sub(r":\d+\)$", ")", frames[-1])] += count
        else:
            known[name] += count
    total = known.total() + unknown.total()
    return {
        "samples": total,
        "start_up_seconds": start_up / _RATE,
        "calibration_seconds": calibration / _RATE,
        "shares": {name: count / total for name, count in known.most_common()},
        "other": {name: count / total for name, count in unknown.most_common(8)},
        "other_share": unknown.total() / max(total, 1),
    }


def _category(frames: list[str]) -> str | None:
    for frame in reversed(frames):
        for name, pattern in _COMPILED:
            if pattern.search(frame):
                return name
    return None
