"""Options of commands for runs and trained models; importing them does not import torch."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from scalekd.options import ImageOptions, ImageSize, Options, Workers
from scalekd.training.config import default_workers
from scalekd.views import Interpolation

_MAX_ONNX_SIDE = 8192


class EvaluateConfig(ImageOptions):
    """Options of ``scalekd evaluate``."""

    headings: ClassVar[dict[str, str]] = {
        "model": "Model and images",
        "labels": "How images are read",
        "teacher": "Agreement with a teacher",
        "knn_split": "Classification by features",
        "batch_size": "Computation",
    }
    common: ClassVar[tuple[str, ...]] = (
        "data_dir",
        "split",
        "use_ema",
        "checkpoint",
        "img_size",
        "class_map",
        "teacher",
        "knn_split",
        "batch_size",
    )

    model: str
    """A training run, a checkpoint folder in it, or a model by name."""
    data_dir: str
    """Folder, URL or pattern of the images."""
    split: str = "val"
    """Name, folder or pattern of the images to evaluate on."""
    use_ema: bool = False
    """Evaluate the averaged weights of a training run."""
    checkpoint: str | None = None
    """Weights on disk, for a model by name: a safetensors file or a state dict."""
    pretrained: bool = True
    """Read the published weights of a model by name; without them, or a checkpoint, weights are
    random."""
    img_size: ImageSize | None = None
    """Size of the images in pixels, as S for a square or H,W for height and width; the model's own
    if not given."""
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    """Share of the resized image's side that the centre crop keeps, above 0 and at most 1; the
    model's own if not given."""
    interpolation: Interpolation | None = None
    """Filter that resizes the images, where bilinear-opencv is cv2.resize without antialiasing; the
    model's own if not given."""
    class_map: str = "auto"
    """The model's class of each label, for subsets of its classes: auto to match by name if both
    have names; none to match by number; or a file with one number or name per line."""

    teacher: str | None = None
    """Name of a teacher to run on the same images; the agreement with it is measured."""
    teacher_checkpoint: str | None = None
    """The teacher's weights on disk: a safetensors file or a state dict."""
    teacher_pretrained: bool = True
    """Read the teacher's published weights; without them, or a checkpoint, weights are random."""
    teacher_cache: str | None = None
    """Cache of this split whose logits are used in place of --teacher."""

    knn_split: str | None = None
    """Split whose images also classify the evaluated images as nearest neighbours of their
    features; no such classification if not given."""
    knn_k: int = Field(default=20, ge=1)
    """Number of nearest neighbours that vote."""
    knn_temperature: float = Field(default=0.07, gt=0)
    """Temperature of the votes: a neighbour's weight is exp(cosine similarity / temperature)."""
    linear_probe: str | None = None
    """Split on whose frozen features a logistic regression is fitted, which also classifies the
    images; none is fitted if not given."""
    linear_probe_seeds: int = Field(default=1, ge=1, le=100)
    """Number of seeds; each divides that split differently to choose the strength of the penalty,
    and the mean is reported."""

    batch_size: int = Field(default=128, ge=1)
    """Number of images in a batch of each process."""
    workers: Workers = Field(default_factory=default_workers)
    """Number of processes that decode images; 4, or as many as there are cores, if not given."""
    amp: Literal["auto", "bf16", "fp16", "no"] = "no"
    """Precision of autocast: auto for bf16 if the device supports it; no or fp32 for none."""


def _onnx_size(value: object) -> object:
    """Read ``384``, ``512,640`` or ``512x640`` (height first), or ``any``."""
    if not isinstance(value, str) or value == "any":
        return value
    match = re.fullmatch(r"(\d{1,5})(?:[x,](\d{1,5}))?", value)
    sides = () if match is None else tuple(int(side or match[1]) for side in match.groups())
    if not sides or not all(1 <= side <= _MAX_ONNX_SIDE for side in sides):
        raise ValueError(
            f"is no size; give a side such as 384, height and width such as 512x640"
            f" (each from 1 to {_MAX_ONNX_SIDE}), or any"
        )
    return sides


OnnxSize = Annotated[tuple[int, int] | Literal["any"], BeforeValidator(_onnx_size)]


class ExportConfig(Options):
    """Options of ``scalekd export``."""

    run: Path
    """A training run, or a checkpoint folder in it."""
    output: Path
    """Folder or file to write, which must not exist."""
    format: Literal["timm", "hf", "safetensors", "onnx"] = "timm"
    """What is written: timm for a folder that timm.create_model('local-dir:DIR', pretrained=True)
    opens; hf for the same with a model card; safetensors for the bare weights; onnx for one file
    for onnxruntime and others."""
    use_ema: bool = False
    """Export the averaged (EMA) weights."""
    img_size: OnnxSize | None = None
    """Height and width of the images of an ONNX file in pixels, as 384 or 512x640, or any for a
    file that accepts images of all sizes; the student's if not given."""
    features: bool = False
    """Return feature maps as well from an ONNX file, as outputs features_0 (the finest),
    features_1, and so on, for detection and segmentation."""


class ReportConfig(Options):
    """Options of ``scalekd report``."""

    runs: tuple[Path, ...]
    """Training runs, or folders of runs."""
    output: Path = Path("report.html")
    """HTML file to write; an existing file is replaced."""
    cache_page: Path | None = None
    """Page of the runs' cache, written by scalekd cache show, to which the report links; if not
    given, cache.html beside --output, if it exists."""


class DemoConfig(Options):
    """Options of ``scalekd demo``."""

    output: Path = Path("output/demo")
    """New folder for all files of the demo."""
    overwrite: bool = False
    """Delete the files of an earlier demo in --output."""


class RecipesConfig(Options):
    """Options of ``scalekd recipes``."""

    name: str | None = None
    """A shipped recipe; all are listed if not given."""
    gpus: int = Field(default=8, ge=1)
    """Number of GPUs used by both commands."""
    passes: int = Field(default=8, ge=1, le=9999)
    """Number of views cached for each image."""
    online: bool = False
    """Draw fresh views in every epoch, with a live teacher."""
    baseline: bool = False
    """Train the student alone, on the recipe's views."""
    tflops: float = Field(default=100.0, gt=0)
    """Assumed throughput of a GPU in TFLOP/s, to estimate hours."""
