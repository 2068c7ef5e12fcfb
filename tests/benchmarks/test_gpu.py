"""The check for GPUs runs on a CPU in its tiny form, and its findings become tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import tables

_REPOSITORY = Path(__file__).parents[2]


def _run(output: Path, *options: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--output", str(output), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=_REPOSITORY, env=environment, check=True, timeout=1200)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    lines = _run(tmp_path / "gpu.jsonl", "--budget", "1000")
    assert [line for line in lines if "failed" in line or "skipped" in line] == []
    done = {line["done"]: line["code"] for line in lines if "done" in line}
    assert done == dict.fromkeys(("machine", "encoding", "caching", "checks", "training"), 0)
    found = {(line["section"], line.get("part")): line for line in lines}
    assert found["encoding", "trellis"]["different"] == {"search": 0, "stepwise": 0}
    assert found["checks", "written and verified"]["sound"]
    assert found["checks", "written again"]["different"] == 0
    text = tables.markdown(lines, "gpu-test")
    assert "bare teacher, fp32, batch 8" in text
    assert "0 of 77 files differ" in text


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    code = """
import sys
from benchmarks.gpu import __main__ as check
check.SECTIONS["machine"] = 0.2
sys.argv = ["gpu", "--tiny", "--only", "machine", "--output", sys.argv[1]]
check.main()
"""
    output = tmp_path / "gpu.jsonl"
    subprocess.run([sys.executable, "-c", code, str(output)], cwd=_REPOSITORY, check=True)
    assert '"code": "out of time"' in output.read_text()


def test_the_committed_results_make_a_table(tmp_path: Path) -> None:
    assert "Not measured on a GPU" in tables.gpu_section(tmp_path, tmp_path)
    text = tables.gpu_section(_REPOSITORY / "benchmarks" / "results", tmp_path)
    assert "| bare teacher, bf16, batch 128, views/s | 1,842 | 1,837 |" in text
