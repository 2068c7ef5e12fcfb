"""A pretrained model, no network and no cached weights: one line that says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("command", ["cache-teacher", "train-student"])
def test_published_weights_without_network_are_one_line(
    command: str, tiny_images: Path, sound_cache: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    arguments = [f"--data-dir={tiny_images}", f"--output={output}", "--model=resnet18"]
    if command == "train-student":
        arguments += [f"--cache={sound_cache}", "--val-split=none", "--pretrained"]
    else:
        arguments[-1] = "--model=swin_l"
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "scalekd", command, *arguments],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ended.returncode == 5, ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("scalekd: error: EnvironmentFault: the weights of")
    assert "--checkpoint FILE" in line
    assert "Traceback" not in ended.stderr
    assert not output.exists()

    weights = tmp_path / "weights.safetensors"  # the option exists, and is for this
    again = subprocess.run(
        [sys.executable, "-m", "scalekd", command, *arguments, f"--checkpoint={weights}"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert again.returncode == 2
    assert f"--checkpoint {weights}: there is no such file" in again.stderr
