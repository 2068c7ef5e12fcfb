"""Inputs of the cost model that no other benchmark takes, measured on this machine."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed._inputs import full_rank_features
from scalekd.codecs import fit_codec
from scalekd.distillation import FullLogits, ScaleKDObjective, Targets
from scalekd.images.samples import Sample
from scalekd.loading.views import draw_view
from scalekd.shapes import FeatureShape
from scalekd.students import create_student
from scalekd.teachers import TeacherConfig, load_teacher
from scalekd.threads import one_thread
from scalekd.training import DistillationModule
from scalekd.views import ViewPolicy

TEACHER, STUDENT = "swin_l", "resnet50"
AUGMENTATION = "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25"
CALIBRATION_VIEWS = 6006  # of Swin-L with both stages


def measure(photographs: Sequence[Path]) -> dict[str, Any]:
    """The inputs that no other benchmark takes."""
    torch.set_num_threads(1)
    policy = ViewPolicy.parse(AUGMENTATION)
    samples = [Sample(path.stem, path.read_bytes(), 0) for path in photographs]
    started = time.process_time()
    for sample in samples:
        draw_view(sample, policy, seed=0, pass_index=0, view_size=(224, 224))
    seconds = (time.process_time() - started) / len(samples)

    teacher = load_teacher(TeacherConfig(model=TEACHER, pretrained=False))
    stages, tail = teacher.spec.stages, teacher.tail()
    student = create_student(STUDENT, num_classes=1000, img_size=224)
    objective = ScaleKDObjective(
        student_levels=student.spec.levels, teacher_stages=stages, tail=tail
    )
    module = DistillationModule(student, objective, mean=(0.5,) * 3, std=(0.5,) * 3).to("meta")
    saved: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    batch = 2
    frozen = [*module.parameters(), *module.buffers(), *tail.parameters(), *tail.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in frozen}
    targets = Targets(
        torch.zeros((batch, stages[4].num_patch_tokens, stages[4].num_channels), device="meta"),
        FullLogits(torch.zeros((batch, 1000), device="meta")),
    )
    pixels = torch.zeros((batch, 3, 224, 224), dtype=torch.uint8, device="meta")
    labels = torch.zeros(batch, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(pixels, labels, targets)
    kept = sum(storage.nbytes() for key, storage in saved.items() if key not in own)
    return {
        "teacher": TEACHER,
        "student": STUDENT,
        "photographs": len(samples),
        "augmentation": AUGMENTATION,
        "view_cpu_seconds": round(seconds, 6),
        "fit_seconds": [_fit_seconds(stages[stage]) for stage in (3, 4)],
        "view_parameter_bytes": 11.7,  # docs/LOG.md, 2026-11-22: after Blosc, with RandAugment
        "num_classes": 1000,
        "stage_values": [stages[s].num_patch_tokens * stages[s].num_channels for s in (3, 4)],
        "tail_parameters": sum(p.numel() for p in tail.parameters()),
        "activation_bytes_per_image": kept // batch,
        # Image set: key (24), label, file, offset, size; cache: key, label, hash.
        "index_bytes_per_sample": 24 + 4 + 4 + 8 + 8 + 24 + 4 + 8,
    }


def _fit_seconds(shape: FeatureShape) -> float:
    """Processor seconds to fit the default codec, with one thread, on synthetic features."""
    made = 0.0

    def blocks() -> Iterator[Any]:
        nonlocal made
        for seed in range(CALIBRATION_VIEWS // 64):
            started = time.process_time()
            block = full_rank_features(shape, 64, seed=seed)
            made += time.process_time() - started
            yield block

    started = time.process_time()
    with one_thread():
        fit_codec("transform:error=0.01", shape, blocks())
    return round(time.process_time() - started - made, 1)
