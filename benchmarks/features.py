"""Make the feature file that ``benchmarks.codecs`` reads, from a teacher and a WebDataset folder.

    python -m benchmarks.features --teacher DIR --data DIR --output /tmp/features

writes ``features-mid.npz`` (what enters the last two blocks) and ``features-final.npz`` (after the
last norm), each with ``calibration`` and ``test`` of shape (view, token, channel) in float16.
Calibration views come from the training shards, test views from the validation shards, so that
no image is on both sides. Prefix tokens are dropped unless ``--keep-prefix``.
"""

import argparse
import io
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms


def read_images(folder: Path, split: str, limit: int) -> Iterator[Image.Image]:
    """Yield the first ``limit`` JPEG members of ``folder/split-*.tar`` in order."""
    count = 0
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.name.endswith(".jpg"):
                    continue
                file = archive.extractfile(member)
                if file is None:
                    continue
                yield Image.open(io.BytesIO(file.read())).convert("RGB")
                count += 1
                if count == limit:
                    return
    if count < limit:
        raise SystemExit(f"{folder}: {count} images in split {split!r}, {limit} asked for")


@torch.inference_mode()
def extract(
    model: torch.nn.Module,
    images: Iterator[Image.Image],
    *,
    depth_from_end: int,
    keep_prefix: bool,
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Features entering the last ``depth_from_end`` blocks, and after the final norm."""
    size = model.patch_embed.img_size
    draw = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=3, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(model.default_cfg["mean"], model.default_cfg["std"]),
        ]
    )
    caught: list[torch.Tensor] = []
    handle = model.blocks[-depth_from_end].register_forward_pre_hook(
        lambda _module, inputs: caught.append(inputs[0].float())
    )
    first = 0 if keep_prefix else model.num_prefix_tokens
    middle, final = [], []
    batch: list[torch.Tensor] = []

    def flush() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            output = model.forward_features(torch.stack(batch))
        middle.append(caught.pop()[:, first:].half().numpy())
        final.append(output.float()[:, first:].half().numpy())
        batch.clear()

    for image in images:
        batch.append(draw(image))
        if len(batch) == batch_size:
            flush()
    if batch:
        flush()
    handle.remove()
    return np.concatenate(middle), np.concatenate(final)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="folder in timm layout")
    parser.add_argument("--data", type=Path, required=True, help="folder of train-*.tar, val-*.tar")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", type=int, default=2560)
    parser.add_argument("--test", type=int, default=640)
    parser.add_argument("--keep-prefix", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    model = timm.create_model(f"local-dir:{arguments.teacher}", pretrained=True).eval()
    start = time.perf_counter()
    splits = {
        "calibration": read_images(arguments.data, "train", arguments.calibration),
        "test": read_images(arguments.data, "val", arguments.test),
    }
    arrays = {
        name: extract(model, images, depth_from_end=2, keep_prefix=arguments.keep_prefix)
        for name, images in splits.items()
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    for level, file_name in enumerate(("features-mid.npz", "features-final.npz")):
        path = arguments.output / file_name
        np.savez(path, **{name: pair[level] for name, pair in arrays.items()})
        print(path, {name: pair[level].shape for name, pair in arrays.items()})
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
