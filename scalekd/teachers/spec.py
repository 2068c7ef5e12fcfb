"""Records of a requested teacher and of a loaded one."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from scalekd.models.arguments import ModelKwargs
from scalekd.models.classes import MAX_CLASSES, MAX_NAME_LENGTH, Classes
from scalekd.shapes import FeatureShape

ClassNames = Annotated[
    tuple[Annotated[str, Field(max_length=MAX_NAME_LENGTH)], ...], Field(max_length=MAX_CLASSES)
]


class TeacherConfig(BaseModel):
    """A teacher to load.

    Attributes:
        model: Any name that :func:`~scalekd.teachers.resolve_model_name` takes.
        checkpoint: Weights on disk, instead of the published ones.
        pretrained: Read the published weights; otherwise, and without ``checkpoint``, they are
            random but always the same.
        model_kwargs: Arguments of the timm model's constructor: JSON scalars or lists.
        img_size: Height and width in pixels when not the model's own; one number for a square.
        mean: Mean of RGB in 0..1 when not the model's own.
        std: Standard deviation of RGB in 0..1 when not the model's own.
        tail_blocks: Blocks of a ViT that count as its final stage. Stage 3 is what enters them.
        class_names: Name of each class, when the model's own description does not give them.
        keep_head: Keep a head that is no classifier, as the maker of an older cache did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    checkpoint: str | None = None
    pretrained: bool = True
    model_kwargs: ModelKwargs = Field(default_factory=dict)
    img_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    tail_blocks: int = Field(default=2, ge=1)
    class_names: ClassNames | None = None
    keep_head: bool = False

    @field_validator("img_size", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value


ABOUT_ORIGIN = frozenset({"model", "weights_source", "licence", "class_names"})
"""Fields of a :class:`TeacherSpec` that do not affect targets: the source of the weights and the
names of the classes."""


class TeacherSpec(BaseModel):
    """Description of a loaded teacher, as stored in a cache's manifest.

    Attributes:
        model: ``architecture.tag``, ``hf-hub:…`` or the name of a local folder.
        architecture: Name of the model in timm.
        family: Name of its family, such as ``swin``; ``features`` for a teacher without a tail.
        weights_sha256: SHA-256 of names, dtypes, shapes and bytes of the whole state dict.
        weights_source: Source of the weights.
        img_size: Height and width of the teacher's input, in pixels.
        mean: Mean per RGB channel, in 0..1.
        std: Standard deviation per RGB channel, in 0..1.
        interpolation: timm's name of the resize filter that the teacher was trained with.
        crop_pct: Share of the shorter side that its evaluation crop keeps.
        stages: Shape of the features of stage 3 and stage 4.
        num_classes: Number of logits; ``None`` for a teacher without a classifier.
        licence: Licence of the published weights, as timm records it.
        model_kwargs: Constructor arguments that differ from timm's defaults for the architecture.
        tail_blocks: Number of blocks in the tail of a ViT.
        class_names: Name of each class of the logits; omitted from documents if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    architecture: str
    family: str
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    weights_source: Literal["pretrained", "checkpoint", "random"]
    img_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    stages: dict[int, FeatureShape]
    num_classes: int | None
    licence: str | None
    model_kwargs: ModelKwargs
    tail_blocks: int = Field(ge=1)
    class_names: ClassNames | None = None

    @property
    def classes(self) -> Classes:
        """The classes of the teacher, for comparisons; zero classes without a classifier."""
        return Classes(f"the teacher {self.model}", self.num_classes or 0, self.class_names)

    @model_validator(mode="after")
    def _names_every_class(self) -> Self:
        if self.class_names is not None and len(self.class_names) != (self.num_classes or 0):
            raise ValueError(
                f"{len(self.class_names)} class names for {self.num_classes or 0} classes"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unknown_names(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Omit unknown class names: documents of older versions do not have the field."""
        document: dict[str, Any] = handler(self)
        if self.class_names is None:
            document.pop("class_names", None)
        return document
