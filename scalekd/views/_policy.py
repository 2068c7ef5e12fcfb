"""View policies, with their text form for command lines and their JSON form in a manifest."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_args

from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.views._component import Component, Triple, quoted
from scalekd.views._crop import CenterCrop, RandomCrop
from scalekd.views._erase import Erase
from scalekd.views._flip import Flip
from scalekd.views._interpolation import Interpolation
from scalekd.views._jitter import ColorJitter
from scalekd.views._rand import RandAugment

GEOMETRIES: tuple[type[RandomCrop | CenterCrop], ...] = (RandomCrop, CenterCrop)
COMPONENTS: tuple[type[Component], ...] = (Flip, RandAugment, ColorJitter, Erase)
"""All components, in the order in which they are applied; new ones are added here."""

PRESETS = {"crop-flip": "crop+flip"}
POLICY_GRAMMAR = "\n".join(
    (
        "A view policy is one geometry, then any of the others, joined by '+':",
        *(kind.grammar for kind in (*GEOMETRIES, *COMPONENTS)),
        "or a preset: crop-flip (= crop+flip), center.",
    )
)

_SYNTAX = [kind.grammar.split()[0] for kind in (*GEOMETRIES, *COMPONENTS)]
_SUMMARY = (
    f"a policy is {_SYNTAX[0]} or {_SYNTAX[1]}, then any of {', '.join(_SYNTAX[2:])}, joined by"
    f" '+', or a preset ({', '.join(PRESETS)})"
)

# Version of draws, rendering and their arguments. A change that affects a pixel or a stored number
# needs the next number.
POLICY_VERSION = 1
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


Kind = TypeVar("Kind", bound=Component)


@dataclass(frozen=True)
class ViewPolicy:
    """The distribution of views.

    Attributes:
        geometry: Component that cuts the view from the image.
        components: Components applied after it, at most one of a kind. They are sorted in the
            order of ``COMPONENTS``; those that never have an effect are omitted.
        interpolation: Filter of every resize and geometric operation.
        mean: RGB mean in 0..1: fill colour, and mean of the erasing noise.
        std: RGB standard deviation in 0..1 of the erasing noise.

    Raises:
        UsageError: A value is outside its range.
    """

    geometry: RandomCrop | CenterCrop = field(default_factory=RandomCrop)
    components: tuple[Component, ...] = ()
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        kinds = [type(component) for component in self.components]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise UsageError(f"the policy sets {kind.name} twice")
        ordered = sorted(self.components, key=lambda component: COMPONENTS.index(type(component)))
        active = tuple(component for component in ordered if not component.idle)
        object.__setattr__(self, "components", active)
        if self.interpolation not in get_args(Interpolation):
            names = " or ".join(get_args(Interpolation))
            raise UsageError(f"interpolation {self.interpolation!r}: views use {names}")
        if not all(0 <= value <= 1 for value in self.mean):
            raise UsageError(f"view policy: mean {self.mean} needs three numbers in 0..1")
        if not all(0 < value <= 1 for value in self.std):
            raise UsageError(f"view policy: std {self.std} needs three numbers in (0, 1]")

    @property
    def parts(self) -> tuple[Component, ...]:
        """The geometry and the other components."""
        return (self.geometry, *self.components)

    @property
    def deterministic(self) -> bool:
        """Whether every pass draws the same view of a sample."""
        return all(part.deterministic for part in self.parts)

    def component(self, kind: type[Kind]) -> Kind | None:
        """Return the component of a kind, such as ``RandAugment``; ``None`` without one."""
        return next((part for part in self.components if isinstance(part, kind)), None)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        interpolation: Interpolation = "bicubic",
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
    ) -> "ViewPolicy":
        """Parse a policy text such as ``crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25``.

        Args:
            text: Components in any order, at most one of a kind; see ``POLICY_GRAMMAR``.
            interpolation: Filter of every resize and geometric operation.
            mean: RGB mean in 0..1.
            std: RGB standard deviation in 0..1.

        Raises:
            UsageError: ``text`` is not a policy; the message lists the components.
        """
        try:
            parts = [_parse(part.strip()) for part in PRESETS.get(text.strip(), text).split("+")]
            geometries = [part for part in parts if isinstance(part, GEOMETRIES)]
            if len(geometries) != 1:
                raise UsageError(
                    "sets the geometry twice" if geometries else "needs crop or center"
                )
            return cls(
                geometry=geometries[0],
                components=tuple(part for part in parts if not isinstance(part, GEOMETRIES)),
                interpolation=interpolation,
                mean=mean,
                std=std,
            )
        except UsageError as error:
            raise UsageError(f"view policy {quoted(text)}: {error}; {_SUMMARY}") from None

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    def to_config(self) -> dict[str, Any]:
        """Return the JSON form for a manifest; ``from_config`` restores an equal policy."""
        return {
            "version": POLICY_VERSION,
            "policy": str(self),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ViewPolicy":
        """Make a policy from its JSON form.

        Raises:
            CacheMismatch: The policy was written by another version of the view format.
            CacheCorrupt: The JSON is not a view policy.
        """
        version = config.get("version")
        if isinstance(version, int) and version != POLICY_VERSION:
            raise CacheMismatch(
                f"the cache's views are of version {version} and this scalekd draws version "
                f"{POLICY_VERSION}; install the scalekd that wrote the cache, or a newer one"
            )
        try:
            if set(config) != {"version", "policy", "interpolation", "mean", "std"} or not version:
                raise ValueError(f"its entries are {sorted(map(str, config))}")
            if not isinstance(config["policy"], str):
                raise ValueError("the policy is no text")
            return cls.parse(
                config["policy"],
                interpolation=config["interpolation"],
                mean=_triple(config["mean"]),
                std=_triple(config["std"]),
            )
        except (ValueError, TypeError, UsageError) as error:
            raise CacheCorrupt(f"the view policy in the manifest cannot be read: {error}") from None


def _parse(text: str) -> Component:
    for kind in (*GEOMETRIES, *COMPONENTS):
        if text == kind.name:
            return kind.parse(None)
        if text.startswith(kind.name + kind.separator):
            return kind.parse(text[len(kind.name) + 1 :])
    name = text.partition(":")[0]
    names = [kind.name for kind in (*GEOMETRIES, *COMPONENTS)]
    close = difflib.get_close_matches(name, [*names, *PRESETS])
    hint = f"; the nearest is {' or '.join(close)}" if close else ""
    raise UsageError(f"no component {quoted(name)}{hint}")


def _triple(values: Any) -> Triple:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{values!r} is not an RGB triple")
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{values!r} has values that are not numbers")
    return cast(Triple, tuple(map(float, values)))
