"""The caches that the grid reads, each made when it is first asked for.

The teacher runs once over the regime's views, into ``float16``, with both stages. Codecs and
shorter caches are written by the same pipeline from a teacher that remembers what it said of these
pixels, so that they see identical features.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.accuracy.grid import AUG, REGIME, SHORT, TEACHER_PX, Regime, Run, teacher_size
from scalekd.cache import open_cache
from scalekd.loading.views import pixel_hash
from scalekd.pipelines import _calibration_views, _write_shards
from scalekd.pipelines._teacher_stream import TeacherArrays
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.teachers import Teacher, TeacherConfig
from scalekd.training.precision import choose_precision

_SIZE = (TEACHER_PX, TEACHER_PX)
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
        regime: Which views of how many images.
    """

    def __init__(
        self, folder: Path, *, data_dir: str, teacher: str, regime: Regime = REGIME
    ) -> None:
        # Caches of another regime, left by an earlier version, must not be taken for these.
        self.folder = folder / f"{TEACHER_PX}px-{regime.num_images}x{regime.passes}"
        self.data_dir = data_dir
        self.teacher = TeacherConfig(model=f"local-dir:{teacher}", img_size=_SIZE)
        self.regime = regime

    def get(self, run: Run) -> Path:
        """The cache that a run reads."""
        # Views are drawn for as long as the run; the other caches have the passes of the regime.
        return self._named(f"views-{run.epochs}" if run.cache == "views" else run.cache)

    def _named(self, name: str) -> Path:
        path = self.folder / name.replace(":", "-").replace("=", "")
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two workers may want the same one
            if not (path / "manifest.json").exists():
                self._write(name, path)
        return path

    def _write(self, name: str, path: Path) -> None:
        counted = name.startswith(("views-", "passes-"))
        kind, _, count = name.partition("-") if counted else (name, "", "")
        settings: dict[str, Any] = {"codec": "float16", "stages": (4,)}
        if kind == "views":
            self._cache(path, _NO_TEACHER, **settings | {"passes": int(count), "stages": ()})
        elif (teacher_px := teacher_size(name)) is not None:
            teacher = self.teacher.model_copy(update={"img_size": (teacher_px, teacher_px)})
            self._cache(path, teacher, **settings | {"passes": SHORT})
        elif kind == "float16":
            settings |= {"passes": self.regime.passes, "stages": (3, 4)}
            self._cache(path, self.teacher, **settings)
        else:
            settings |= _asked(name) if not count else {"passes": int(count)}
            with _remembered(self._named("float16")):
                self._cache(path, self.teacher, **settings)

    def _cache(self, path: Path, teacher: TeacherConfig, **settings: Any) -> None:
        cache_teacher(
            CacheTeacherConfig.model_validate(
                {
                    **settings,
                    "teacher": teacher,
                    "data_dir": self.data_dir,
                    "limit": self.regime.num_images,
                    "output": path,
                    "aug": AUG,
                    "precision": "bf16" if choose_precision("auto") == "bf16" else "fp32",
                    "workers": 0,
                }
            )
        )


def _asked(name: str) -> dict[str, Any]:
    """Passes, codec and stages of a cache named ``KxCODEC`` or ``KxCODEC+3``, or of a codec."""
    count, _, codec = name.partition("x")
    if count.isdecimal():
        stages = (3, 4) if codec.endswith("+3") else (4,)
        return {"passes": int(count), "codec": codec.removesuffix("+3"), "stages": stages}
    return {"passes": SHORT, "codec": name}


@contextmanager
def _remembered(cache: Path) -> Iterator[None]:
    """Inside the block, the pipeline's teacher returns the values of a float16 cache."""
    reader = open_cache(cache)
    names = ["stage3/values", "stage4/values", "logits/values"]
    outputs: dict[int, list[np.ndarray]] = {}
    for number in range(reader.num_passes):
        for first, count in reader.blocks():
            rows = reader.read_rows(number, first, count, ["pixel_hash", *names])
            for row, seen in enumerate(rows["pixel_hash"].tolist()):
                outputs[seen] = [rows[name][row] for name in names]

    def run_teacher(_teacher: Teacher, pixels: Tensor, _precision: str) -> TeacherArrays:
        views = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())
        columns = zip(*(outputs[pixel_hash(view)] for view in views), strict=True)
        stage3, stage4, logits = (np.stack(values).astype(np.float32) for values in columns)
        return TeacherArrays({3: stage3, 4: stage4}, logits)

    with (
        mock.patch.object(_calibration_views, "run_teacher", run_teacher),
        mock.patch.object(_write_shards, "run_teacher", run_teacher),
    ):
        yield
