"""Time, disk, bandwidth and memory of both stages, from one GPU to 64: tables of ``docs/scale.md``.

    python -m benchmarks.cost_model                          # prints the tables
    python -m benchmarks.cost_model --gpu-speed 0.3          # for a slower GPU than that measured
    python -m benchmarks.cost_model --write                  # puts them into the document
    python -m benchmarks.cost_model --measure --images DIR   # takes the measured inputs again

Rates and sizes are measured here or read from other results in ``benchmarks/results``; the rest is
assumed, and an option. Time is that of ``scalekd cache-teacher --dry-run``: the slowest of GPU,
cores (which drawing and coding share) and disk, with calibration before and the last block after.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import _cost_inputs
from benchmarks._cost_inputs import AUGMENTATION, CALIBRATION_VIEWS, STUDENT, TEACHER
from scalekd.pipelines._probe import Disk, Probe
from scalekd.pipelines.estimate import Host
from scalekd.views import ViewPolicy, view_columns

_RESULTS = Path(__file__).parent / "results"
_MEASURED = _RESULTS / "cost_model.json"
_DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
_START, _END = "<!-- cost model -->\n", "<!-- end of cost model -->"
DATA_SETS = {"ImageNet-1K": 1_281_167, "ImageNet-22K": 14_197_122}
GPUS = (1, 8, 16, 64)
_BLOCK_SIZE, _SHARD_SIZE = 256, 4096
_FINAL = (4,)
_BOTH = (3, 4)
_LOGITS_FILES = 1
_STAGE_FILES = 2  # coefficients and gains


@dataclass(frozen=True)
class Assumed:
    """What was not measured.

    Attributes:
        gpu_speed: Speed of a GPU, relative to the measured one.
        cores_per_gpu: Host cores per GPU.
        disk_gigabytes_per_second: What all processes together write.
        file_seconds: Seconds to create, sync and rename a file.
        image_bytes: Mean size of an encoded image.
        passes: Number of passes of the cache.
        epochs: Number of epochs of a student.
        batch_size: Views per GPU.
    """

    gpu_speed: float = 1.0
    cores_per_gpu: int = 16
    disk_gigabytes_per_second: float = 2.0
    file_seconds: float = 0.005
    image_bytes: int = 110_000
    passes: int = 8
    epochs: int = 100
    batch_size: int = 128


@dataclass(frozen=True)
class Measured:
    """What was measured, for one view of the teacher and student above.

    Attributes:
        stage_bytes: Bytes of stage 3 and 4 at 1 % error.
        coding_seconds: Core seconds to compress and write each stage, which the GPU encodes.
        fit_seconds: Core seconds to fit the codec of each stage, once per cache.
        rest_bytes: Logits (float16) and view parameters.
        view_seconds: Core seconds to decode, crop and augment an image.
        encoded_seconds: GPU seconds of the teacher's forward and the encoding of the final stage,
            and of both stages.
        teacher_seconds: GPU seconds of the teacher's forward.
        step_seconds: GPU seconds of a training step with the published objective.
        activation_bytes: Kept for the backward pass, float32.
        state_bytes: Parameters, gradients and AdamW's averages, and the frozen tail.
        block_bytes: One view's targets as a loader keeps them: final stage and logits.
        sample_bytes: Bytes per sample in the indices of image set and cache.
    """

    stage_bytes: tuple[float, float]
    coding_seconds: tuple[float, float]
    fit_seconds: tuple[float, float]
    rest_bytes: float
    view_seconds: float
    encoded_seconds: tuple[float, float]
    teacher_seconds: float
    step_seconds: float
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
        values = own["stage_values"]
        trained = row["parameters"]["student"] + row["parameters"]["projectors"]
        host = json.loads((_RESULTS / "speed-quick.json").read_text())["encoding"]["host"]
        before, after = _lines("gpu-h200-before"), _lines("gpu-h200-after")
        step = _line(before, section="step", student=STUDENT, objective="scalekd")["cached"]
        teacher = _line(after, part="teacher", precision="bf16")
        return cls(
            stage_bytes=tuple(
                n * _bits_per_value(name) / 8
                for n, name in zip(values, ("mid", "final"), strict=True)
            ),
            coding_seconds=tuple(host[f"stage {stage}"]["cpu_us"] / 1e6 for stage in _BOTH),
            fit_seconds=tuple(own["fit_seconds"]),
            rest_bytes=2.0 * own["num_classes"] + own["view_parameter_bytes"],
            view_seconds=own["view_cpu_seconds"],
            encoded_seconds=tuple(
                1 / _line(after, part="stream", stages=list(stages))["views_per_second"]
                for stages in (_FINAL, _BOTH)
            ),
            teacher_seconds=1 / teacher["views_per_second"],
            step_seconds=1 / step["images_s"],
            activation_bytes=own["activation_bytes_per_image"],
            state_bytes=16.0 * trained + 4.0 * own["tail_parameters"],
            block_bytes=2.0 * values[1] + 2.0 * own["num_classes"],
            sample_bytes=own["index_bytes_per_sample"],
        )

    def probe(self, assumed: Assumed, stages: tuple[int, ...]) -> Probe:
        """Cost of a view of a cache with these stages, as ``--dry-run`` would measure it."""
        chosen = [index for index, stage in enumerate(_BOTH) if stage in stages]
        columns = len(view_columns(ViewPolicy.parse(AUGMENTATION))) + 1
        return Probe(
            teacher_seconds=self.encoded_seconds[len(chosen) - 1] / assumed.gpu_speed,
            draw_seconds=self.view_seconds,
            coding_seconds=sum(self.coding_seconds[index] for index in chosen),
            target_bytes=sum(self.stage_bytes[index] for index in chosen) + self.rest_bytes,
            student_seconds=self.step_seconds / assumed.gpu_speed,
            block_size=_BLOCK_SIZE,
            block_files=len(chosen) * _STAGE_FILES + _LOGITS_FILES,
            shard_size=_SHARD_SIZE,
            shard_files=1 + columns,
        )


def _lines(name: str) -> list[dict[str, Any]]:
    text = (_RESULTS / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _line(lines: list[dict[str, Any]], **values: Any) -> dict[str, Any]:
    """Return the first line that has these values."""
    return next(line for line in lines if all(line.get(n) == v for n, v in values.items()))


def _bits_per_value(name: str) -> float:
    rows = json.loads((_RESULTS / f"codecs-{name}.json").read_text())["rows"]
    row = next(r for r in rows if (r["codec"], r["target"]) == ("transform", 0.01))
    return float(row["bits_per_value"])


def tables(measured: Measured, assumed: Assumed) -> str:
    """The document's tables, as Markdown."""
    return "\n".join([*_disk(measured, assumed), "", *_time(measured, assumed), ""]) + "\n".join(
        ["", *_memory(measured, assumed), ""]
    )


