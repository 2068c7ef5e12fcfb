"""The caches that the grid reads, each made when it is first asked for.

The teacher runs once, into ``float16``; every other cache is written by the same pipeline from a
teacher that remembers what it said of these pixels, so that codecs see identical features.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.accuracy.grid import AUG, EPOCHS, IMAGE_PX, NUM_IMAGES
from scalekd.cache import open_cache
from scalekd.data.views import pixel_hash
from scalekd.pipelines import _calibrate, _write_shards
from scalekd.pipelines._write_shards import TeacherArrays
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.teachers import Teacher, TeacherConfig

_SIZE = (IMAGE_PX, IMAGE_PX)
_VIEW_PASSES = 96  # of students without a teacher, who train for longer and need no features
_NO_TEACHER = TeacherConfig(
    model="vit_tiny_patch16_224",
    pretrained=False,
    img_size=_SIZE,
    model_kwargs={"patch_size": 14, "depth": 3, "embed_dim": 24, "num_heads": 1, "num_classes": 10},
)


class Caches:
    """A folder of caches over one image set and teacher.

    Args:
        folder: Where they are, or will be.
        data_dir: Images as WebDataset shards.
        teacher: Folder of the teacher in timm's layout.
        num_images: Labelled images.
        passes: Views of each with targets.
    """

    def __init__(
        self,
        folder: Path,
        *,
        data_dir: str,
        teacher: str,
        num_images: int = NUM_IMAGES,
        passes: int = EPOCHS,
    ) -> None:
        self.folder = folder
        self.data_dir = data_dir
        self.teacher = TeacherConfig(model=f"local-dir:{teacher}", img_size=_SIZE)
        self.num_images = num_images
        self.passes = passes

    def get(self, name: str) -> Path:
        """The cache of a codec, of fewer passes (``passes-K``), or of views alone (``views``)."""
        path = self.folder / name.replace(":", "-").replace("=", "")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may want the same one
            if not (path / "manifest.json").exists():
                self._write(name, path)
        return path

    def _write(self, name: str, path: Path) -> None:
        if name == "views":
            self._cache(path, _NO_TEACHER, passes=_VIEW_PASSES, stages=(), codec="float16")
        elif name == "float16":
            self._cache(path, self.teacher, passes=self.passes, stages=(3, 4), codec=name)
        else:
            kept, _, passes = name.partition("passes-")
            with _remembered(self.get("float16")):
                self._cache(
                    path,
                    self.teacher,
                    passes=int(passes) if passes else self.passes,
                    stages=(4,),
                    codec=kept or "float16",
                )

    def _cache(self, path: Path, teacher: TeacherConfig, *, passes: int, **settings: Any) -> None:
        cache_teacher(
            CacheTeacherConfig.model_validate(
                {
                    **settings,
                    "teacher": teacher,
                    "data_dir": self.data_dir,
                    "output": path,
                    "limit": self.num_images,
                    "passes": passes,
                    "aug": AUG,
                    "precision": "bf16",
                    "workers": 0,
                }
            )
        )


@contextmanager
def _remembered(cache: Path) -> Iterator[None]:
    """Within, the pipeline's teacher answers from a float16 cache, by the pixels' hash."""
    reader = open_cache(cache)
    names = ["stage3/values", "stage4/values", "logits/values"]
    said: dict[int, list[np.ndarray]] = {}
    for number in range(reader.num_passes):
        for first, count in reader.blocks():
            rows = reader.read_rows(number, first, count, ["pixel_hash", *names])
            for row, seen in enumerate(rows["pixel_hash"].tolist()):
                said[seen] = [rows[name][row] for name in names]

    def run_teacher(_teacher: Teacher, pixels: Tensor, _precision: str) -> TeacherArrays:
        views = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
        found = zip(*(said[pixel_hash(view)] for view in views), strict=True)
        stage3, stage4, logits = (np.stack(values).astype(np.float32) for values in found)
        return TeacherArrays({3: stage3, 4: stage4}, logits)

    with (
        mock.patch.object(_calibrate, "run_teacher", run_teacher),
        mock.patch.object(_write_shards, "run_teacher", run_teacher),
    ):
        yield
