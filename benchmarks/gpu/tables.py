"""The GPU part of ``docs/benchmarks.md``, made from the results alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_BEFORE = "gpu-h200-before.jsonl"  # of a form of its own, from before this package
_AFTER = "gpu-h200-after.jsonl"


def gpu_section(results: Path, images: Path) -> str:
    """Markdown of every ``gpu-*.jsonl`` in the folder of results; nothing where there is none."""
    del images
    runs = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(results.glob("gpu-*.jsonl"))
    }
    parts = []
    if _BEFORE in runs and _AFTER in runs:
        parts.append(_compared(runs.pop(_BEFORE), runs[_AFTER]))
    parts += [markdown(lines, name.removesuffix(".jsonl")) for name, lines in runs.items()]
    if not parts:
        return "## On a GPU\n\nNot measured on a GPU.\n"
    return "\n\n".join(["## On a GPU", *parts]) + "\n"


def markdown(lines: Sequence[Line], name: str) -> str:
    """Format one run of ``python -m benchmarks.gpu``."""
    by_part = {(line["section"], line.get("part")): line for line in lines}
    machine = by_part.get(("machine", None), {})
    environment = machine.get("environment", {})
    facts = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "device")
    parts = [f"### {environment.get('device', f'All figures of `{name}`')}"]
    if machine:
        parts.append(f"*`python -m benchmarks.gpu`, {machine['cores']} cores; {facts}.*")
    rows = _caching_rows(lines)
    if rows:
        head = ["Swin-L, random weights, 224 px", "views/s", "over the bare teacher"]
        parts.append(_table([*head, "processor ms per view"], rows))
    rows = [
        [
            f"{line['part']}, batch {line['batch']}",
            f"{line['milliseconds']:.2f}",
            f"{line['views_per_second']:,}",
            f"{100 * line['different']['coefficients']:.4f} %",
            f"{100 * line['error_of_the_device']:.3f} %",
            f"{100 * line['error_of_the_codec']:.3f} %",
        ]
        for line in lines
        if line["section"] == "encoding" and "milliseconds_from_bf16" in line
    ]
    if rows:
        head = ["encoding on the device", "ms", "views/s", "integers that differ from NumPy's"]
        parts.append(_table([*head, "error", "error of NumPy's"], rows))
    rows = [
        [
            f"{line['student']}, {line.get('objective', 'bare step')}"
            f"{' (first epoch)' * line['part'].startswith('first epoch')}",
            f"{line['images_per_second']:,}",
            _ratio(line.get("over_bare")),
            f"{100 * line['data_wait_share']:.1f} %" if "data_wait_share" in line else "",
        ]
        for line in lines
        if line["section"] == "training" and "images_per_second" in line
    ]
    if rows:
        head = ["training, bf16, from JPEG files", "images/s", "over the bare step"]
        parts.append(_table([*head, "waiting for data"], rows))
    again = by_part.get(("checks", "written again"))
    if again and "files" in again:
        parts.append(
            f"A small cache written twice: {again['different']} of {again['files']} files differ."
        )
    failed = [line for line in lines if "failed" in line or line.get("code", 0) != 0]
    if failed:
        names = (line.get("part") or line.get("done") or line["section"] for line in failed)
        parts.append(f"Some measurements failed or ran out of time: {', '.join(names)}.")
    return "\n\n".join(parts)


def _caching_rows(lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    bare = None
    for line in lines:
        if line["section"] != "caching" or "views_per_second" not in line:
            continue
        rate = line["views_per_second"]
        stages = " and ".join(map(str, line.get("stages", ())))
        if line["part"] == "teacher":
            bare = bare or rate
            name = f"bare teacher, {line['precision']}, batch {line['batch']}"
            rows.append([name, f"{rate:,}", "", ""])
        elif line["part"] == "stream":
            cost = f"{line['main_thread_ms_a_view']:.2f} (one thread)"
            over = _ratio(bare / rate if bare else None)
            rows.append([f"to planes on the host, stages {stages}", f"{rate:,}", over, cost])
        else:
            cost = f"{line['processor_ms_a_view']:.2f}"
            name = f"`cache-teacher` from JPEG files, stages {stages}"
            rows.append([name, f"{rate:,}", _ratio(line["over_bare"]), cost])
    return rows


def _compared(before: Sequence[Line], after: Sequence[Line]) -> str:
    """One H200, before and after stage one encoded on the device and updates stopped waiting."""
    teacher = {line["what"]: line for line in before if line.get("part") == "teacher"}
    drafts = {line["stage"]: line for line in before if line["section"] == "device_encode"}
    steps = {
        (line["student"], line["objective"]): line
        for line in before
        if line["section"] == "step" and line.get("channels_last") and "objective" in line
    }
    found = {
        (line["part"], str(line.get("stages", line.get("objective", line.get("precision", ""))))): (
            line
        )
        for line in after
        if "part" in line
    }

    def rate(part: str, kind: str = "") -> str:
        line = found[part, kind]
        return f"{line.get('views_per_second', line.get('images_per_second')):,}"

    encoded = {stage: found[f"stage {stage}", ""]["views_per_second"] for stage in (3, 4)}
    end = {stages: found["end to end", stages] for stages in ("[4]", "[3, 4]")}
    trained = found["train-student", "none"]
    bare = teacher["bf16 b128"]
    first = found["first epoch, from its progress line", "scalekd"]["images_per_second"]
    rows = [
        [
            "bare teacher, bf16, batch 128, views/s",
            f"{bare['images_s']:,}",
            rate("teacher", "bf16"),
        ],
        [
            "the same with its results on the host, both stages",
            f"{bare['images_s_with_copies']:,} (features)",
            f"{rate('stream', '[3, 4]')} (encoded)",
        ],
        *(
            [
                f"encoder of stage {stage}, views/s",
                f"{drafts[stage]['graph_views_s']:,} (draft, CUDA graph)",
                f"{encoded[stage]:,}",
            ]
            for stage in (4, 3)
        ),
        [
            "`cache-teacher` from JPEG files, final stage, views/s",
            "155 (progress lines, interrupted)",
            f"{rate('end to end', '[4]')} ({end['[4]']['over_bare']:.2f} × the teacher's time)",
        ],
        [
            "the same, both stages",
            "not measured",
            f"{rate('end to end', '[3, 4]')} ({end['[3, 4]']['over_bare']:.2f} ×)",
        ],
        [
            "bare ResNet-50 step, channels-last, batch 256, images/s",
            f"{steps['resnet50', 'none']['none']['images_s']:,}",
            rate("bare step"),
        ],
        [
            "`train-student --objective none` from JPEG files, images/s",
            "not measured",
            f"{rate('train-student', 'none')} ({trained['over_bare']:.2f} × the bare step's time,"
            f" {100 * trained['data_wait_share']:.0f} % waiting for data)",
        ],
        [
            "published ScaleKD step, ResNet-50, images/s",
            f"{steps['resnet50', 'scalekd']['cached']['images_s']:,} (step alone)",
            f"{first:,} (first epoch; then the time of the run ended)",
        ],
    ]
    trellis = found["trellis", ""]
    return (
        "### NVIDIA H200, before and after\n\nOne H200, 16 cores; Swin-L with random weights at 224"
        " px. *Before*: features encoded on the host, copies through pageable memory, an update"
        " that reads the device. *After*: features encoded on the device, pinned copies on a side"
        f" stream, updates read once a log line. None of the {trellis['paths']:,} paths, and no"
        " integer of a stage, differs from those of the NumPy encoder; the trellis search as one"
        f" Triton kernel takes {trellis['milliseconds']['search']:.3f} ms per batch, step by step"
        f" {trellis['milliseconds']['stepwise']:.0f} ms.\n\n"
        + _table(["", "before", "after"], rows)
        + "\n\nWith both stages, caching missed the goal of 1.05 ×, most likely because only"
        " four blocks could be in memory: a thread takes about 0.8 s to compress and write"
        " a block, while the teacher produces seven a second. The simulation under"
        " *Scheduling* reproduces this (1.38 ×) and, with a block per thread, gives 1.02"
        " ×. This, `--embed pixels`, which removes the decoding that training waited for,"
        " and the ScaleKD step were not measured again on a GPU."
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
