"""Tables of ``docs/reliability.md``, made from the results in ``benchmarks/results``.

python -m tests.reliability.document
"""

import json
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def write_documentation() -> None:
    """Write the current results between the document's markers."""
    text = _DOCUMENT.read_text()
    tables = {"kill harness": _kills(), "damage matrix": _matrix(), "fuzzing": _fuzzing()}
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        after = rest.split(end)[1]
        text = f"{before}{start}{table}{end}{after}"
    _DOCUMENT.write_text(text)


def _read(name: str) -> dict[str, Any]:
    path = _RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def _kills() -> str:
    rows = _read("kill_harness.json")
    names = {
        "kills": "SIGKILLs sent to a running job",
        "caches": "completed caches",
        "different_files": "files that differ from those of an undisturbed run",
        "lost_or_changed": "committed records or files lost or changed",
        "most_half_done": "most unfinished shards after a kill",
        "shards_redone": "shards repeated, over all kills",
    }
    lines = ["| | " + " | ".join(rows) + " |", "| --- |" + " ---: |" * len(rows)]
    lines += [
        f"| {what} | " + " | ".join(str(row[name]) for row in rows.values()) + " |"
        for name, what in names.items()
    ]
    phases = sorted({phase for row in rows.values() for phase in row["killed_during"]})
    lines += [
        f"| killed during: {phase} | "
        + " | ".join(str(row["killed_during"].get(phase, 0)) for row in rows.values())
        + " |"
        for phase in phases
    ]
    return "\n".join(lines) + "\n"


def _fuzzing() -> str:
    result = _read("fuzz_reader.json")
    if not result:
        return ""
    kinds = sorted({label.split(",")[0] for label in result["by_kind"]})
    nothing = {"refused": 0, "accepted": 0}
    lines = [
        "| changed file | detected by digest | sealed and refused | sealed and read |",
        "| --- | ---: | ---: | ---: |",
    ]
    for kind in kinds:
        found = result["by_kind"].get(f"{kind}, found by digest", nothing)
        sealed = result["by_kind"].get(f"{kind}, sealed", nothing)
        by_digest = (
            f"{found['refused']:,} of {sum(found.values()):,}" if any(found.values()) else "–"
        )
        lines.append(f"| {kind} | {by_digest} | {sealed['refused']:,} | {sealed['accepted']:,} |")
    lines += [
        "",
        f"{result['mutations']:,} mutations in {result['seconds']:.0f} s on one core:"
        f" {result['num_failures']} crashes, unexpected errors or hangs; the slowest took"
        f" {result['slowest_seconds']} s; memory grew by at most"
        f" {result['peak_growth_megabytes']} MB (limit {result['allowed_growth_megabytes']:,}).",
    ]
    return "\n".join(lines) + "\n"


def _matrix() -> str:
    result = _read("damage_matrix.json")
    if not result:
        return ""
    matrix = result["matrix"]
    damages = list(dict.fromkeys(damage for row in matrix.values() for damage in row))
    lines = ["| | " + " | ".join(damages) + " |", "| --- |" + " --- |" * len(damages)]
    for kind, row in matrix.items():
        cells = [_cell(row.get(damage)) for damage in damages]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    totals = result["totals"]
    lines.append("")
    lines.append(
        f"Of {totals['tried']} damaged caches, verify named {totals['verify']}"
        f" (`--quick` {totals['quick']}), training stopped at {totals['train']} of the"
        f" {totals['train_tried']} that affect it, and repair restored {totals['repair']} of"
        f" {totals['repair_tried']} to the original bytes."
    )
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, int] | None) -> str:
    if cell is None:
        return ""
    train = f"{cell['train']}/{cell['train_tried']}" if cell["train_tried"] else "–"
    repair = f"{cell['repair']}/{cell['repair_tried']}" if cell["repair_tried"] else "–"
    return f"{cell['verify']}/{cell['tried']} · {train} · {repair}"


if __name__ == "__main__":
    write_documentation()
