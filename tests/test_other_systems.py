"""Systems without POSIX's own modules: everything is imported, and help works, as on Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

HIDING = """
import os, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del os.sched_getaffinity
"""


def _run(program: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDING + program],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_module_is_imported_without_posix_modules(tmp_path: Path) -> None:
    program = """
import importlib, pkgutil, scalekd
for module in pkgutil.walk_packages(scalekd.__path__, "scalekd."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if error.name in ("fcntl", "resource", "pwd", "grp", "termios"):
                raise
"""
    ended = _run(program, tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_help_works_without_posix_modules(tmp_path: Path) -> None:
    program = """
from scalekd.cli.main import main
for command in (["--help"], ["train-student", "--help"], ["cache", "pull", "--help"]):
    main(command)
"""
    ended = _run(program, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Usage: scalekd") == 3


def test_commands_that_need_file_locks_end_with_one_line(sound_cache: Path, tmp_path: Path) -> None:
    program = f"""
from scalekd.cli.main import main
main(["train-student", "--model=resnet18", "--output=run", "--cache={sound_cache}", "--data-dir=."])
"""
    ended = _run(program, tmp_path)
    assert ended.returncode == 5, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "scalekd: error" in line]
    assert line.startswith("scalekd: error: EnvironmentFault: ")
    assert not (tmp_path / "run").exists()
    assert "Windows" in line
    assert "WSL" in line
