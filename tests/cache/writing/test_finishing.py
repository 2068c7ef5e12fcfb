"""The last step of writing a cache."""

import subprocess
import sys
from pathlib import Path

from scalekd.cache import open_cache
from scalekd.cache.writing.finishing import finish
from scalekd.storage.files import temporary_beside


def test_the_job_that_completes_a_cache_removes_the_work_of_killed_ones(cache_copy: Path) -> None:
    script = (
        "import pathlib, sys; from scalekd.storage.files import temporary_beside;"
        "print(temporary_beside(pathlib.Path(sys.argv[1])))"
    )
    asked = [sys.executable, "-c", script, str(cache_copy / "calibration")]
    killed = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    of_living = temporary_beside(cache_copy / "calibration")
    for folder in (killed, of_living):
        (folder / "fit").mkdir(parents=True)
    reader = open_cache(cache_copy)
    assert finish(reader.cache, reader.num_passes) is not None
    assert not killed.exists()
    assert of_living.exists()
