"""What long commands say while they work."""

import pytest
from rich.console import Console

from scalekd.pipelines import _progress
from scalekd.pipelines._progress import ProgressReport
from scalekd.training.progress import TrainingProgress

HOSTILE = "s3://a\x1b[31m\x1b]0;owned\x07 [red]to[/red]\nspoof\u202e"
SHOWN = r"s3://a\x1b[31m\x1b]0;owned\x07 [red]to[/red]\nspoof\u202e"


def test_a_plain_line_shows_a_name_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_PLAIN_SECONDS", -1.0)
    with ProgressReport(HOSTILE, 10) as progress:
        progress.advance(1)
    assert capsys.readouterr().err.startswith(f"{SHOWN}: 1 of 10 views")


def test_a_live_bar_shows_a_name_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def console(**options: object) -> Console:
        return Console(stderr=True, force_terminal=True, width=200, color_system=None)

    monkeypatch.setattr(_progress, "Console", console)
    with ProgressReport(HOSTILE, 10) as progress:
        progress.advance(10)
    assert SHOWN in capsys.readouterr().err


def test_notes_of_training_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(num_epochs=1, updates_per_epoch=1, shown=True) as progress:
        progress.say(HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}\n"
