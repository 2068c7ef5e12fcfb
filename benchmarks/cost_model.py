"""Time, disk, bandwidth and memory of both stages, from one GPU to 64: tables of ``docs/scale.md``.

    python -m benchmarks.cost_model                          # prints the tables
    python -m benchmarks.cost_model --gpu-tflops 300         # for another GPU
    python -m benchmarks.cost_model --write                  # puts them into the document
    python -m benchmarks.cost_model --measure --images DIR   # takes the measured inputs again

Rates and sizes are measured here or read from other results in ``benchmarks/results``; what no
machine here can tell (a GPU's throughput, above all) is assumed, and an option.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parent / "results"
_MEASURED = _RESULTS / "cost_model.json"
_DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
_START, _END = "<!-- cost model -->\n", "<!-- end of cost model -->"
TEACHER, STUDENT = "swin_l", "resnet50"
DATA_SETS = {"ImageNet-1K": 1_281_167, "ImageNet-22K": 14_197_122}
GPUS = (1, 8, 16, 64)
_AUGMENTATION = "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25"


@dataclass(frozen=True)
class Assumed:
    """What was not measured.

    Attributes:
        gpu_tflops: That a GPU sustains in training and inference, in 10^12 FLOP a second.
        cores_per_gpu: Host cores beside each GPU.
        image_bytes: Mean size of an encoded image.
        passes: Of the cache.
        epochs: Of a student.
        batch_size: Views a GPU.
    """

    gpu_tflops: float = 100.0
    cores_per_gpu: int = 16
    image_bytes: int = 110_000
    passes: int = 8
    epochs: int = 100
    batch_size: int = 128


@dataclass(frozen=True)
class Measured:
    """What was measured, for one view of the teacher and student above.

    Attributes:
        stage_bytes: Bytes of stage 3 and 4 at 1 % error.
        encode_seconds: Core seconds to encode each stage.
        rest_bytes: Logits (float16), view parameters and pixel hash.
        view_seconds: Core seconds to decode, crop and augment an image.
        teacher_gflop: Of one forward.
        step_gflop: Of one training step, forward and backward.
        activation_bytes: Kept for the backward pass, float32.
        state_bytes: Parameters, gradients and AdamW's averages, and the frozen tail.
        block_bytes: One view's targets as a loader keeps them: final stage and logits.
        sample_bytes: Of the indices of image set and cache, a sample.
    """

    stage_bytes: tuple[float, float]
    encode_seconds: tuple[float, float]
    rest_bytes: float
    view_seconds: float
    teacher_gflop: float
    step_gflop: float
    activation_bytes: float
    state_bytes: float
    block_bytes: float
    sample_bytes: float

    @classmethod
    def read(cls) -> "Measured":
        own = json.loads(_MEASURED.read_text())
        table = json.loads((_RESULTS / "student_teacher_table.json").read_text())
        row = next(
            row for row in table["rows"] if (row["teacher"], row["student"]) == (TEACHER, STUDENT)
        )
        codec = [_codec(name) for name in ("mid", "final")]
        values = own["stage_values"]
        trained = row["parameters"]["student"] + row["parameters"]["projectors"]
        return cls(
            stage_bytes=tuple(
                n * c["bits_per_value"] / 8 for n, c in zip(values, codec, strict=True)
            ),
            encode_seconds=tuple(
                n / c["values"] / c["encode_views_per_second"]
                for n, c in zip(values, codec, strict=True)
            ),
            rest_bytes=2.0 * own["num_classes"] + own["view_parameter_bytes"] + 8,
            view_seconds=own["view_cpu_seconds"],
            teacher_gflop=table["teacher_forward_gflop_per_image"][TEACHER],
            step_gflop=row["step_gflop_per_image"]["total"],
            activation_bytes=own["activation_bytes_per_image"],
            state_bytes=16.0 * trained + 4.0 * own["tail_parameters"],
            block_bytes=2.0 * values[1] + 2.0 * own["num_classes"],
            sample_bytes=own["index_bytes_per_sample"],
        )


def _codec(name: str) -> dict[str, float]:
    result = json.loads((_RESULTS / f"codecs-{name}.json").read_text())
    row = next(r for r in result["rows"] if (r["codec"], r["target"]) == ("transform", 0.01))
    shape = result["shape"]
    tokens = shape["grid"][0] * shape["grid"][1]
    return {**row, "values": tokens * shape["num_channels"]}


def tables(measured: Measured, assumed: Assumed) -> str:
    """The document's tables, as Markdown."""
    return "\n".join([*_disk(measured, assumed), "", *_time(measured, assumed), ""]) + "\n".join(
        ["", *_memory(measured, assumed), ""]
    )


def _disk(m: Measured, a: Assumed) -> list[str]:
    whole, lean = sum(m.stage_bytes) + m.rest_bytes, m.stage_bytes[1] + m.rest_bytes
    columns = [column for s in DATA_SETS for column in (f"{s}, one pass", f"{a.passes} passes")]
    lines = [
        f"| disk | per view | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * (1 + 2 * len(DATA_SETS)),
    ]
    for name, size in (
        ("`--stages 3,4`, the default", whole),
        ("`--stages final`", lean),
        ("the images themselves (assumed)", a.image_bytes),
    ):
        passes = 1 if size == a.image_bytes else a.passes
        cells = [
            cell
            for n in DATA_SETS.values()
            for cell in (_size(n * size), "" if passes == 1 else _size(n * size * passes))
        ]
        lines.append(f"| {name} | {_size(size)} | {' | '.join(cells)} |")
    return lines


