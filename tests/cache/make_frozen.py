"""Write the frozen caches of the present format: python tests/cache/make_frozen.py

Run it once when the format is new. What stands is never rewritten: caches with such bytes are out
in the world.
"""

import json
import sys
from typing import Any

import numpy as np
from PIL import Image
from test_frozen import FOLDER, IMAGES, decoded, expected

from scalekd.pipelines import _sizes
from scalekd.pipelines import cache_teacher as stage_one
from scalekd.teachers import TeacherConfig

NUM_IMAGES = 7
CORRUPT = 1  # its view is skipped, so that a shard is shorter than the others
CACHES: dict[str, dict[str, Any]] = {
    # Two passes, both stages, every column a view can have, a skipped image, several shards.
    "float16": {
        "codec": "float16",
        "logits": "topk:3",
        "aug": "crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.5",
        "passes": 2,
        "note": "frozen: must open for ever",
    },
    "int8": {"codec": "int8", "logits": "none", "stages": (4,), "aug": "crop:0.2..0.9+flip:1"},
    # Fine, so that enough coefficients are kept for trellis paths.
    "transform": {
        "codec": "transform:error=0.001",
        "logits": "full",
        "stages": (4,),
        "aug": "center",
    },
}


def write_images() -> None:
    """PNG, whose pixels are the same with every decoder."""
    IMAGES.mkdir(parents=True)
    random = np.random.default_rng(1)
    for number in range(NUM_IMAGES):
        height, width = (int(side) for side in random.integers(12, 24, 2))
        y, x = np.mgrid[:height, :width]
        planes = [(9 * x + 5 * y * c + 40 * number) % 256 for c in (1, 2, 3)]
        folder = IMAGES / "train" / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"image-{number}.png"
        Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8)).save(path, optimize=True)
        if number == CORRUPT:
            path.write_bytes(path.read_bytes()[:60])


def main() -> None:
    if FOLDER.exists():
        sys.exit(f"{FOLDER} exists and stays")
    write_images()
    _sizes.BLOCK_SIZE = 2
    teacher = TeacherConfig(
        model="test_vit",
        pretrained=False,
        img_size=24,
        tail_blocks=1,
        model_kwargs={"num_classes": 5, "embed_dim": 16, "depth": 2, "patch_size": 6},
    )
    features = {}
    for name, settings in CACHES.items():
        root = FOLDER / name
        config = stage_one.CacheTeacherConfig(
            teacher=teacher,
            data_dir=str(IMAGES),
            output=root,
            batch_size=4,
            workers=0,
            shard_size=4,
            skip_corrupt=True,
            **settings,
        )
        assert stage_one.cache_teacher(config).complete
        text = json.dumps(expected(root), indent=1, sort_keys=True)
        (FOLDER / f"{name}.json").write_text(text + "\n")
        features[name] = decoded(root)
    np.savez_compressed(FOLDER / "features.npz", **features)
    for leases in FOLDER.rglob("*.lease"):
        leases.unlink()
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{sum(1 for _ in FOLDER.rglob('*'))} files, {size:,} bytes")


if __name__ == "__main__":
    main()
