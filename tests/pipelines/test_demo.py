"""``make demo``: the whole path on data that comes with scikit-learn."""

from pathlib import Path

import pytest

from scalekd.pipelines.demo import run_demo


@pytest.mark.slow
def test_the_demo_teaches_a_teacher_and_compares_students(tmp_path: Path) -> None:
    """One epoch a student: enough for every part to run, not for the students to learn."""
    told: list[str] = []
    result = run_demo(tmp_path / "demo", epochs=1, say=told.append)
    assert result.teacher_top1 > 85
    assert [row.objective for row in result.rows] == ["no teacher", "logits only", "ScaleKD"]
    assert all(0 < score < 100 for row in result.rows for score in row.top1)
    assert len(told) > 4
    page = Path(result.report).read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in ("none", "kd", "scalekd"))
    assert page.count("<svg") == 1
    assert result.report in "\n".join(result.lines())