def _time(m: Measured, a: Assumed) -> list[str]:
    cores, flops = a.cores_per_gpu, a.gpu_tflops * 1e12
    forward, step = m.teacher_gflop * 1e9 / flops, m.step_gflop * 1e9 / flops
    drawing = m.view_seconds / cores
    whole = drawing + sum(m.encode_seconds) / cores
    lean = drawing + m.encode_seconds[1] / cores
    written = sum(m.stage_bytes) + m.rest_bytes
    read = m.stage_bytes[1] + m.rest_bytes + a.image_bytes
    kinds = (
        (f"cache, {a.passes} passes", a.passes, max(forward, whole), written),
        (
            f"cache, {a.passes} passes, final stage",
            a.passes,
            max(forward, lean),
            m.stage_bytes[1] + m.rest_bytes,
        ),
        (f"student, {a.epochs} epochs", a.epochs, max(step, drawing), read),
        (
            f"the same with the live teacher, {a.epochs} epochs",
            a.epochs,
            max(step + forward, drawing),
            float(a.image_bytes),
        ),
    )
    lines = [
        "| hours, and GB/s over the network | "
        + " | ".join(f"{g} GPU{'s' * (g > 1)}" for g in GPUS)
        + " |",
        "| --- |" + " ---: |" * len(GPUS),
    ]
    for data_set, samples in DATA_SETS.items():
        for name, times, seconds, num_bytes in kinds:
            cells = [
                f"{_number(samples * times * seconds / g / 3600)} h, "
                f"{_number(g * num_bytes / seconds / 1e9)}"
                for g in GPUS
            ]
            lines.append(f"| {data_set}: {name} | {' | '.join(cells)} |")
    busy = sum(m.encode_seconds) + m.view_seconds
    lines += [
        "",
        f"Cores that keep one GPU busy while caching: {busy / forward:.0f} with both stages, "
        f"{(m.view_seconds + m.encode_seconds[1]) / forward:.0f} with the final one; while "
        f"training: {m.view_seconds / step:.0f}. With fewer cores, the cores determine the hours "
        "above.",
    ]
    return lines


def _memory(m: Measured, a: Assumed) -> list[str]:
    blocks = 8 * 4 * 256  # lanes x blocks shuffled together x views a block, of each process
    rows = (
        (
            f"GPU, training, {a.batch_size} views: parameters, gradients, AdamW, tail",
            _size(m.state_bytes),
        ),
        ("… activations in float32 (about half in bf16)", _size(a.batch_size * m.activation_bytes)),
        ("host, per training process: blocks of targets, at most", _size(blocks * m.block_bytes)),
        *(
            (f"host, per process: indices of {name}", _size(n * m.sample_bytes))
            for name, n in DATA_SETS.items()
        ),
    )
    return ["| memory | |", "| --- | ---: |", *(f"| {what} | {size} |" for what, size in rows)]


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{_number(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{_number(num_bytes)} TB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def measure(photographs: Sequence[Path]) -> dict[str, Any]:
    """The inputs that no other benchmark takes."""
    import torch

    from scalekd.distillation import FullLogits, ScaleKDObjective, Targets
    from scalekd.images.samples import Sample
    from scalekd.loading.views import draw_view
    from scalekd.students import create_student
    from scalekd.teachers import TeacherConfig, load_teacher
    from scalekd.training import DistillationModule
    from scalekd.views import ViewPolicy

    torch.set_num_threads(1)
    policy = ViewPolicy.parse(_AUGMENTATION)
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
        "augmentation": _AUGMENTATION,
        "view_cpu_seconds": round(seconds, 6),
        "view_parameter_bytes": 11.7,  # docs/LOG.md, 2026-11-22: after Blosc, with RandAugment
        "num_classes": 1000,
        "stage_values": [stages[s].num_patch_tokens * stages[s].num_channels for s in (3, 4)],
        "tail_parameters": sum(p.numel() for p in tail.parameters()),
        "activation_bytes_per_image": kept // batch,
        # Image set: key (24), label, file, offset, size; cache: key, label, hash.
        "index_bytes_per_sample": 24 + 4 + 4 + 8 + 8 + 24 + 4 + 8,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--images", type=Path, help="folder of photographs, for --measure")
    parser.add_argument("--write", action="store_true")
    for name, value in vars(Assumed()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    if options["measure"]:
        measured = measure(sorted(options["images"].glob("*.JPEG")))
        _MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    text = tables(Measured.read(), Assumed(**{name: options[name] for name in vars(Assumed())}))
    print(text)
    if options["write"]:
        before, rest = _DOCUMENT.read_text().split(_START)
        _DOCUMENT.write_text(f"{before}{_START}{text}{_END}{rest.split(_END)[1]}")


if __name__ == "__main__":
    main()
