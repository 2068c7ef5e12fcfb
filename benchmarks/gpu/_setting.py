"""What the sections share: sizes, inputs made once, a stopwatch, and findings as JSON lines."""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._codec_files import load_codec, save_codec
from scalekd.codecs import FeatureCodec, fit_codec
from scalekd.shapes import FeatureShape
from scalekd.teachers import Teacher, TeacherConfig, load_teacher
from scalekd.threads import one_thread

# Real features of a middle layer cost about 1.7 bits a value at an error of 1 %, final ones 0.4
# (docs/codec.md); made-up features with these spectra cost about as much.
_SPECTRA = {
    3: {"decay": 0.35, "common": 0.5, "noise": 0.3},
    4: {"decay": 0.5, "common": 1.4, "noise": 0.02},
}


@dataclass(frozen=True)
class Setting:
    """Sizes of a run.

    Attributes:
        tiny: Take models and counts that a CPU does in seconds.
        work: Folder for images, codecs and caches, shared by the sections.
        output: File of the findings.
        photos: Folder of JPEG files; noise is drawn where there are none.
        ends: When the section is to be over, in seconds since the epoch.
    """

    tiny: bool
    work: Path
    output: Path
    photos: Path | None
    ends: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def teacher(self) -> TeacherConfig:
        """A Swin-L, untrained: nothing here depends on what it has learnt."""
        if self.tiny:
            kwargs = {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]}
            return TeacherConfig(
                model="swin_tiny_patch4_window7_224",
                pretrained=False,
                img_size=(64, 64),
                model_kwargs={**kwargs, "window_size": 2},
            )
        return TeacherConfig(model="swin_l", pretrained=False, img_size=(224, 224))

    @property
    def shapes(self) -> dict[int, FeatureShape]:
        if self.tiny:
            return {3: FeatureShape((4, 4), 128), 4: FeatureShape((2, 2), 256)}
        return {3: FeatureShape((14, 14), 768), 4: FeatureShape((7, 7), 1536)}

    @property
    def img_size(self) -> int:
        return 64 if self.tiny else 224

    @property
    def batch_size(self) -> int:
        return 8 if self.tiny else 128

    @property
    def num_samples(self) -> int:
        return 64 if self.tiny else 12_288

    @property
    def num_workers(self) -> int:
        return 1 if self.tiny else max(1, len(os.sched_getaffinity(0)) - 2)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.time()

    def load_teacher(self) -> Teacher:
        return load_teacher(self.teacher).to(self.device)

    def report(self, section: str, **facts: Any) -> None:
        """Print a finding, and append it to the file of results."""
        line = json.dumps({"section": section, **facts}, default=str)
        print(line, flush=True)
        with self.output.open("a") as file:
            file.write(line + "\n")

    def part(
        self, section: str, name: str, work: Callable[[], None], *, needs: float = 0.0
    ) -> None:
        """Run a part that may fail by itself; the parts after it go on.

        Args:
            section: Of the finding.
            name: Of the part.
            work: Reports its findings.
            needs: Seconds it takes; it is left out, and said so, when fewer are left.
        """
        if self.seconds_left < needs:
            self.report(section, part=name, skipped=f"{self.seconds_left:.0f} s are left")
            return
        try:
            work()
        except Exception as error:
            trace = traceback.format_exc(limit=-4)[-900:]
            text = f"{type(error).__name__}: {error}"[:600]
            self.report(section, part=name, failed=text, trace=trace)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], *, tiny: bool, seconds: float = 1.0) -> float:
    """Of a call, by the clock, with the device drained at both ends."""
    work()
    if not tiny:
        work()
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    once = time.perf_counter() - started
    count = 1 if tiny else max(5, min(200, int(seconds / max(once, 1e-4))))
    started = time.perf_counter()
    for _ in range(count):
        work()
    synchronize()
    return (time.perf_counter() - started) / count * 1e3


def made_up_features(
    stage: int, shape: FeatureShape, num_views: int, *, seed: int
) -> np.ndarray[Any, Any]:
    """float32 features: channels mixed from sources whose variance falls with their rank."""
    spectrum = _SPECTRA[stage]
    random = np.random.default_rng(seed)
    sources = min(384, shape.num_channels)
    mixing = np.random.default_rng(0).standard_normal((sources, shape.num_channels))
    mixing *= np.arange(1, sources + 1)[:, None] ** -spectrum["decay"]
    own = random.standard_normal((num_views, shape.num_tokens, sources), dtype=np.float32)
    common = random.standard_normal((num_views, 1, sources), dtype=np.float32)
    features = (own + spectrum["common"] * common) @ mixing.astype(np.float32)
    noise = random.standard_normal(features.shape, dtype=np.float32)
    return np.asarray(features + spectrum["noise"] * noise, np.float32)


def ready_codec(setting: Setting, stage: int) -> FeatureCodec:
    """The default codec, fitted to made-up features once and kept on disk.

    A real fit takes minutes, and speed hardly depends on it.
    """
    shape = setting.shapes[stage]
    path = setting.work / f"codec-{stage}.safetensors"
    if not path.exists():
        views = made_up_features(stage, shape, 64 if setting.tiny else 120, seed=0)
        partial = setting.work / f"codec-{stage}.{os.getpid()}.safetensors"
        with one_thread():  # several fits run side by side
            codec = fit_codec("transform:error=0.01", shape, [views])
        save_codec(partial, codec)
        partial.rename(path)
    return load_codec(path, shape)


def image_folder(setting: Setting) -> Path:
    """Class folders with as many samples as are wanted: hard links to a few files."""
    folder = setting.work / "images"
    if folder.exists():
        return folder
    partial = setting.work / f"images.{os.getpid()}"
    source = partial / "distinct"
    source.mkdir(parents=True)
    given = sorted(setting.photos.glob("*.JPEG")) if setting.photos else []
    for number in range(16 if setting.tiny else max(64, len(given))):
        target = source / f"{number:05d}.jpg"
        if given:
            shutil.copyfile(given[number % len(given)], target)
        else:
            noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(target)
    distinct = sorted(source.glob("*.jpg"))
    for number in range(setting.num_samples):
        target = partial / "train" / f"class{number % 20:03d}"
        target.mkdir(parents=True, exist_ok=True)
        os.link(distinct[number % len(distinct)], target / f"{number:06d}.jpg")
    shutil.rmtree(source)
    partial.rename(folder)
    return folder
