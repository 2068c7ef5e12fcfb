"""The section of ``docs/benchmarks.md`` on transfer to other classes."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.transfer import setting

_REFERENCE = "no teacher"
_MEASURES = {
    "frozen_object_miou": "segmentation, frozen, mIoU",
    "fine_tuned_object_miou": "fine-tuned, mIoU",
    "linear_top1": "linear probe, %",
    "knn_top1": "neighbours, %",
    "own_top1": "own classes, %",
}
_READING = """\
Scores are in percent: mean ± standard deviation over the seeds of weights, order, decoder and
fine-tuning. In brackets is the difference from the student without a teacher, computed per seed.
Scenes and images of the test are the same for every seed; with others, a score of the linear probe
would change by about a point, and gains by less. CPU seconds are those of pre-training with one
thread; those of the teacher are not included. The task was chosen with seed 0, which is not
reported, on other images than those of the test. *Own classes* is top-1 on 2,395 validation images
of the six classes.
"""


def transfer_section(results: Path, images: Path) -> str:
    """Markdown; empty before the first result."""
    del images
    path = results / "transfer.jsonl"
    if not path.exists():
        return ""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = (setting.__doc__ or "").split("\n\n", 1)[1]
    return "\n".join(
        [
            "## Transfer to other classes\n",
            text,
            _READING,
            *table(rows),
            "",
            "```sh\npython -m benchmarks.transfer\n```\n",
        ]
    )


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table: one line an arm, in the order of the arms."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {arm.name: {} for arm in setting.ARMS}
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    head = ["student", "teacher", *_MEASURES.values(), "views", "CPU s", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    reference = by_arm[_REFERENCE]
    for arm in setting.ARMS:
        found = by_arm[arm.name]
        if not found:
            continue
        compared = arm.name != _REFERENCE and arm.objective != "teacher"
        cells = [_cell(found, reference if compared else {}, m) for m in _MEASURES]
        seconds = statistics.median(row["train_cpu_seconds"] for row in found.values())
        views = next(iter(found.values()))["views"]
        line = [arm.name, arm.teacher, *cells, f"{views:,}", f"{seconds:.0f}", str(len(found))]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _cell(
    found: Mapping[int, Mapping[str, Any]],
    reference: Mapping[int, Mapping[str, Any]],
    measure: str,
) -> str:
    values = {seed: row.get(measure) for seed, row in found.items()}
    if None in values.values():
        return ""
    score = _mean(list(values.values()))
    gains = [
        value - reference[seed][measure] for seed, value in values.items() if seed in reference
    ]
    return score + (f" ({_mean(gains, sign='+')})" if gains else "")


def _mean(values: Sequence[float], *, sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"
