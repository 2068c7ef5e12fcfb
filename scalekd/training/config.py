"""Everything that decides a training run, in one frozen record with timm's flag names.

The same names are command line flags, keys of a recipe (YAML) and the lines of a run's
``args.yaml``. An unknown name is an error that suggests the nearest one: a misspelt
hyperparameter that was ignored would cost a whole run.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, Field, ValidationError

from scalekd.distillation.config import ObjectiveName, ScaleKDConfig
from scalekd.errors import DataError, UsageError
from scalekd.options import ImageOptions, ImageSize, StoredBytes, Workers
from scalekd.text import did_you_mean
from scalekd.training.plain_yaml import dump_plain, load_plain, read_text
from scalekd.views import Interpolation

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
Mean = tuple[Unit, Unit, Unit]
Deviation = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _nothing(value: object) -> object:
    """Read ``none`` of the command line as no value."""
    return None if value == "none" else value


def _no(value: object) -> object:
    """Return ``no`` for false: YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


class TrainConfig(ImageOptions):
    """One training run. Defaults train any student; a recipe overrides them, flags override both.

    Rates are per optimiser update, lengths in epochs, ``batch_size`` counts views per process
    and per micro-batch: one update sees ``batch_size * grad_accum_steps * processes`` views.
    """

    headings: ClassVar[dict[str, str]] = {
        "recipe": "Data and validation",
        "labels": "How images are read",
        "img_size": "Student",
        "objective": "Objective and teacher",
        "epochs": "Optimisation",
        "sched": "Learning rate",
        "amp": "Computation",
        "resume": "Checkpoints and logs",
    }
    """First field of each section of the command's help, with the section's title."""
    common: ClassVar[tuple[str, ...]] = (
        "recipe",
        "model",
        "cache",
        "data_dir",
        "output",
        "objective",
        "epochs",
        "batch_size",
        "lr",
        "resume",
    )
    """Fields whose options the help lists first."""

    recipe: str | None = None
    """Published recipe by name, or a YAML file of these options; options given here override it."""
    model: str
    """Student: a timm name, an alias (scalekd models), hf-hub:NAME or local-dir:FOLDER."""
    cache: str | None = None
    """Folder or URL of the cache that cache-teacher wrote; --objective none needs none."""
    data_dir: str | None = None
    """Folder, URL or pattern of the images; a cache that embeds views needs none."""
    output: str
    """Folder of the run: configuration, logs and checkpoints."""
    split: str = "train"
    """Name, folder or pattern of the training images."""
    val_split: Annotated[str | None, BeforeValidator(_nothing)] = "val"
    """Name, folder or pattern of the validation images, or none for training without validation."""
    val_cache: str | None = None
    """Cache of the validation images, to measure the agreement with its teacher; with the objective
    features, to measure the feature loss."""
    knn_split: str | None = None
    """Split whose labelled images classify those of --val-split as their nearest neighbours, which
    chooses the best epoch of the objective features; if not given, each half of --val-split
    classifies the other."""
    local_cache: str | None = None
    """Folder for copies of remote shards and blocks."""
    local_cache_size: StoredBytes = ByteSize(100 * 10**9)
    """Largest size of --local-cache, such as 500GB; the copies that were used longest ago are
    deleted."""

    img_size: ImageSize | None = None
    """Size of the student's images in pixels, as S for a square or H,W for height and width; the
    teacher's if not given."""
    num_classes: Annotated[int, Field(ge=0)] | None = None
    """Number of classes, if neither the teacher nor the images determine it; 0 for a student
    without a classifier, which is the default of the objective features."""
    class_map: str = "auto"
    """The teacher's class of each label: auto to use the mapping in the cache or match by name;
    none to match by number; or a file with one number or name per line."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Argument of the student's constructor as key=value; repeat the option for more."""
    mean: Mean | None = None
    """Mean of red, green and blue in 0..1, subtracted from the student's pixels; timm's if not
    given. It is stored with the run."""
    std: tuple[Deviation, Deviation, Deviation] | None = None
    """Standard deviation of red, green and blue in 0..1, by which the student's pixels are divided;
    given together with --mean."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the shorter side that the evaluation crop keeps; timm's if not given. It is stored
    with the run."""
    interpolation: Interpolation | None = None
    """Resize filter of evaluation and of --aug, where bilinear-opencv is cv2.resize without
    antialiasing; timm's if not given. It is stored with the run."""
    pretrained: bool = False
    """Start from the student's published weights."""
    initial_checkpoint: str | None = None
    """Start from weights on disk: a safetensors file, a state dict, the folder of an exported
    student, or another run, whose model is used if --model is not given."""
    freeze: tuple[str, ...] = ()
    """Parameter or module that is not trained, with * for any text, or backbone for all but the
    classifier; repeat the option for more."""
    drop_path: Fraction | None = None
    """Rate of stochastic depth; the student's own if not given."""
    grad_checkpointing: bool = False
    """Recompute the student's activations in the backward pass, which saves memory."""
    tail_checkpointing: bool = False
    """Recompute the activations of the teacher's tail in the backward pass, which saves memory."""

    objective: ObjectiveName = "scalekd"
    """Objective: scalekd as published; scalekd-light with smaller projectors, one for both views;
    features from the teacher's features only, without labels and logits; kd from logits only; none
    without a teacher, from a cache or from labelled images alone."""
    distillation: ScaleKDConfig = ScaleKDConfig()
    """Setting of the objective as key=value, such as kd=false, tpp=false, kd_alpha=0.5,
    temperature=2, summary_weight=1 or stage3.softmax_scale=1, or of one teacher of --targets, such
    as NAME.weight=0.5; repeat the option for more."""
    targets: str | None = None
    """Extension of the cache whose features, tail and logits are used, or base for the cache
    itself; with several names, separated by commas, the feature losses of these teachers are
    added."""
    logits_from: tuple[str, ...] = ()
    """Extension of the cache whose logits are used, or base for the cache itself; repeat the option
    for the mean of several teachers."""
    online: bool = False
    """Run the teacher, or those of --targets, during training, for views that the cache does not
    contain."""
    teacher: str | None = None
    """Name of the teacher for --online, if the name in the cache cannot be used on this machine;
    with several --targets, one name for each, separated by commas, and empty to use the name in the
    cache."""
    teacher_checkpoint: str | None = None
    """Weights of the teacher for --online on disk; with several --targets, one file for each, as
    for --teacher."""
    aug: str | None = None
    """View policy of training without a cache, as for cache-teacher, with new views in every epoch;
    crop-flip if not given."""
    smoothing: Fraction = 0.0
    """Label smoothing."""
    bce_loss: bool = False
    """Use sigmoid cross entropy, summed over classes, as task loss."""
    allow_pixel_drift: NonNegative | None = None
    """Mean difference, in 1/255, that pixels of replayed views may have from those the teacher saw;
    training stops at any difference if not given."""

    epochs: Positive = 100
    """Number of epochs."""
    batch_size: Positive = 128
    """Number of views in a batch of each process."""
    grad_accum_steps: Positive = 1
    """Number of batches of each process in an update."""
    opt: str = "adamw"
    """Optimiser, by its name in timm."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate after the warm-up."""
    weight_decay: NonNegative = 0.05
    """Weight decay."""
    wd_exclude: Literal["timm", "none"] = "timm"
    """Parameters without weight decay: timm for vectors, biases and position embeddings; none to
    decay all."""
    momentum: NonNegative = 0.9
    """Momentum of optimisers that have one."""
    opt_eps: Annotated[float, Field(gt=0)] | None = None
    """Epsilon of the optimiser; its own if not given."""
    opt_betas: tuple[float, ...] | None = None
    """Betas of the optimiser, such as 0.9,0.999; its own if not given."""
    opt_args: dict[str, Any] = Field(default_factory=dict)
    """Further argument of the optimiser as key=value; repeat the option for more."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer to the one below it."""
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Limit at which gradients are clipped."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What --clip-grad limits: the norm of all gradients, each value, or each unit's ratio of
    gradient to weight (agc)."""

    sched: Literal[
        "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"
    ] = "cosine"
    """Schedule of the learning rate, by its name in timm."""
    sched_on_updates: bool = False
    """Change the learning rate after every update instead of every epoch."""
    warmup_epochs: NonNegative = 0
    """Number of epochs in which the learning rate grows to --lr."""
    warmup_lr: NonNegative = 1e-5
    """Learning rate at the beginning of the warm-up."""
    warmup_prefix: bool = False
    """Add the warm-up epochs before --epochs instead of counting them within."""
    cooldown_epochs: NonNegative = 0
    """Number of epochs at --min-lr after the schedule."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the schedule."""
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between two decays of the step schedule, or length of the decay of wsd."""
    decay_milestones: tuple[float, ...] = (30, 60, 90)
    """Epochs at which the multistep schedule decays."""
    decay_rate: NonNegative = 0.1
    """Factor of a decay of the step and multistep schedules."""
    lr_cycle_mul: float = 1.0
    """Factor by which each cycle of the schedule is longer than the one before."""
    lr_cycle_decay: float = 0.5
    """Factor by which the learning rate of each cycle is lower than that of the one before."""
    lr_cycle_limit: Positive = 1
    """Number of cycles of the schedule."""
    lr_k_decay: float = 1.0
    """Exponent of k-decay in the cosine and poly schedules."""
    lr_noise: tuple[float, ...] | None = None
    """Share of the run, in 0..1, after which noise is added to the learning rate, or the two shares
    between which it is added."""
    lr_noise_pct: float = 0.67
    """Largest relative change of the learning rate by noise."""
    lr_noise_std: float = 1.0
    """Standard deviation of the noise of the learning rate."""

    amp: Annotated[Literal["auto", "bf16", "fp16", "no"], BeforeValidator(_no)] = "auto"
    """Precision of autocast: auto for bf16 if the device supports it; no or fp32 for none."""
    sync_bn: bool = False
    """Compute the student's batch norms over the views of all processes, which must be GPUs."""
    channels_last: bool | None = None
    """Keep the student's images and weights in channels-last memory format; for convolutional
    networks on CUDA if not given."""
    torchcompile: str | None = None
    """Compile the student with this backend of torch.compile; inductor if no backend is named."""
    model_ema: bool = False
    """Average the weights over updates, and evaluate the average as well as the student."""
    model_ema_decay: Fraction = 0.9998
    """Decay of the averaged weights at every update."""
    model_ema_warmup: bool = False
    """Use a smaller decay of the averaged weights at the beginning."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    """Seed of initial weights, order of samples and dropout."""
    workers: Workers = Field(default_factory=lambda: default_workers())
    """Number of processes that decode images; 4, or as many as there are cores, if not given."""

    resume: str | None = None
    """Continue a run: auto for the newest checkpoint in --output, or the folder of a checkpoint."""
    overwrite: bool = False
    """Delete the run in --output and start a new one."""
    eval_interval: Positive = 1
    """Number of epochs between validations."""
    checkpoint_hist: Positive = 3
    """Number of epochs whose checkpoints are kept."""
    recovery_interval: Annotated[int, Field(ge=0)] = 0
    """Number of updates between checkpoints within an epoch; 0 for none."""
    log_interval: Positive = 50
    """Number of updates between lines of the log."""
    log_with: tuple[str, ...] = ()
    """Tracker that receives metrics, such as tensorboard, wandb, mlflow or trackio; repeat the
    option for more."""

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], *, source: str | None = "the options"
    ) -> "TrainConfig":
        """Check values from flags or a file.

        Args:
            values: Names of this record's fields, with ``-`` or ``_``, to values.
            source: Origin of the values, for the error message; ``None`` for the command line,
                whose options are named as they are given.

        Raises:
            UsageError: A name is unknown, missing or its value impossible.
        """
        named = {name.replace("-", "_"): value for name, value in values.items()}
        reject_unknown_keys(named, cls.model_fields, source=source or "the options")
        try:
            return cls(**named)
        except ValidationError as error:
            first = error.errors()[0]
            field, *parts = map(str, first["loc"])
            name, option = ".".join([field, *parts]), f"--{field.replace('_', '-')}"
            if first["type"] == "extra_forbidden":
                record = _record_at(cls, first["loc"][:-1])
                unknown = ".".join(parts) if source is None else name
                reject_unknown_keys({unknown: None}, record.model_fields, source=source or option)
            if first["type"] == "missing":
                what = (
                    f"{option} is missing" if source is None else f"{source}: {name!r} is missing"
                )
                raise UsageError(f"{what}, and has no default") from None
            value, message = _shown(first["input"]), first["msg"].removeprefix("Value error, ")
            if source is None:
                setting = f" {'.'.join(parts)}" if parts else ""
                given = "" if isinstance(first["input"], Mapping) else f" (got {value})"
                raise UsageError(f"{option}{setting}: {message}{given}") from None
            raise UsageError(f"{source}: {name} = {value} is not possible: {message}") from None

    @property
    def objective_config(self) -> ScaleKDConfig:
        """``distillation`` with the task loss that ``smoothing`` and ``bce_loss`` choose."""
        changes: dict[str, Any] = {}
        if self.smoothing:
            changes["label_smoothing"] = self.smoothing
        if self.bce_loss:
            changes["task"] = "bce"
        return self.distillation.model_copy(update=changes)

    def to_yaml(self) -> str:
        return dump_plain(self.model_dump(mode="json"))

    @classmethod
    def from_yaml(cls, path: Path) -> "TrainConfig":
        """Read a run's ``args.yaml``.

        Raises:
            DataError: The file cannot be read, or is not the configuration of a run.
        """
        try:
            return cls.from_mapping(read_yaml_mapping(path), source=str(path))
        except UsageError as error:
            raise DataError(str(error)) from error


def default_workers() -> int:
    """Return four, as in timm, or the number of usable cores, above which torch warns."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, usable or 1)


def _record_at(record: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    for name in path:
        inner = record.model_fields[str(name)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        record = inner
    return record


def reject_unknown_keys(
    values: Mapping[str, Any], known: Mapping[str, Any], *, source: str
) -> None:
    """Raise a UsageError that names the first unknown key and the known key nearest to it."""
    for name in values:
        last = name.rpartition(".")[2]
        if last not in known:
            hint = did_you_mean(last, known, cutoff=0.5) or f"; known are {', '.join(known)}"
            raise UsageError(f"{source}: unknown key {_shown(name)}{hint}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold one mapping with text keys.

    Raises:
        UsageError: The file cannot be read, is not YAML, or holds something else.
    """
    try:
        content = load_plain(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: expected a mapping of names to values")
    return content
