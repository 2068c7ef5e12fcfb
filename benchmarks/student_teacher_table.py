"""Every student of the paper on every kind of teacher: one step at 224 px, its memory and work.

    python -m benchmarks.student_teacher_table --images ../shared/data/imagenet-sample --json

One cache a teacher is written by ``scalekd cache-teacher --no-pretrained`` from four photographs;
every row is then a process of its own, so that its peak memory is its own. Time is that of the
processor, on one thread, which a busy machine disturbs less than the clock on the wall.
"""

import argparse
import copy
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scalekd.distillation import FullLogits, Targets
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.training import CachedTeacher, DistillationModule

RESULTS = Path(__file__).parent / "results" / "student_teacher_table.json"
TEACHERS = {"swin_l": "swin_l", "beit_l": "beit_l", "vit_l14": "vit_l14"}
"""Name of a row to model; ``vit_l14`` has 16 x 16 tokens, which no student's grid divides."""
STUDENTS = (
    "mobilenetv1_100",
    "resnet50",
    "resnet50d",
    "convnext_tiny",
    "mixer_s16_224",
    "mixer_b16_224",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "vit_base_patch16_224",
)
NUM_IMAGES = 4
IMG_SIZE = 224
BATCH_SIZE = 2  # batch norm needs two


def write_images(folder: Path, photographs: Sequence[Path]) -> Path:
    """Write an image folder with one class per photograph, from the first few by name."""
    for path in sorted(photographs)[:NUM_IMAGES]:
        class_folder = folder / "train" / path.name.split("_")[0]
        class_folder.mkdir(parents=True)
        shutil.copy(path, class_folder)
    return folder


def write_cache(
    teacher: str, images: Path, output: Path, *, model_kwargs: Iterable[str] = ()
) -> Path:
    """A real cache of a teacher with random weights, by the command that users give."""
    options = [f"--model-kwargs={argument}" for argument in model_kwargs]
    command = [sys.executable, "-m", "scalekd", "cache-teacher", f"--model={TEACHERS[teacher]}"]
    command += ["--no-pretrained", f"--data-dir={images}", f"--output={output}", *options]
    command += ["--aug=crop+flip", "--codec=int8", f"-b{BATCH_SIZE}", "-j0"]
    subprocess.run(command, check=True, capture_output=True)
    return output


def one_step(
    cache: Path, images: Path, student: str, *, batch_size: int = BATCH_SIZE
) -> dict[str, Any]:
    """Train a student for one step from a cache, and say what it cost.

    Raises:
        ArithmeticError: A loss or gradient is not finite, or a parameter's is missing or zero.
    """
    torch.manual_seed(0)
    teacher = CachedTeacher(cache, data_dir=images, num_classes=1000)
    built = create_student(student, num_classes=teacher.num_classes, img_size=IMG_SIZE)
    _undo_zeros(built)
    module = teacher.module(built)
    targets = teacher.targets(module.objective)
    batch = next(iter(teacher.loader(built, targets, batch_size=batch_size)))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    started = time.process_time()
    said = targets(batch)
    losses, _ = module(batch["pixels"], batch["label"], said)
    losses["total"].backward()
    optimizer.step()
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _check(losses, module)
    return {
        "student": student,
        "tokens": {
            "student": [level.num_patch_tokens for level in built.spec.levels],
            "teacher": [teacher.spec.stages[stage].num_patch_tokens for stage in (3, 4)],
        },
        "batch_size": batch_size,
        "losses": {name: round(loss.item(), 4) for name, loss in losses.items()},
        "parameters": {
            "student": sum(p.numel() for p in module.student.parameters()),
            "projectors": sum(p.numel() for p in module.objective.parameters()),
        },
        "step_gflop_per_image": _gflop_per_image(module, batch, said),
        "step_cpu_seconds_per_image": round(seconds / batch_size, 2),
        "peak_memory_bytes": peak,
    }


def _undo_zeros(student: nn.Module) -> None:
    """Heads and residual branches may start at zero, which hides whatever lies behind them."""
    with torch.no_grad():
        for parameter in student.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01)


def _check(losses: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    wrong = [name for name, loss in losses.items() if not torch.isfinite(loss)]
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if gradient is None or not torch.isfinite(gradient).all() or not gradient.any():
            wrong.append(name)
    if wrong:
        raise ArithmeticError(f"not finite, or without gradient: {', '.join(wrong)}")


def _gflop_per_image(
    module: DistillationModule, batch: Mapping[str, torch.Tensor], targets: Targets
) -> dict[str, float]:
    """Of forward and backward, by shapes alone: on the meta device nothing is computed."""
    shadow = copy.deepcopy(module).to("meta")
    shadow.zero_grad()
    pixels, labels = (batch[name].to("meta") for name in ("pixels", "label"))
    with FlopCounterMode(display=False) as whole:
        said = Targets(
            features=targets.features.to("meta"),
            logits=FullLogits(targets.logits.logits.to("meta")),
        )
        shadow(pixels, labels, said).losses["total"].backward()
    with FlopCounterMode(display=False) as alone:
        logits, levels = shadow.student(shadow.normalise(pixels))
        (logits.sum() + sum(level.sum() for level in levels)).backward()
    counts = {
        "total": whole.get_total_flops(),
        "student": alone.get_total_flops(),
        "tail": sum(whole.get_flop_counts()["Tail"].values()),
    }
    counts["projectors"] = counts["total"] - counts["student"] - counts["tail"]
    return {name: round(flops / len(labels) / 1e9, 2) for name, flops in counts.items()}


def teacher_gflop(teacher: str) -> float:
    """Of one forward of one image."""
    built = load_teacher(TeacherConfig(model=TEACHERS[teacher], pretrained=False)).to("meta")
    pixels = torch.zeros((1, 3, *built.spec.img_size), dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(pixels)
    return round(counter.get_total_flops() / 1e9, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--row", nargs=2, metavar=("CACHE", "STUDENT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.row:
        print(json.dumps(one_step(Path(options.row[0]), options.images, options.row[1])))
        return
    rows, forward = [], {}
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder) / "images", list(options.images.glob("*.JPEG")))
        for teacher in TEACHERS:
            cache = write_cache(teacher, images, Path(folder) / teacher)
            forward[teacher] = teacher_gflop(teacher)
            for student in STUDENTS:
                command = [sys.executable, "-m", "benchmarks.student_teacher_table"]
                command += [f"--images={images}", "--row", str(cache), student]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"teacher": teacher, **json.loads(done.stdout)})
                print(_line(rows[-1]), flush=True)
            shutil.rmtree(cache)
    result = {
        "torch": torch.__version__,
        "threads": 1,
        "img_size": IMG_SIZE,
        "teacher_forward_gflop_per_image": forward,
        "rows": rows,
    }
    if options.json:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['teacher']:8} {row['student']:30} {row['peak_memory_bytes'] / 1e9:5.1f} GB "
        f"{row['step_cpu_seconds_per_image']:6.1f} s {row['step_gflop_per_image']}"
    )


if __name__ == "__main__":
    main()
