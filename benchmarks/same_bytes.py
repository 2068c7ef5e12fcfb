"""Whether two installations of scalekd write the same caches, byte for byte but for provenance.

    python -m benchmarks.same_bytes /old/.venv/bin/scalekd /new/.venv/bin/scalekd
    python -m benchmarks.same_bytes /old/.venv/bin/scalekd scalekd --reference ./old-caches

Makes small caches of random images with a tiny teacher: Zarr arrays of each codec, tars with each
``--embed``, several passes, an extension, a conversion, a part that is fetched and then completed,
and a merge of two halves. ``--reference`` keeps the first installation's caches for the next time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_TEACHER = ("--model", "test_vit", "--no-pretrained", "--img-size", "32")
_NUM_IMAGES = 70


def commands(images: Path, root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each cache that is made below ``root``, by name, with the command that makes it."""
    data = ("--data-dir", str(images))
    small = ("--model-kwargs", "num_classes=10", "--batch-size", "16", "-j", "0")
    cut = ("--shard-size", "24")

    def stage_one(name: str, *options: str) -> tuple[str, list[str]]:
        output = ("--output", str(root / name))
        return name, ["cache-teacher", *_TEACHER, *small, *data, *output, *cut, *options]

    yield stage_one("float16", "--codec", "float16", "--passes", "2")
    yield stage_one("int8", "--codec", "int8", "--logits", "topk:3", "--aug", "crop+flip+rand")
    yield stage_one("transform", "--codec", "transform:error=0.05", "--passes", "2")
    for embed in ("none", "source", "view"):
        yield stage_one(
            f"tars-{embed}", "--codec", "int8", "--format", "webdataset", "--embed", embed
        )
    name = "float16"
    yield name, ["cache", "extend", str(root / name), *data, "--passes", "3", "-j", "0"]
    extension = ("--name", "other", "--model", "test_vit2", "--no-pretrained", "--codec", "int8")
    yield name, ["cache", "extend", str(root / name), *data, *extension, "-j", "0"]
    name = "converted"
    tars = ("--format", "webdataset", "--embed", "none")
    yield name, ["cache", "convert", str(root / "float16"), str(root / name), *tars, "-j", "0"]
    name = "part"
    for options in (["--passes", "0-0", "--shards", "1-1"], ["--passes", "1-1"]):
        yield name, ["cache", "pull", str(root / "float16"), str(root / name), *options]
    yield stage_one("half-a", "--codec", "float16", "--shards", "0-1")
    yield "half-b", ["copy", str(root / "half-a"), str(root / "half-b")]
    yield stage_one("half-b", "--codec", "float16", "--shards", "2-2")
    halves = [str(root / "half-a"), str(root / "half-b")]
    yield "merged", ["cache", "merge", *halves, "--output", str(root / "merged")]


def make_images(folder: Path) -> Path:
    """Class folders of random pictures, the same every time."""
    for number in range(_NUM_IMAGES):
        random = np.random.default_rng(number)
        height, width = (int(side) for side in random.integers(24, 60, 2))
        path = folder / "train" / f"class-{number % 10}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((width, height), Image.Resampling.BILINEAR).save(path)
    return folder


def make_caches(scalekd: str, images: Path, root: Path) -> None:
    """Run every command with one installation; a reference that is complete is left alone."""
    done = root / "done"
    if done.exists():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, command in commands(images, root):
        if command[0] == "copy":
            _copy_plan(Path(command[1]), Path(command[2]))
            continue
        print(f"{scalekd} {' '.join(command[:2])} … {name}", flush=True)
        made = subprocess.run(
            [scalekd, *command], env=environment, capture_output=True, text=True, check=False
        )
        if made.returncode:
            sys.exit(f"{' '.join(command)}: exit code {made.returncode}\n{made.stderr[-2000:]}")
    done.touch()


def _copy_plan(source: Path, target: Path) -> None:
    """Begin a half as the documentation says: plan and tables of the other machine."""
    (target / "tables").mkdir(parents=True)
    for path in (source / "plan.json", *(source / "tables").iterdir()):
        (target / path.relative_to(source)).write_bytes(path.read_bytes())


def differences(old: Path, new: Path) -> Iterator[str]:
    """Each file that is in one tree only, or differs in more than provenance."""
    trees = [_files(root) for root in (old, new)]
    for name in sorted(trees[0].keys() ^ trees[1].keys()):
        yield f"{name}: only in {old if name in trees[0] else new}"
    for name in sorted(trees[0].keys() & trees[1].keys()):
        contents = [tree[name].read_bytes() for tree in trees]
        if contents[0] == contents[1]:
            continue
        if Path(name).name in ("plan.json", "manifest.json"):
            contents = [_without_provenance(json.loads(content)) for content in contents]
        if contents[0] != contents[1]:
            yield f"{name}: differs"


def _files(root: Path) -> dict[str, Path]:
    """Files by path; of numbered selections the last, which is the one that counts."""
    files: dict[str, Path] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root)
        if name.parent.name == "selection":
            name = name.with_name("the last")
        files[name.as_posix()] = path
    return files


def _without_provenance(document: Any) -> Any:
    """A plan or manifest without what may differ, and without the digests that follow from it."""
    plan = document.get("plan", document)
    plan.pop("provenance")
    if plan is not document:
        for name in ("digest", "total_bytes"):
            document.pop(name)
        document["files"].pop("plan.json")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", help="scalekd executable")
    parser.add_argument("new", help="scalekd executable")
    parser.add_argument("--reference", type=Path, help="folder to keep the old caches in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.reference or Path(folder)
        images = make_images(work / "images")
        make_caches(arguments.old, images, work / "old")
        make_caches(arguments.new, images, Path(folder) / "new")
        lines = list(differences(work / "old", Path(folder) / "new"))
    print("\n".join(lines) or "the caches are the same")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
