"""Which students are trained for which question.

The regime is small enough for two CPU cores and is the same for every arm: 500 labelled CIFAR-10
images, 24 epochs of them (11,520 views of 56 px, the teacher's too: 4 x 4 tokens, a new view of
every image in every epoch), batches of 32, AdamW, one epoch of warm-up, cosine to zero, bf16
autocast. Few labels, because there a student overfits and a teacher has something to add; the
teacher has seen them all, with their labels. At 56 px, half of what it was tuned at, it is right on
80 % of validation images and on 82 % of the training views. The CNN's rates come from exploratory
runs on seed 0, which no table uses; the ViT's are not tuned.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

IMAGE_PX = 56
NUM_IMAGES = 500
EPOCHS = 24
BATCH_SIZE = 32
AUG = "crop:0.35..1+flip"
SEEDS = (1, 2, 3)

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Half the width of ResNet-18: 2.8 M parameters.
    "resnet18-half": ("resnet18", {"channels": [32, 64, 128, 256]}),
    # Half the depth of ViT-Ti, 16 tokens: 2.8 M parameters.
    "vit-tiny-6": ("vit_tiny_patch16_224", {"patch_size": 14, "depth": 6}),
}
CNN, VIT = STUDENTS

RATES: dict[str, dict[str, float]] = {
    CNN: {"none": 3e-3, "kd": 3e-3, "scalekd-light": 3e-3, "scalekd": 3e-3},
    VIT: {"none": 1e-3, "kd": 1e-3, "scalekd-light": 1e-3, "scalekd": 1e-3},
}

# Plain training in the CPU seconds of ScaleKD: the measured ratio of their steps, rounded.
EQUAL_TIME = 4

CODECS = (
    "int8",
    "transform:error=0.001",
    "transform:error=0.005",
    "transform:error=0.01",
    "transform:error=0.02",
    "transform:error=0.05",
    "transform:error=0.1",
)
PASSES = (1, 2, 4, 8)


class Run(NamedTuple):
    """One student to train; two arms that agree in this are the same run.

    Attributes:
        student: Key of `STUDENTS`.
        objective: As ``--objective``, or ``stage3``: with the extra target.
        distillation: Knobs of the objective, by dotted name.
        cache: Which cache: a codec's name, ``passes-K``, or ``views``, which has no targets.
        epochs: Over the labelled images.
        seed: Of weights and order.
        rate: Learning rate; None is the one in `RATES`.
        online: The teacher runs live.
    """

    student: str
    objective: str
    distillation: tuple[tuple[str, Any], ...] = ()
    cache: str = "float16"
    epochs: int = EPOCHS
    seed: int = 0
    rate: float | None = None
    online: bool = False

    @property
    def learning_rate(self) -> float:
        return self.rate or RATES[self.student][self.cli_objective]

    @property
    def cli_objective(self) -> str:
        """The library's name of the objective; the extra target is added to it."""
        return "scalekd-light" if self.objective == "stage3" else self.objective

    @property
    def key(self) -> str:
        """The run's identity in the results; its rate is recorded beside it."""
        low = set(LOW_WEIGHTS) <= set(self.distillation)
        others = [knob for knob in self.distillation if not (low and knob in LOW_WEIGHTS)]
        knobs = ",".join(["weights*0.3"] * low + [f"{name}={value}" for name, value in others])
        parts = [self.student, self.objective, knobs, self.cache, f"{self.epochs}ep"]
        parts += [f"seed{self.seed}", f"lr{self.learning_rate:g}"]
        return " ".join(part for part in [*parts, "online" if self.online else ""] if part)


class Arm(NamedTuple):
    """One row of a table: a name, and its runs over the seeds."""

    name: str
    run: Run

    def runs(self, seeds: Iterable[int] = SEEDS) -> list[Run]:
        return [self.run._replace(seed=seed) for seed in seeds]


OBJECTIVES = ("none", "kd", "scalekd-light", "scalekd")

_CACHE_OF = {"none": "views"}


def _arm(name: str, student: str, objective: str, **changes: Any) -> Arm:
    cache = changes.pop("cache", _CACHE_OF.get(objective, "float16"))
    return Arm(name, Run(student, objective, cache=cache, **changes))


def _knobs(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


# The published weights were found for 7 x 7 grids, 1,000 classes and 100 epochs and more.
LOW_WEIGHTS = tuple(
    (f"stage{stage}.{view}_weight", round(0.3 * weight, 4))
    for stage in (3, 4)
    for view, weight in (("spatial", 0.08), ("frequency", 0.06))
)


def _light(name: str, student: str = CNN, **changes: Any) -> Arm:
    """The cheapest form that holds its own, for the questions that need many runs."""
    knobs = (*LOW_WEIGHTS, *_knobs(**changes.pop("knobs", {})))
    objective = changes.pop("objective", "scalekd-light")
    return _arm(name, student, objective, distillation=knobs, **changes)


_SPATIAL = {"distillation": _knobs(frequency=False)}


def _main(student: str) -> list[Arm]:
    return [
        _arm("no teacher", student, "none"),
        _arm("logits only", student, "kd"),
        _light("ScaleKD-light, weights × 0.3", student),
        _arm("ScaleKD-light, spatial view only", student, "scalekd-light", **_SPATIAL),
        _light("ScaleKD, weights × 0.3", student, objective="scalekd"),
        _arm("ScaleKD-light", student, "scalekd-light"),
        _arm("ScaleKD", student, "scalekd", rate=1e-3),  # better than 3e-3 on seed 0
        _arm("no teacher, four times the views", student, "none", epochs=EPOCHS * EQUAL_TIME),
    ]


GROUPS: Mapping[str, list[Arm]] = {
    f"main-{CNN}": _main(CNN),
    f"main-{VIT}": _main(VIT),
    "ablation": [
        _light("ScaleKD-light, weights × 0.3"),
        _arm("spatial view only, weights × 1", CNN, "scalekd-light", **_SPATIAL),
        _light("convolution for CAP", knobs={"cap": False}),
        _light("spatial view only", knobs={"frequency": False}),
        _light("frequency view only", knobs={"spatial": False}),
        _light("without TPP", knobs={"tpp": False}),
        _light("without KD", knobs={"kd": False}),
    ],
    "passes": [
        *(_light(f"{k} pass{'es' * (k > 1)}", cache=f"passes-{k}") for k in PASSES),
        _light("fresh views (24 passes)"),
    ],
    "codec": [_light("float16"), *(_light(codec, cache=codec) for codec in CODECS)],
    "online": [_light("cache"), _light("live teacher", online=True)],
    "samples": [_light(f"{n} epochs", epochs=n) for n in (4, 8, 12, 24)],
    "length": [
        _arm(f"{name}, {n} epochs", CNN, objective, epochs=n)
        for n in (EPOCHS, 2 * EPOCHS)
        for name, objective in (("no teacher", "none"), ("logits only", "kd"))
    ]
    + [_light(f"ScaleKD-light, weights × 0.3, {n} epochs", epochs=n) for n in (24, 48)],
    "stage3": [_light("final stage"), _light("and stage 3", objective="stage3")],
}
