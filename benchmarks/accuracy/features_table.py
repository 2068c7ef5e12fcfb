"""The section of ``docs/benchmarks.md`` on students that were trained without labels."""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.accuracy import features

_READING = """\
Columns are top-1 in percent on 4,000 validation images: of the 20 nearest neighbours among the
4,000 training images, and of a logistic regression on their frozen features (`scalekd evaluate
--knn-split … --linear-probe …`); mean ± standard deviation where there are several seeds. With
another 4,000 images a score would change by about 0.8 points. CPU seconds are those of training
with one thread; the cache (12,000 views of the teacher) is not included. The student without a
teacher saw fresh views; rates were not tuned for any row.
"""


def features_section(results: Path, images: Path) -> str:
    """Markdown; empty before the first result."""
    del images
    path = results / "features.jsonl"
    if not path.exists():
        return ""
    rows: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in features.ARMS}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        rows[row["arm"]].append(row)
    text = " ".join((features.__doc__ or "").split("\n\n")[2].split())
    table = [
        "| student | neighbours, % | linear probe, % | views | CPU s | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(_line(name, group) for name, group in rows.items() if group),
    ]
    return "\n".join(
        [
            "## Without labels\n",
            f"{text}\n",
            _READING,
            *table,
            "",
            "```sh\npython -m benchmarks.accuracy.features --seeds 3\n```\n",
        ]
    )


def _line(name: str, group: list[dict[str, Any]]) -> str:
    seconds = statistics.median(row["train_cpu_seconds"] for row in group)
    return (
        f"| {name} | {_mean(group, 'knn_top1')} | {_mean(group, 'linear_top1')} | "
        f"{group[0]['views']:,} | {seconds:,.0f} | {len(group)} |"
    )


def _mean(group: list[dict[str, Any]], column: str) -> str:
    values = [row[column] for row in group]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
