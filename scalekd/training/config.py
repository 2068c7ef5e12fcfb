"""Everything that decides a training run, in one frozen record with timm's flag names.

The same names are command line flags, keys of a recipe (YAML) and the lines of a run's
``args.yaml``; a name nobody knows is an error that says the nearest one, because a
misspelt hyperparameter that is quietly ignored costs a whole run.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from scalekd.distillation.config import ObjectiveName, ScaleKDConfig
from scalekd.errors import DataError, UsageError
from scalekd.image_options import ImageOptions
from scalekd.storage import parse_size
from scalekd.training.plain_yaml import dump_plain, load_plain, read_text
from scalekd.views import Interpolation

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Unit = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, BeforeValidator(parse_size)]
Mean = tuple[Unit, Unit, Unit]
Deviation = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _no(value: object) -> object:
    """YAML reads a bare ``no`` as false."""
    return "no" if value is False else value


class TrainConfig(ImageOptions):
    """One training run. Defaults train any student; a recipe overrides them, flags override both.

    Rates are per optimiser update, lengths in epochs, ``batch_size`` counts views per process
    and per micro-batch: one update sees ``batch_size * grad_accum_steps * processes`` views.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    recipe: str | None = None  # where the other values come from, for people

    # What is trained, from what.
    model: str
    cache: str | None = None
    data_dir: str | None = None
    split: str = "train"
    val_split: str | None = "val"
    val_cache: str | None = None
    local_cache: str | None = None
    local_cache_size: Size = 100 * 10**9
    img_size: Positive | None = None
    num_classes: Positive | None = None
    class_map: str = "auto"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    mean: Mean | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: Interpolation | None = None
    pretrained: bool = False
    initial_checkpoint: str | None = None
    freeze: tuple[str, ...] = ()
    drop_path: Fraction | None = None
    grad_checkpointing: bool = False
    tail_checkpointing: bool = False

    # What it learns from.
    objective: ObjectiveName = "scalekd"
    distillation: ScaleKDConfig = ScaleKDConfig()
    targets: str | None = None
    logits_from: tuple[str, ...] = ()
    online: bool = False
    teacher: str | None = None
    teacher_checkpoint: str | None = None
    smoothing: Fraction = 0.0
    bce_loss: bool = False
    allow_pixel_drift: NonNegative | None = None

    # How it is optimised.
    epochs: Positive = 100
    batch_size: Positive = 128
    grad_accum_steps: Positive = 1
    opt: str = "adamw"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 0.05
    wd_exclude: Literal["timm", "none"] = "timm"
    momentum: NonNegative = 0.9
    opt_eps: Annotated[float, Field(gt=0)] | None = None
    opt_betas: tuple[float, ...] | None = None
    opt_args: dict[str, Any] = Field(default_factory=dict)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    # How the learning rate moves.
    sched: Literal[
        "cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"
    ] = "cosine"
    sched_on_updates: bool = False
    warmup_epochs: NonNegative = 0
    warmup_lr: NonNegative = 1e-5
    warmup_prefix: bool = False
    cooldown_epochs: NonNegative = 0
    min_lr: NonNegative = 0.0
    decay_epochs: Annotated[float, Field(gt=0)] | None = None
    decay_milestones: tuple[float, ...] = (30, 60, 90)
    decay_rate: NonNegative = 0.1
    lr_cycle_mul: float = 1.0
    lr_cycle_decay: float = 0.5
    lr_cycle_limit: Positive = 1
    lr_k_decay: float = 1.0
    lr_noise: tuple[float, ...] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0

    # How it is computed.
    amp: Annotated[Literal["auto", "bf16", "fp16", "no"], BeforeValidator(_no)] = "auto"
    sync_bn: bool = False
    channels_last: bool | None = None  # None: for CNNs on CUDA
    torchcompile: str | None = None
    model_ema: bool = False
    model_ema_decay: Fraction = 0.9998
    model_ema_warmup: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    workers: Annotated[int, Field(ge=0)] = Field(default_factory=lambda: default_workers())

    # What is kept and shown.
    output: str
    resume: str | None = None
    overwrite: bool = False
    eval_interval: Positive = 1
    checkpoint_hist: Positive = 3
    recovery_interval: Annotated[int, Field(ge=0)] = 0
    log_interval: Positive = 50
    log_with: tuple[str, ...] = ()

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], *, source: str = "the options"
    ) -> "TrainConfig":
        """Check values from flags or a file.

        Args:
            values: Names of this record's fields, with ``-`` or ``_``, to values.
            source: Where they come from, for the error's text.

        Raises:
            UsageError: A name is unknown, missing or its value impossible.
        """
        named = {name.replace("-", "_"): value for name, value in values.items()}
        reject_unknown_keys(named, cls.model_fields, source=source)
        try:
            return cls(**named)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                record = _record_at(cls, first["loc"][:-1])
                reject_unknown_keys({name: None}, record.model_fields, source=source)
            if first["type"] == "missing":
                raise UsageError(f"{source}: {name!r} is missing, and has no default") from None
            raise UsageError(
                f"{source}: {name} = {_shown(first['input'])} is not possible: {first['msg']}"
            ) from None

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
            DataError: It cannot be read, or is not the configuration of a run.
        """
        try:
            return cls.from_mapping(read_yaml_mapping(path), source=str(path))
        except UsageError as error:
            raise DataError(str(error)) from error


def default_workers() -> int:
    """Four as in timm, or as many as this process may use cores, of which torch warns otherwise."""
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
            near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise UsageError(f"{source}: unknown key {_shown(name)}{hint}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold one mapping with text keys.

    Raises:
        UsageError: It cannot be read, is not YAML, or holds something else.
    """
    try:
        content = load_plain(read_text(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: expected a mapping of names to values")
    return content
