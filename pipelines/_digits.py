"""Images and teacher of the demo: scikit-learn's handwritten digits, and a small Swin.

The teacher is trained from random weights with all labels of the training digits. The students get
60 of these labels and all images.
"""

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor

from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import draw_view
from scalekd.teachers import Teacher, TeacherConfig, load_teacher
from scalekd.views import ViewPolicy

AUG = "crop:0.5..1"  # a mirrored 2 is no digit
NUM_TRAIN, NUM_LABELLED = 1297, 60
IMAGE_PX = 32
_COPIES = 21  # of each labelled digit, so that an epoch of them is as long as one of all digits
_ARCHITECTURE = "swin_tiny_patch4_window7_224"
_ARGUMENTS = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": 4,
    "num_classes": 10,
}
_EPOCHS, _BATCH, _LR, _WARMUP_EPOCHS = 24, 64, 3e-3, 1


def write_digits(folder: Path) -> None:
    """Write the digits as WebDataset shards.

    ``teacher``: the 1,297 training digits with labels. ``train``: the same, with 60 of the labels.
    ``labelled``: those 60 alone, each several times under keys of its own. ``val``: the 500 others.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    training, labelled = order[:NUM_TRAIN], order[:NUM_LABELLED]
    mixed = np.random.default_rng(1).permutation(training)
    folder.mkdir(parents=True, exist_ok=True)

    def write(split: str, members: Iterable[tuple[str, int]], with_label: set[int]) -> None:
        with webdataset.TarWriter(str(folder / f"{split}-000000.tar"), mtime=0) as tar:
            for key, index in members:
                sample = {"__key__": key, "png": _png(digits.images[index])}
                if index in with_label:
                    sample["cls"] = str(digits.target[index]).encode()
                tar.write(sample)

    def named(indices: Iterable[int]) -> list[tuple[str, int]]:
        return [(f"digit_{index:04d}", index) for index in map(int, indices)]

    copies = [(f"{key}_{copy}", i) for copy in range(_COPIES) for key, i in named(labelled)]
    write("teacher", named(mixed), set(map(int, training)))
    write("train", named(mixed), set(map(int, labelled)))
    write("labelled", copies, set(map(int, labelled)))
    write("val", named(order[NUM_TRAIN:]), set(map(int, order)))
    (folder / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))


def _png(grey: np.ndarray) -> bytes:
    picture = io.BytesIO()
    image = Image.fromarray(np.round(grey * (255 / 16)).astype(np.uint8))
    image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC).save(picture, "PNG")
    return picture.getvalue()


def train_teacher(data_dir: Path, output: Path, *, say: Callable[[str], None]) -> None:
    """Train the teacher on all labels, and write it as a folder in timm's layout.

    Args:
        data_dir: Folder of `write_digits`.
        output: Folder to write; its name is the name of the teacher.
        say: Function that receives lines about the progress.
    """
    torch.manual_seed(0)
    teacher = load_teacher(
        TeacherConfig(
            model=_ARCHITECTURE,
            pretrained=False,
            img_size=(IMAGE_PX, IMAGE_PX),
            model_kwargs={**_ARGUMENTS, "drop_path_rate": 0.0},
        )
    )
    model = teacher.model.requires_grad_(True).train()
    images = open_dataset(str(data_dir), "teacher")
    labels = torch.from_numpy(images.labels).long()
    policy = ViewPolicy.parse(AUG)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=_LR, weight_decay=0.05)
    schedule = CosineLRScheduler(
        optimizer, t_initial=_EPOCHS, warmup_t=_WARMUP_EPOCHS, warmup_lr_init=_LR / 10
    )
    for epoch in range(_EPOCHS):
        pixels = _views(images, policy, epoch)
        for batch in torch.randperm(len(images)).split(_BATCH):  # type: ignore[no-untyped-call]
            loss = torch.nn.functional.cross_entropy(
                model(teacher.normalise(pixels[batch])), labels[batch], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step(epoch + 1)
        if (epoch + 1) % 4 == 0:
            say(f"  epoch {epoch + 1} of {_EPOCHS}, loss {loss.item():.2f}")
    model.requires_grad_(False).eval()
    _write_timm(teacher, output)


def _write_timm(teacher: Teacher, folder: Path) -> None:
    size = [3, IMAGE_PX, IMAGE_PX]
    config = {
        "architecture": _ARCHITECTURE,
        "num_classes": 10,
        "label_names": [str(digit) for digit in range(10)],
        "model_args": {**_ARGUMENTS, "img_size": size[1:]},
        "pretrained_cfg": {
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(teacher.spec.mean),
            "std": list(teacher.spec.std),
            "num_classes": 10,
            "classifier": "head.fc",
            "first_conv": "patch_embed.proj",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(teacher.model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def accuracy(teacher: Teacher, images: ImageDataset) -> float:
    """Measure the teacher's top-1 in percent on whole images."""
    pixels = _views(images, ViewPolicy.parse("center:1"), 0)
    with torch.inference_mode():
        logits = teacher(pixels).logits
    if logits is None:
        raise RuntimeError("the demo's teacher has a head")
    return float((logits.argmax(1).numpy() == images.labels).mean() * 100)


def _views(images: ImageDataset, policy: ViewPolicy, epoch: int) -> Tensor:
    drawn = [
        draw_view(
            images[index], policy, seed=1, pass_index=epoch, view_size=(IMAGE_PX, IMAGE_PX)
        ).pixels
        for index in range(len(images))
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
