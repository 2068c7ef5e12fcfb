"""Options of ``scalekd evaluate``; help is made from them, and they load no torch."""

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from scalekd.image_options import ImageOptions, ImageSize
from scalekd.training.config import default_workers
from scalekd.views import Interpolation


class EvaluateConfig(ImageOptions):
    """Options of ``scalekd evaluate``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
    headings: ClassVar[dict[str, str]] = {
        "model": "Model and images",
        "labels": "Reading of the images",
        "teacher": "Agreement with a teacher",
        "knn_split": "Classification by features",
        "batch_size": "Computation",
    }

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
    """The model's class of each label, for subsets of its classes: auto, by name where both have
    names; none, by number; or a file with one number or name a line."""

    teacher: str | None = None
    """Name of a teacher to run on the same images; the agreement with it is measured."""
    teacher_checkpoint: str | None = None
    """The teacher's weights on disk: a safetensors file or a state dict."""
    teacher_pretrained: bool = True
    """Read the teacher's published weights; without them, or a checkpoint, weights are random."""
    teacher_cache: str | None = None
    """Cache of this split to read the teacher's logits from, in place of --teacher."""

    knn_split: str | None = None
    """Split whose features also classify the images by nearest neighbours; no such classification
    if not given."""
    knn_k: int = Field(default=20, ge=1)
    """Number of nearest neighbours that vote."""
    knn_temperature: float = Field(default=0.07, gt=0)
    """Temperature of the votes: a neighbour's weight is exp(cosine similarity / temperature)."""
    linear_probe: str | None = None
    """Split on whose frozen features a logistic regression is fitted, which also classifies the
    images; none is fitted if not given."""
    linear_probe_seeds: int = Field(default=1, ge=1, le=100)
    """Number of seeds, which divide that split differently to choose the strength of the penalty;
    the mean is reported."""

    batch_size: int = Field(default=128, ge=1)
    """Number of images in a batch of each process."""
    workers: int = Field(default_factory=default_workers, ge=0)
    """Number of processes that decode images; 4, or as many as there are cores, if not given."""
    amp: Literal["auto", "bf16", "fp16", "no"] = "no"
    """Precision of autocast: auto is bf16 where the device has it; no, or fp32, for none."""
