"""The tables of ``docs/scale.md`` are those that the cost model makes of its inputs."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks import cost_model as model
from scalekd.views import ViewPolicy, view_columns

REPOSITORY = Path(__file__).parents[2]


def test_the_documents_tables_are_current() -> None:
    text = (REPOSITORY / "docs" / "scale.md").read_text()
    assert model.tables(model.Measured.read(), model.Assumed()) in text


def _measured(**changes: object) -> model.Measured:
    """Inputs worked by hand."""
    values = {
        "stage_bytes": (3000.0, 1000.0 - 16),  # a view also has 16 bytes of hashes
        "coding_seconds": (0.003, 0.001),
        "fit_seconds": (360.0, 720.0),
        "rest_bytes": 0.0,
        "view_seconds": 0.004,
        "encoded_seconds": (0.001, 0.001),
        "teacher_seconds": 0.001,
        "step_seconds": 0.002,
        "activation_bytes": 1e6,
        "state_bytes": 5e9,
        "block_bytes": 1000.0,
        "sample_bytes": 100.0,
        **changes,
    }
    return model.Measured(**values)  # type: ignore[arg-type]


def _row(start: str, measured: model.Measured | None = None, **assumed: float) -> list[str]:
    """Cells of the first row that begins so."""
    fast = {"disk_gigabytes_per_second": 1e6, "file_seconds": 0.0, **assumed}
    text = model.tables(
        measured or _measured(),
        dataclasses.replace(model.Assumed(), **fast),  # type: ignore[arg-type]
    )
    row = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def _hours(cell: str) -> float:
    return float(cell.split(" h")[0])


def test_the_slower_of_gpu_and_cores_determines_the_time() -> None:
    # 1,281,167 views x 9 passes; the GPU takes 1 ms, and fitting both codecs 0.3 h.
    start = "ImageNet-1K: cache, 9 passes |"
    assert _row(start, passes=9, cores_per_gpu=1000)[0] == "3.5 h, 0.0037"
    # On two cores, drawing and encoding take (4 + 3 + 1) / 2 ms.
    assert _hours(_row(start, passes=9, cores_per_gpu=2)[0]) == 13


def test_several_gpus_share_views_and_fits_but_not_the_disk() -> None:
    start = "ImageNet-1K: cache, 9 passes |"
    # 3.2 h / 64 and the longer of two fits, 0.2 h.
    assert _hours(_row(start, passes=9, cores_per_gpu=1000)[-1]) == 0.25
    # 11.5 million views of 4 kB at 4 MB/s take 3.2 h on any number of GPUs, plus 0.2 h.
    slow = _row(start, passes=9, cores_per_gpu=1000, disk_gigabytes_per_second=0.004)
    assert _hours(slow[-1]) == 3.4


def test_the_last_block_and_its_files_come_after_the_rest() -> None:
    def seconds(**changes: float) -> float:
        return model._Seconds.of(
            _measured(), dataclasses.replace(model.Assumed(), **changes), (3, 4), 4096, 1
        ).cache

    # One thread codes 256 views of 4 ms; a shard of 16 blocks has 5 files per block.
    without = seconds(file_seconds=0.0, cores_per_gpu=1000, passes=1)
    assert without == pytest.approx(6006 * 0.001 + 1080 + 4096 * 0.001 + 256 * 0.004)
    assert seconds(file_seconds=0.001, cores_per_gpu=1000, passes=1) > without + 0.005


def test_the_cache_pays_for_itself_after_the_epochs_that_the_teacher_would_have_cost() -> None:
    # An epoch of 1,281,167 views costs the live teacher 1 ms more per view: 0.356 h.
    start = "ImageNet-1K: the cache has paid"
    assert _row(start, passes=9, cores_per_gpu=1000)[0] == "9.8 epochs"  # 3.5 h / 0.356 h
    # If drawing limits both, nothing is saved.
    slow = _measured(view_seconds=1.0)
    assert _row(start, slow, passes=9, cores_per_gpu=16)[0] == "never"


def test_disk_is_views_times_bytes() -> None:
    cells = _row("`--stages 3,4`", passes=2)
    assert cells == ["4 kB", "5.1 GB", "10 GB", "57 GB", "114 GB"]
    assert _row("`--stages final`", passes=2)[0] == "1 kB"
    # 5,005 blocks of 5 files, 313 shards with their parameters, hashes and record
    columns = len(view_columns(ViewPolicy.parse(model.AUGMENTATION))) + 2
    assert _row("files", passes=1)[1] == f"{5005 * 5 + 313 * (columns + 4):,}"
