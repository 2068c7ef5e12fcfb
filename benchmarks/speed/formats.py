"""Compares this cache with other formats for the same float16 features and logits.

The payload is the output of a ViT-S/14 for CIFAR-10 views (65 x 384 features, 10 logits). Every
format is written and read in separate processes, which take turns; files are in the page cache.
Writers of other formats do not wait for the disk; scalekd syncs every file. scalekd also checks
SHA-256 and crc32c of everything that it reads. Integers of the transform codec become features on
the training device; the cost of that on a CPU is listed separately.

mosaicml-streaming 0.13 needs NumPy below 2.2 and xxhash below 4, so it uses a separate
environment (built by ``make bench-speed``); without that environment it is left out.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.speed import _inputs
from benchmarks.speed._formats import FORMS
from benchmarks.speed._measure import Settings
from scalekd.cache import TargetDecoder, open_cache
from scalekd.images import open_dataset
from scalekd.loading.drawing import DrawnViews, DrawRequest
from scalekd.pipelines._write_shards import run_teacher
from scalekd.teachers import load_teacher
from scalekd.views import ViewPolicy

_MOSAIC = "mosaicml-streaming"
_MOSAIC_PYTHON = Path(__file__).parents[2] / "build" / "mosaicml-streaming" / "bin" / "python"


def run(settings: Settings) -> dict[str, Any]:
    payload = _payload(settings)
    folder = settings.work / "formats"
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMS}
    left_out: dict[str, str] = {}
    for turn in range(1 if settings.quick else 5):
        for name in FORMS:
            if name in left_out:
                continue
            try:
                found[name].append(_child(name, payload, folder / name.split(",")[0], turn == 0))
            except FileNotFoundError as error:
                left_out[name] = str(error)
    decode = _decode_us(folder / "scalekd transform")
    shutil.rmtree(folder)
    rows = [_row(name, turns) for name, turns in found.items() if turns]
    return {"forms": rows, "left_out": left_out, "transform_to_features_cpu_us": decode}


def _payload(settings: Settings) -> Path:
    """Compute the teacher's outputs for CIFAR-10 views in half precision, in one file."""
    path = settings.work / "payload.npz"
    if path.exists():
        return path
    config = _inputs.cifar_config(settings)
    teacher = load_teacher(config.teacher)
    images = open_dataset(config.data_dir).limited(768 if settings.quick else 4096)
    views = DrawnViews(images, ViewPolicy.parse(config.aug), 0, teacher.spec.img_size)
    features, logits = [], []
    for first in range(0, len(images), 64):
        batch = views.draw(DrawRequest(0, 0, range(first, min(first + 64, len(images)))))
        output = run_teacher(teacher, batch.pixels, config.precision)
        features.append(output.features[4].astype(np.float16))
        logits.append(np.asarray(output.logits, np.float16))
    np.savez(path, features=np.concatenate(features), logits=np.concatenate(logits))
    return path


def _child(name: str, payload: Path, root: Path, write: bool) -> dict[str, Any]:
    python = Path(sys.executable)
    if name == _MOSAIC:
        python = Path(os.environ.get("MOSAICML_PYTHON", _MOSAIC_PYTHON))
        if not python.exists():
            raise FileNotFoundError(f"no environment with it at {python.parents[1].name}")
    arguments = ["--form", name, "--payload", str(payload), "--root", str(root)]
    command = [str(python), "-m", "benchmarks.speed._formats_child", *arguments]
    result = subprocess.run(
        command + ["--write"] * write, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr.strip()[-800:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _row(name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "form": name,
        **{key: turns[0][key] for key in ("bytes_per_view", "files", "write")},
        "open_seconds": statistics.median(turn["open_seconds"] for turn in turns),
    }
    for order in ("sequential", "shuffled", "random"):
        if order in turns[0]:
            row[order] = {
                key: statistics.median(turn[order][key] for turn in turns)
                for key in ("wall_us", "cpu_us")
            }
    return row


def _decode_us(root: Path) -> float:
    """From the stored integers to float32 features on this processor, a view."""
    reader = open_cache(root)
    decoder = TargetDecoder(reader.codecs, features=True, logits=False)
    names = [f"stage4/{plane.name}" for plane in reader.codecs.stages[4].planes]
    first, count = reader.blocks()[0]
    rows = reader.read_rows(0, first, count, names)
    batch = {name.replace("/", "."): torch.from_numpy(rows[name]) for name in names}
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            started = time.process_time()
            decoder(batch)
            seconds.append(time.process_time() - started)
    return 1e6 * statistics.median(seconds[1:]) / count
