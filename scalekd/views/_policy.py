"""What views are drawn from: a short text that people type, and its JSON form in a manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from scalekd.errors import CacheCorrupt, CacheMismatch, UsageError
from scalekd.views._components import (
    POLICY_GRAMMAR,
    PRESETS,
    CenterCrop,
    RandAugment,
    RandomCrop,
    parse_component,
    plain,
)
from scalekd.views._params import Interpolation, Triple

# Names the draws, the rendering and their arguments. A change to any of them that moves a pixel
# or a stored number needs the next number here.
POLICY_VERSION = 1
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ViewPolicy:
    """The distribution of views. Components apply in the order crop, flip, rand, erase.

    Attributes:
        geometry: Where the view is cut from.
        flip: Probability of mirroring.
        rand: Colour and shape operations, or None.
        erase: Probability of erasing a box.
        interpolation: Filter of every resize and geometric operation.
        mean: RGB mean in 0..1: fill colour, and mean of the erasing noise.
        std: RGB standard deviation in 0..1 of the erasing noise.

    Raises:
        UsageError: A value is outside its range.
    """

    geometry: RandomCrop | CenterCrop = field(default_factory=RandomCrop)
    flip: float = 0.0
    rand: RandAugment | None = None
    erase: float = 0.0
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, probability in (("flip", self.flip), ("erase", self.erase)):
            if not 0 <= probability <= 1:
                raise UsageError(f"{name}:{probability}: needs a probability in 0..1")
        if self.interpolation not in get_args(Interpolation):
            names = " or ".join(get_args(Interpolation))
            raise UsageError(f"interpolation {self.interpolation!r}: views use {names}")
        if not all(0 <= value <= 1 for value in self.mean):
            raise UsageError(f"view policy: mean {self.mean} needs three numbers in 0..1")
        if not all(0 < value <= 1 for value in self.std):
            raise UsageError(f"view policy: std {self.std} needs three numbers in (0, 1]")

    @property
    def deterministic(self) -> bool:
        """Every pass draws the same view of a sample."""
        random_crop = isinstance(self.geometry, RandomCrop)
        applied = self.rand is not None and self.rand.probability > 0
        return not random_crop and self.flip in (0, 1) and not applied and not self.erase

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        interpolation: Interpolation = "bicubic",
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
    ) -> "ViewPolicy":
        """Read a policy text such as ``crop+flip+rand-m9-n2-mstd0.5-inc1+erase:0.25``.

        Args:
            text: Components in any order, at most one of a kind; see ``POLICY_GRAMMAR``.
            interpolation: Filter of every resize and geometric operation.
            mean: Usually the teacher's normalisation mean.
            std: Usually the teacher's normalisation deviation.

        Raises:
            UsageError: ``text`` is no policy; the message lists the grammar.
        """
        fields: dict[str, Any] = {}
        for component in PRESETS.get(text.strip(), text).split("+"):
            field, value = parse_component(component.strip(), text)
            if field in fields:
                raise UsageError(f"view policy {text!r} sets the {field} twice\n{POLICY_GRAMMAR}")
            fields[field] = value
        if "geometry" not in fields:
            raise UsageError(f"view policy {text!r} needs crop or center\n{POLICY_GRAMMAR}")
        return cls(**fields, interpolation=interpolation, mean=mean, std=std)

    def __str__(self) -> str:
        parts = [str(self.geometry)]
        if self.flip:
            parts.append("flip" if self.flip == 0.5 else f"flip:{plain(self.flip)}")
        if self.rand is not None:
            parts.append(str(self.rand))
        if self.erase:
            parts.append(f"erase:{plain(self.erase)}")
        return "+".join(parts)

    def to_config(self) -> dict[str, Any]:
        """JSON form, for a manifest; ``from_config`` gives back an equal policy."""
        return {
            "version": POLICY_VERSION,
            "policy": str(self),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ViewPolicy":
        """Read the JSON form.

        Raises:
            CacheMismatch: It was written by another version of the view format.
            CacheCorrupt: It is no view policy.
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


def _triple(values: Any) -> Triple:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{values!r} is no RGB triple")
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"{values!r} holds something else than numbers")
    return cast(Triple, tuple(map(float, values)))
