"""The GPU part of ``docs/benchmarks.md``, made from the results alone."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
_BEFORE = "gpu-h200-before.jsonl"  # of a form of its own, from before this package


def gpu_section(results: Path, images: Path) -> str:
    """Markdown of every ``gpu-*.jsonl`` in the folder of results; nothing where there is none."""
    del images
    parts = []
    for path in sorted(results.glob("gpu-*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        parts.append(_before(lines) if path.name == _BEFORE else markdown(lines, path.stem))
    if not parts:
        return "## On a GPU\n\nNot measured on a GPU.\n"
    return "\n\n".join(["## On a GPU", *parts]) + "\n"


def markdown(lines: Sequence[Line], name: str) -> str:
    """Format one run of ``python -m benchmarks.gpu``."""
    by_part = {(line["section"], line.get("part")): line for line in lines}
    machine = by_part.get(("machine", None), {})
    environment = machine.get("environment", {})
    facts = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "device")
    parts = [
        f"### {environment.get('device', name)}",
        f"*`python -m benchmarks.gpu`, {machine.get('cores', '?')} cores; {facts}.*",
    ]
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
            f"{line['student']}, {line.get('objective', 'bare step')}",
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


def _before(lines: Sequence[Line]) -> str:
    """The first run: one H200, before encoding moved to the device."""
    teacher = {line["what"]: line for line in lines if line.get("part") == "teacher"}
    encoded = {line["stage"]: line for line in lines if line["section"] == "device_encode"}
    bare = teacher["bf16 b128"]
    rows = [
        ["bare teacher, bf16, batch 128", f"{bare['images_s']:,}"],
        ["the same, fp32, batch 64", f"{teacher['fp32 b64']['images_s']:,}"],
        ["with copies through pageable memory", f"{bare['images_s_with_copies']:,}"],
        *(
            [f"draft of the device encoder, stage {stage}, as a CUDA graph", f"{rate:,}"]
            for stage, rate in sorted(
                (stage, line["graph_views_s"]) for stage, line in encoded.items()
            )
        ),
    ]
    return (
        "### NVIDIA H200, before features were encoded on the device\n\nSwin-L with random weights"
        " at 224 px, one H200, 16 cores, torch 2.11.0, CUDA 13.0. `cache-teacher` with the final"
        " stage wrote 155 views/s according to its progress lines (the run was interrupted): coding"
        " threads competed for the cores, and copies used pageable memory.\n\n"
        + _table(["", "views/s"], rows)
    )


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
