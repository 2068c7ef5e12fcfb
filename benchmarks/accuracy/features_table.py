"""The section of ``docs/benchmarks.md`` on students that were trained without labels."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import features

_READING = """\
Columns are top-1 in percent on 4,000 validation images: of the 20 nearest neighbours among the
4,000 labelled images, of a logistic regression on their frozen features (`scalekd evaluate
--knn-split … --linear-probe …`), and of the student's own classifier; mean ± standard deviation
where there are several seeds. With another 4,000 images a score would change by about 0.8 points.
CPU seconds are those of training with one thread on a machine that did other work, which made equal
runs differ by up to a half; the caches are not included. A student without a teacher sees fresh
views. The summary is the contrast, which is the default, or the direction of the class token (see
[training](training.md#objectives)). Settings were chosen on these validation images.
"""

_COLUMNS = {
    "knn_top1": "neighbours, %",
    "linear_top1": "linear probe, %",
    "top1": "classifier, %",
}

_TITLES = {
    "short": "### Short runs: the form of the losses",
    "long": "### Long runs",
    "tuned": (
        "### A teacher that was fine-tuned on these classes\n\n"
        "The ViT-S was fine-tuned on 50,000 labelled images, which include the training images; the"
        " students see its features only. Long runs, with one cached pass."
    ),
    "few": (
        "### Fine-tuning with few labels\n\n"
        "Students see about 12,000 views of the labelled images, or a stated multiple, at a rate of"
        " 1.5e-3 where no other is stated, and start from random weights or from a student of the"
        " long runs. From random weights, 6 times the views take the CPU time of pre-training on"
        " 60,000 views and fine-tuning, and 18 times that of 240,000 and fine-tuning."
    ),
}


def features_section(results: Path, images: Path) -> str:
    """Markdown; empty before the first result."""
    del images
    path = results / "features.jsonl"
    if not path.exists():
        return ""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {
        (arm.table, arm.name): [] for arm in features.ARMS
    }
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups[row["table"], row["arm"]].append(row)
    text = " ".join((features.__doc__ or "").split("\n\n")[2].split())
    return "\n".join(
        [
            "## Without labels\n",
            f"{text}\n",
            _READING,
            *(part for table in _TITLES for part in _table(table, groups)),
            "```sh\npython -m benchmarks.accuracy.features --seeds 3\n```\n",
        ]
    )


def _table(table: str, groups: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> list[str]:
    measured = {name: rows for (of, name), rows in groups.items() if of == table and rows}
    if not measured:
        return []
    every = [row for rows in measured.values() for row in rows]
    columns = [column for column in _COLUMNS if any(column in row for row in every)]
    lines = [_line(name, rows, columns) for name, rows in measured.items()]
    titles = ["student", *(_COLUMNS[column] for column in columns), "views", "CPU s", "seeds"]
    return [
        f"{_TITLES[table]}\n",
        f"| {' | '.join(titles)} |",
        f"| --- |{' ---: |' * (len(titles) - 1)}",
        *lines,
        "",
    ]


def _line(name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    scores = " | ".join(_mean(rows, column) for column in columns)
    seconds = statistics.median(row["train_cpu_seconds"] for row in rows)
    return f"| {name} | {scores} | {rows[0]['views']:,} | {seconds:,.0f} | {len(rows)} |"


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    values = [row[column] for row in rows if column in row]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
