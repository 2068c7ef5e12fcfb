"""Teachers: frozen timm models that return the features of their last two stages and logits."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from scalekd.errors import UsageError
from scalekd.models.arguments import constructor_arguments
from scalekd.models.build import (
    build_model,
    create_on_meta,
    preprocessing_of,
)
from scalekd.models.levels import find_levels
from scalekd.models.names import ModelSource, describe_model
from scalekd.models.normalise import Normalise
from scalekd.models.weights import weights_sha256
from scalekd.teachers.families import FAMILIES, Family, family_of
from scalekd.teachers.features_only import FeaturesOnly
from scalekd.teachers.heads import class_names_of, why_no_classifier
from scalekd.teachers.names import ALIAS_SIZES, resolve_model_name
from scalekd.teachers.spec import TeacherConfig, TeacherSpec
from scalekd.teachers.tail import Tail, TailConfig

_USUAL_CLASSES = 1000  # for an architecture without weights in timm
_RANDOM_SEED = 0  # random teachers are equal in all processes and after a resume


class TeacherOutput(NamedTuple):
    """The outputs of a teacher for a batch.

    Attributes:
        features: Features of stage 3 (the input of the tail, without norm) and stage 4 (after the
            last norm), each ``(batch, token, channel)`` with prefix tokens first.
        logits: Logits ``(batch, class)``; ``None`` for a teacher without a head.
    """

    features: dict[int, Tensor]
    logits: Tensor | None


class Teacher(nn.Module):
    """A frozen model that stays in eval mode. Made by :func:`load_teacher`.

    Attributes:
        spec: Description of the teacher, for manifests.
        model: The timm model.
        no_classifier: Clause that says why the teacher has no logits; ``None`` if it has them.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: TeacherSpec,
        family: Family,
        *,
        no_classifier: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.no_classifier = no_classifier
        self.family = family
        self.prefix_tokens: Tensor | None = None
        self._normalise = Normalise(spec.mean, spec.std)
        self.requires_grad_(False)
        super().train(False)

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> TeacherOutput:
        """Compute features and logits of a batch in one forward pass of the model.

        Under autocast the model runs in the lower precision; the normalisation does not.

        Raises:
            ValueError: The pixels are not uint8 RGB of the teacher's image size.
        """
        images = self.normalise(pixels)
        stage3, stage4, logits = self.family.outputs(
            self.model, images, self.spec.tail_blocks, logits=self.spec.num_classes is not None
        )
        return TeacherOutput({3: stage3, 4: stage4}, logits)

    @property
    def device(self) -> torch.device:
        """The device of the teacher."""
        return self._normalise.mean.device

    @property
    def has_tail(self) -> bool:
        """Whether the last stage runs by itself, as teacher parameter perception needs."""
        return self.spec.family in FAMILIES

    def normalise(
        self, pixels: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Subtract the mean and divide by the standard deviation, in float32 on the device."""
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, *self.spec.img_size):
            height, width = self.spec.img_size
            raise ValueError(
                f"{self.spec.model} takes uint8 pixels (batch, 3, {height}, {width}), not "
                f"{pixels.dtype} {tuple(pixels.shape)}"
            )
        normalised: Tensor = self._normalise(pixels)
        return normalised

    def calibrate_prefix(
        self, entering: Iterable[Float[Tensor, "batch token channel"]]
    ) -> Float[Tensor, "prefix channel"] | None:
        """Set the constant prefix tokens of later tails to the mean over calibration images.

        Args:
            entering: Stage-3 features of calibration images, batch by batch, prefix tokens first;
                the result does not depend on their order beyond rounding in float64.

        Returns:
            The mean over all images, or ``None`` for a teacher without prefix tokens.

        Raises:
            ValueError: There were no images.
        """
        num_prefix_tokens = self.spec.stages[3].num_prefix_tokens
        if not num_prefix_tokens:
            return None
        total, num_images = torch.zeros((), dtype=torch.float64), 0
        for features in entering:
            prefix = features[:, :num_prefix_tokens].detach()
            total = total + prefix.cpu().double().sum(dim=0)
            num_images += len(prefix)
        if not num_images:
            raise ValueError("no images to calibrate the prefix tokens on")
        self.prefix_tokens = (total / num_images).float()
        return self.prefix_tokens

    def tail(self) -> Tail:
        """Return a copy of the last stage, norm and head, on the CPU.

        The constant prefix tokens are those of the last :meth:`calibrate_prefix`. Without such a
        call, a tail that needs prefix tokens must get them in every forward pass.

        Raises:
            UsageError: The last stage does not run by itself.
        """
        if not self.has_tail:
            raise UsageError(f"{self.spec.model} has no tail: only its features can be distilled")
        spec = self.spec
        config = TailConfig(
            architecture=spec.architecture,
            family=spec.family,  # type: ignore[arg-type]
            model_kwargs=spec.model_kwargs,
            img_size=spec.img_size,
            num_classes=spec.num_classes or 0,
            global_pool=self.family.pooling(self.model),
            tail_blocks=spec.tail_blocks,
        )
        tail = Tail.from_config(config)
        state = {}
        for name, tensor in self.model.state_dict().items():
            tail_name = self.family.tail_name(name, self.model, spec.tail_blocks)
            if tail_name is not None:
                state[f"model.{tail_name}"] = tensor.detach()
        rope = self.family.rope(self.model, spec.tail_blocks)
        if rope is not None:
            state["rope"] = rope
        tail.load_state_dict(state)
        if self.prefix_tokens is not None:
            tail.set_prefix_tokens(self.prefix_tokens)
        return tail

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the teacher stays in eval mode, without stochastic depth or dropout."""
        return self


def load_teacher(config: TeacherConfig) -> Teacher:
    """Build the teacher of a configuration, frozen, on the CPU.

    Raises:
        UsageError: The model is unknown or unsupported, does not accept the image size or an
            argument, or does not fit the checkpoint.
        DataError: A checkpoint or model folder cannot be read.
        EnvironmentFault: Published weights are neither cached nor reachable.
    """
    name, _ = resolve_model_name(config.model)
    source = describe_model(name)
    kwargs = {**source.model_args, **config.model_kwargs}
    size = config.img_size
    if size is None and (side := ALIAS_SIZES.get(config.model.strip())) is not None:
        size = (side, side)
    if size is not None and _takes_img_size(source):
        kwargs["img_size"] = size
    asked = kwargs.get("num_classes")
    if asked is None:
        asked = source.pretrained_cfg.get("num_classes", _USUAL_CLASSES)
    no_classifier = why_no_classifier(
        source,
        int(asked),
        reads_published=config.pretrained and config.checkpoint is None,
        named=config.class_names is not None,
    )
    if no_classifier is not None and not config.keep_head:
        kwargs["num_classes"] = 0
    model = build_model(
        source,
        pretrained=config.pretrained,
        checkpoint=config.checkpoint,
        model_kwargs=kwargs,
        seed=_RANDOM_SEED,
    ).eval()
    img_size = _image_size(model, source, size)
    family = family_of(model, source.architecture) or FeaturesOnly(
        find_levels(model, source.label, img_size, role="teacher")
    )
    try:
        family.check(model, config.tail_blocks)
    except UsageError as error:
        raise UsageError(f"{source.label}: {error}") from error
    _check_image_size(source.label, family.size_multiple(model), img_size)
    spec = _spec(config, source, model, family, kwargs, img_size)
    return Teacher(model, spec, family, no_classifier=None if spec.num_classes else no_classifier)


def _spec(
    config: TeacherConfig,
    source: ModelSource,
    model: nn.Module,
    family: Family,
    kwargs: dict[str, Any],
    img_size: tuple[int, int],
) -> TeacherSpec:
    own = preprocessing_of(model)
    known = set(constructor_arguments(type(model))) - {"img_size", "num_classes", "global_pool"}
    model_kwargs = {k: v for k, v in kwargs.items() if k in known and v is not None}
    if "global_pool" in kwargs or source.pretrained_cfg.get("global_pool"):
        # The configuration of a model folder sets the pooling outside the arguments.
        usual = create_on_meta(source.architecture, {})
        pooling = getattr(model, "global_pool", None)
        if pooling is not None and pooling != getattr(usual, "global_pool", None):
            model_kwargs["global_pool"] = str(pooling)
    weights: Literal["pretrained", "checkpoint", "random"]
    weights = "pretrained" if config.pretrained else "random"
    if config.checkpoint is not None:
        weights = "checkpoint"
    num_classes = int(model.num_classes)  # type: ignore[arg-type]
    names = None
    if num_classes:
        names = class_names_of(
            source, num_classes, published=weights == "pretrained", given=config.class_names
        )
    elif config.class_names is not None:
        raise UsageError(
            f"--teacher-classes: {source.label} gives no logits to name the classes of"
        )
    return TeacherSpec(
        model=source.label,
        architecture=source.architecture,
        family=family.name,
        weights_sha256=weights_sha256(model.state_dict()),
        weights_source=weights,
        img_size=img_size,
        mean=config.mean or own.mean,
        std=config.std or own.std,
        interpolation=own.interpolation,
        crop_pct=own.crop_pct,
        stages=family.stages(model, config.tail_blocks),
        num_classes=num_classes or None,
        licence=source.pretrained_cfg.get("license") if weights == "pretrained" else None,
        model_kwargs=model_kwargs,
        tail_blocks=config.tail_blocks,
        class_names=names,
    )


def _takes_img_size(source: ModelSource) -> bool:
    """Return whether the constructor has an image size; most convolutional models have none."""
    if source.pretrained_cfg.get("fixed_input_size"):
        return True
    return "img_size" in constructor_arguments(type(create_on_meta(source.architecture, {})))


def _image_size(
    model: nn.Module, source: ModelSource, asked: tuple[int, int] | None
) -> tuple[int, int]:
    embed: Any = getattr(model, "patch_embed", None)
    own = source.pretrained_cfg.get("input_size") or (3, 224, 224)
    height, width = getattr(embed, "img_size", None) or asked or own[1:]
    return int(height), int(width)


def _check_image_size(label: str, multiple: tuple[int, int], img_size: tuple[int, int]) -> None:
    for side, step in zip(img_size, multiple, strict=True):
        if side % step:
            sizes = ", ".join(str(max(1, side // step + offset) * step) for offset in (0, 1, 2))
            raise UsageError(
                f"{label} takes image sizes that are multiples of {step} px, such as {sizes}, "
                f"not {img_size[0]} x {img_size[1]}"
            )
