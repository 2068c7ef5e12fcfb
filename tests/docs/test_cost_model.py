"""The tables of ``docs/scale.md`` are those that the cost model makes of its inputs."""

import dataclasses
from pathlib import Path

from benchmarks import cost_model as model

REPOSITORY = Path(__file__).parents[2]


def test_the_documents_tables_are_current() -> None:
    text = (REPOSITORY / "docs" / "scale.md").read_text()
    assert model.tables(model.Measured.read(), model.Assumed()) in text


def _row(start: str, **assumed: float) -> list[str]:
    """Cells of the first row that begins so, for inputs worked by hand."""
    measured = model.Measured(
        stage_bytes=(3000.0, 1000.0),
        encode_seconds=(0.003, 0.001),
        rest_bytes=0.0,
        view_seconds=0.004,
        teacher_gflop=100.0,
        step_gflop=200.0,
        activation_bytes=1e6,
        state_bytes=5e9,
        block_bytes=1000.0,
        sample_bytes=100.0,
    )
    text = model.tables(measured, dataclasses.replace(model.Assumed(), **assumed))
    row = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_the_slower_of_gpu_and_cores_decides() -> None:
    # 1,281,167 views x 9 passes. A teacher's forward takes 1 ms at 100 TFLOP/s.
    fast = _row("ImageNet-1K: cache, 9 passes |", passes=9, cores_per_gpu=1000)
    assert fast[0] == "3.2 h, 0.004"
    assert fast[-1] == "0.05 h, 0.26"  # 64 GPUs
    # On one core, drawing and encoding take 4 + 3 + 1 ms.
    slow = _row("ImageNet-1K: cache, 9 passes |", passes=9, cores_per_gpu=1)
    assert slow[0] == "26 h, 0.0005"


def test_disk_is_views_times_bytes() -> None:
    cells = _row("`--stages 3,4`", passes=2)
    assert cells == ["4 kB", "5.1 GB", "10 GB", "57 GB", "114 GB"]
    assert _row("`--stages final`", passes=2)[0] == "1 kB"
