"""Commands that read documents load no torch: they answer in a fraction of a second."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_CACHES = Path(__file__).parents[1] / "cache" / "frozen" / "format1"

_RUN = """
import json, sys
from scalekd.cli.main import main
code = 0
try:
    main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "timm", "torchvision", "accelerate", "matplotlib", "sklearn", "webdataset"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]))
"""


def _run(*arguments: object) -> tuple[int, list[str], str]:
    """Run a command in a new interpreter; return exit code, heavy packages loaded, and errors."""
    words = json.dumps([str(argument) for argument in arguments])
    run = subprocess.run(
        [sys.executable, "-c", _RUN, words], capture_output=True, text=True, check=True
    )
    code, heavy = json.loads(run.stdout.splitlines()[-1])
    return code, heavy, run.stderr


@pytest.mark.parametrize("cache", ["float16", "int8", "transform"])
def test_info_and_ls_load_no_torch(cache: str) -> None:
    assert _run("cache", "info", _CACHES / cache) == (0, [], "")
    assert _run("cache", "ls", _CACHES / cache, "--json") == (0, [], "")


def test_info_of_a_wrong_path_loads_no_torch(tmp_path: Path) -> None:
    code, heavy, err = _run("cache", "info", tmp_path / "nowhere")
    assert (code, heavy) == (3, [])
    assert "there is no such folder" in err