def _disk(m: Measured, a: Assumed) -> list[str]:
    whole, lean = m.probe(a, _BOTH), m.probe(a, _FINAL)
    columns = [column for s in DATA_SETS for column in (f"{s}, one pass", f"{a.passes} passes")]
    lines = [
        f"| disk | per view | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * (1 + 2 * len(DATA_SETS)),
    ]
    for name, size in (
        ("`--stages 3,4`, the default", whole.bytes_per_view),
        ("`--stages final`", lean.bytes_per_view),
        ("the images themselves (assumed)", a.image_bytes),
    ):
        passes = 1 if size == a.image_bytes else a.passes
        cells = [
            cell
            for n in DATA_SETS.values()
            for cell in (_size(n * size), "" if passes == 1 else _size(n * size * passes))
        ]
        lines.append(f"| {name} | {_size(size)} | {' | '.join(cells)} |")
    cells = [
        f"{probe.num_files(n, passes):,}"
        for n in DATA_SETS.values()
        for probe, passes in ((whole, 1), (whole, a.passes))
    ]
    return [*lines, f"| files, `--stages 3,4` | | {' | '.join(cells)} |"]


def _host(a: Assumed) -> Host:
    """The host of one GPU, with the product's numbers of workers and threads."""
    return Host(
        num_cores=a.cores_per_gpu,
        num_workers=min(max(2, a.cores_per_gpu - 2), 16),
        num_coding_threads=min(max(2, a.cores_per_gpu - 1), 16),
        teacher_threads=0,
    )


