"""A preempted job: the scheduler's signal reaches the trainer and its loader's workers at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scalekd.training.checkpoint import read_checkpoint

TIMEOUT_SECONDS = 180
# As the command line runs it, with batches so slow that the trainer always waits for one.
SCRIPT = """
import time
from scalekd.cli.main import main
from scalekd.loading.cached_views import CachedViews

make = CachedViews._batch

def slow(self, rows):
    time.sleep(1)
    return make(self, rows)

CachedViews._batch = slow
main()
"""


def test_a_signal_to_trainer_and_workers_ends_with_a_checkpoint(
    cache: Path, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [
        *("script.py", "train-student", f"--cache={cache}", f"--data-dir={image_folder}"),
        *("--model=test_resnet", "--objective=kd", "--batch-size=8", "--workers=2", "--amp=no"),
        *("--epochs=50", "--log-interval=1", f"--output={tmp_path / 'run'}"),
    ]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        log = tmp_path / "run/log.jsonl"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        # The two workers give two batches at once, and then the trainer waits a second.
        while time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= 2:
                break
            time.sleep(0.02)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 143, err
    assert "continue with --resume auto" in " ".join(err.split())
    assert read_checkpoint(tmp_path / "run/last").position.num_updates >= 2
