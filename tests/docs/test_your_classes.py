"""``docs/your-classes.md``: its commands run as they are written, on tiny images, for one epoch."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.conftest import encoded_image, run_script

pytestmark = pytest.mark.slow
PX = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds ``photos`` with two splits, and ``teacher``, a tiny ViT that names their classes."""
    names = ["bicycle", "car", "lorry"]
    for number in range(60):
        split = "val" if number % 5 == 4 else "train"
        path = tmp_path / "photos" / split / names[number % 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded_image(number))
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=PX, num_classes=len(names))
    (tmp_path / "teacher").mkdir()
    save_file(model.state_dict(), tmp_path / "teacher/model.safetensors")
    config = {
        "architecture": "test_vit",
        "num_classes": len(names),
        "label_names": names,
        "model_args": {"img_size": PX, "num_classes": len(names)},
        "pretrained_cfg": {"input_size": [3, PX, PX], "num_classes": len(names)},
    }
    (tmp_path / "teacher/config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_the_commands_lead_to_a_model_that_names_its_answer(
    programs: Callable[[str, str], dict[str, str]], folder: Path
) -> None:
    blocks = programs("docs/your-classes.md", "sh")
    assert list(blocks) == ["check", "cache", "train", "use"]
    script = "\n".join(blocks.values())
    for long, short in (("--passes 8", "--passes 2"), ("--epochs 90 -b 128", "--epochs 1 -b 16")):
        assert long in script
        script = script.replace(long, short)
    (code,) = programs("docs/your-classes.md", "python").values()
    (folder / "open.py").write_text(code, encoding="utf-8")
    ended = run_script(f"{script}\npython open.py", folder)
    classes = {path.name for path in (folder / "photos/train").iterdir()}
    assert ended.stdout.splitlines()[-1] in classes
