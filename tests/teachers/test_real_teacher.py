"""The ViT-S/14 at hand, fine-tuned on CIFAR-10: opened, compared with timm, and put to the test."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from scalekd.shapes import FeatureShape
from scalekd.teachers import Teacher, TeacherConfig, load_tail, load_teacher, save_tail

DATA = Path(__file__).parents[3] / "shared" / "data"
FOLDER = DATA / "teacher" / "vit_small_patch14_112_cifar10"
SHARD = DATA / "cifar10" / "val-000000.tar"

pytestmark = pytest.mark.skipif(
    not (FOLDER.is_dir() and SHARD.is_file()),
    reason=f"the data beside the project is not at {DATA}",
)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(TeacherConfig(model=f"local-dir:{FOLDER}"))


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    """The first validation images at 112 px, and their labels."""
    pixels, labels = {}, {}
    with tarfile.open(SHARD) as shard:
        for member in shard:
            file = shard.extractfile(member)
            assert file is not None
            key, _, kind = member.name.rpartition(".")
            if kind == "cls":
                labels[key] = int(file.read())
            elif kind == "jpg":
                image = Image.open(io.BytesIO(file.read())).convert("RGB")
                pixels[key] = np.asarray(image.resize((112, 112), Image.Resampling.BICUBIC))
            if len(labels) == 200 and labels.keys() == pixels.keys():
                break
    stacked = np.stack([pixels[key] for key in labels]).transpose(0, 3, 1, 2)
    return torch.from_numpy(stacked.copy()), torch.tensor(list(labels.values()))


def test_it_is_what_its_readme_says(teacher: Teacher) -> None:
    spec = teacher.spec
    assert (spec.model, spec.architecture) == (FOLDER.name, "vit_small_patch14_dinov2")
    assert (spec.img_size, spec.num_classes, spec.licence) == ((112, 112), 10, "apache-2.0")
    assert spec.stages[3] == spec.stages[4] == FeatureShape((8, 8), 384, 1)


@torch.no_grad()
def test_features_logits_and_tail_are_timms(
    teacher: Teacher, images: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    reference = timm.create_model(f"local-dir:{FOLDER}", pretrained=True).eval()
    pixels = images[0][:8]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.spec.mean, teacher.spec.std))
    features, logits = teacher(pixels)
    expected = reference((pixels / 255 - mean) / std)
    assert logits is not None
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(features[4], reference.forward_features(teacher.normalise(pixels)))

    teacher.calibrate_prefix([teacher(pixels).features[3]])
    save_tail(teacher.tail(), tmp_path / "tail.safetensors")
    # Two of twelve blocks in float16, as published, beside one float32 prefix token.
    assert (tmp_path / "tail.safetensors").stat().st_size < 8e6
    tail = load_tail(tmp_path / "tail.safetensors")
    again = tail.forward_features(features[3][:, 1:], features[3][:, :1])
    assert (again - features[4]).abs().max() <= 1e-6 * features[4].abs().max()
    assert (tail.head(features[4]) - logits).abs().max() <= 1e-6 * logits.abs().max()

    # With the constant class token the patch tokens keep nearly the teacher's direction.
    constant = tail(features[3][:, 1:])
    cosine = torch.cosine_similarity(constant, features[4][:, 1:], dim=-1)
    assert cosine.mean() > 0.95


@torch.no_grad()
def test_top_1_on_held_out_images(
    teacher: Teacher, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pixels, labels = images
    hits = 0
    for chunk, expected in zip(pixels.split(40), labels.split(40), strict=True):
        logits = teacher(chunk).logits
        assert logits is not None
        hits += int((logits.argmax(dim=1) == expected).sum())
    assert hits / len(labels) > 0.9  # its README: 94.0 % of all 4,000
