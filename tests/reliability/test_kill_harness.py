"""A short run of the kill harness, and two jobs that were not told of one another."""

import random
import time
from pathlib import Path

from scalekd.cache.care.verify import verify
from tests.reliability import kill_harness as harness


def test_killed_runs_lose_nothing_and_end_in_the_same_bytes(tmp_path: Path) -> None:
    outcome = harness.run(5, 1, seed=1, folder=tmp_path)
    assert outcome.kills == 5
    assert outcome.different_files == 0
    assert outcome.lost_or_changed == 0
    assert outcome.most_half_done <= 1
    assert outcome.passed


def test_two_jobs_without_shards_divide_the_work(tmp_path: Path) -> None:
    """And the one that stays finishes what the other was killed with, then and there."""
    images, log = harness.write_images(tmp_path / "images"), tmp_path / "log"

    def job(name: str) -> object:
        return harness.Job(images, tmp_path / name, log, 1)

    alone = job("alone")
    assert alone.wait(60), log.read_text()
    output = tmp_path / "shared"
    first, second, third = job("shared"), job("shared"), job("shared")
    deadline = time.monotonic() + 60
    while len(list(output.glob("records/0*/*.json"))) < 3:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)
    third.kill(random.Random(0))
    assert first.wait(60), log.read_text()
    assert second.wait(60), log.read_text()
    assert first.codes == second.codes == [0], log.read_text()
    assert harness.contents(output) == harness.contents(tmp_path / "alone")
    assert verify(output).problems == []