@dataclass(frozen=True)
class _Seconds:
    """Seconds of both stages on a number of GPUs, for one data set."""

    cache: float
    student: float
    live: float

    @classmethod
    def of(
        cls, m: Measured, a: Assumed, stages: tuple[int, ...], samples: int, gpus: int
    ) -> "_Seconds":
        probe, host = m.probe(a, stages), _host(a)
        disk = Disk(a.disk_gigabytes_per_second * 1e9 / gpus, a.file_seconds)
        fits = [m.fit_seconds[_BOTH.index(stage)] for stage in stages]
        calibration = host.calibration_seconds(probe, CALIBRATION_VIEWS) / gpus + (
            sum(fits) if gpus == 1 else max(fits)
        )
        views = samples / gpus
        bare = replace(probe, teacher_seconds=m.teacher_seconds / a.gpu_speed)
        return cls(
            cache=calibration
            + a.passes * views * host.seconds_per_view(probe, disk)
            + host.drain_seconds(probe, disk),
            student=a.epochs * views * host.training_seconds(bare, live=False),
            live=a.epochs * views * host.training_seconds(bare, live=True),
        )

    def break_even(self, epochs: int) -> str:
        """Return the epochs after which the cache has cost less time than the live teacher."""
        saved = (self.live - self.student) / epochs
        return f"{_number(self.cache / saved)} epochs" if saved > 0 else "never"


def _time(m: Measured, a: Assumed) -> list[str]:
    lines = [
        "| hours, and GB/s over the network | "
        + " | ".join(f"{g} GPU{'s' * (g > 1)}" for g in GPUS)
        + " |",
        "| --- |" + " ---: |" * len(GPUS),
    ]
    whole, lean = m.probe(a, _BOTH).bytes_per_view, m.probe(a, _FINAL).bytes_per_view
    for data_set, samples in DATA_SETS.items():
        both = [_Seconds.of(m, a, _BOTH, samples, gpus) for gpus in GPUS]
        final = [_Seconds.of(m, a, _FINAL, samples, gpus) for gpus in GPUS]
        for name, seconds, num_bytes in (
            (f"cache, {a.passes} passes", [h.cache for h in both], a.passes * whole),
            (f"cache, {a.passes} passes, final stage", [h.cache for h in final], a.passes * lean),
            (
                f"student, {a.epochs} epochs",
                [h.student for h in both],
                a.epochs * (lean + a.image_bytes),
            ),
            (
                f"the same with the live teacher, {a.epochs} epochs",
                [h.live for h in both],
                a.epochs * a.image_bytes,
            ),
        ):
            cells = [
                f"{_number(s / 3600)} h, {_number(samples * num_bytes / s / 1e9)}" for s in seconds
            ]
            lines.append(f"| {data_set}: {name} | {' | '.join(cells)} |")
        cells = [seconds.break_even(a.epochs) for seconds in both]
        lines.append(f"| {data_set}: the cache has paid for itself after | {' | '.join(cells)} |")
    probe, small = m.probe(a, _BOTH), m.probe(a, _FINAL)
    lines += [
        "",
        "Cores that keep one GPU busy while caching: "
        f"{(probe.coding_seconds + probe.draw_seconds) / probe.teacher_seconds:.0f} with both"
        f" stages, {(small.coding_seconds + small.draw_seconds) / small.teacher_seconds:.0f} with"
        f" the final one; while training: {probe.draw_seconds / probe.student_seconds:.0f}. With"
        " fewer cores, the cores determine the hours above.",
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
        measured = _cost_inputs.measure(sorted(options["images"].glob("*.JPEG")))
        _MEASURED.write_text(json.dumps(measured, indent=1) + "\n")
    text = tables(Measured.read(), Assumed(**{name: options[name] for name in vars(Assumed())}))
    print(text)
    if options["write"]:
        before, rest = _DOCUMENT.read_text().split(_START)
        _DOCUMENT.write_text(f"{before}{_START}{text}{_END}{rest.split(_END)[1]}")


if __name__ == "__main__":
    main()
