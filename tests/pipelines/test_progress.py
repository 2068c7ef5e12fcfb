"""What long commands say while they work."""

import re
import threading

import pytest
from rich.console import Console

from scalekd.pipelines import _progress
from scalekd.pipelines._progress import ProgressReport, doing
from scalekd.text import format_duration, format_time_left
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.6, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (12_345, "3 h 25 min"),
        (2 * 86_400 + 3 * 3600 + 5, "2 d 3 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_end_has_a_date_from_a_day_on() -> None:
    assert re.fullmatch(r"10 s left, until \d\d:\d\d", format_time_left(10))
    assert re.fullmatch(r"3 d left, until \d\d \w+ \d\d:\d\d", format_time_left(3 * 86_400))
    assert format_time_left(float("inf")) == "no end in sight"
    assert format_time_left(1e30) == "no end in sight"


def test_a_plain_line_has_rate_and_expected_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "_PLAIN_SECONDS", -1.0)
    with ProgressReport("caching", 2000) as progress:
        progress._started -= 100
        progress.advance(1000)
    line = capsys.readouterr().err
    expected = (
        r"caching: 1,000 of 2,000 views, \d+(\.\d)? views/s, data wait 0%, \d min( \d+ s)? left, "
    )
    assert re.match(expected + r"until \d\d:\d\d$", line), line


def test_a_long_step_is_shown_and_a_short_one_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with doing("indexing"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(_progress, "_PLAIN_SECONDS", 0.0)
    printed = threading.Event()
    with doing(HOSTILE) as step:
        while not printed.wait(0.01):
            if "…" in capsys.readouterr().err:
                printed.set()
        step.result = f"7 images of {HOSTILE}"
    err = capsys.readouterr().err
    assert err.startswith(f"{SHOWN}: 7 images of {SHOWN}, ")
    assert err.count("\n") == 1
    with doing("nothing", enabled=False):
        pass
    assert capsys.readouterr().err == ""


def test_a_step_that_fails_ends_without_a_result(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no"), doing("indexing"):
        raise ValueError("no")
    assert capsys.readouterr().err == ""
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_other_processes_of_a_launcher_are_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(_progress, "_PLAIN_SECONDS", -1.0)
    with doing("indexing"):
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    assert capsys.readouterr().err == ""


def test_training_shows_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"loss": 1.0, "samples_viewed": 8, "images_per_second": 2, "data_wait_share": 0}
    monkeypatch.setattr("scalekd.training.progress._PLAIN_SECONDS", -1.0)
    with TrainingProgress(num_epochs=2, updates_per_epoch=10, shown=True) as progress:
        progress.step(0, 4, values)  # of a run that was resumed at update 3
        assert "left" not in capsys.readouterr().err
        assert progress._first is not None
        progress._first = progress._first[0] - 60, 4
        progress.step(0, 10, values)
    # Six updates took 60 s, and ten are left.
    assert re.search(r"[1-9] min( \d+ s)? left, until \d\d:\d\d", capsys.readouterr().err)
