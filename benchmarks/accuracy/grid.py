"""Which students are trained for which question.

The students are trained on 500 labelled CIFAR-10 images, because with few labels a student overfits
and a teacher can contribute. The teacher is a ViT-S/14, pre-trained on other data and fine-tuned on
all 50,000 training images with their labels. A gain over "no teacher" therefore includes what the
teacher learned from those images, not only the effect of the method; "logits only" uses the same
teacher. The teacher receives views of 70 px (5 x 5 tokens), and students the same views at 40 px;
the images have 32 px. On 1,000 validation images, in an informal test, the teacher's top-1 was 88 %
at 70 px and 95 % at its own size of 112 px. Unless stated otherwise, students train on 46,080
views: 48 cached passes, read twice (96 epochs), in batches of 32, with AdamW, one epoch of warm-up,
a cosine to zero, and bf16 autocast on processors that multiply bf16, otherwise float32. Questions
that need many runs use the CNN with a quarter of the views (24 passes, read once). The learning
rate of the CNN was chosen with the baselines on seed 0 and is used in every row; that of the ViT
was chosen by the table of its rates, on the reported seeds. There is no test set: the setting and
the rates were chosen by runs on these validation images, the exploratory ones on seed 0.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

TEACHER_PX = 70
STUDENT_PX = 40
BATCH_SIZE = 32
AUG = "crop:0.35..1+flip"
SEEDS = (1, 2, 3)


class Regime(NamedTuple):
    """The data of every student.

    Attributes:
        num_images: Labelled images.
        passes: Views of each with targets.
        epochs: Of a run; passes repeat in order.
    """

    num_images: int
    passes: int
    epochs: int


REGIME = Regime(num_images=500, passes=48, epochs=96)
SHORT = 24  # epochs of the CNN, each another pass
TWICE = 2 * SHORT

STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Half the width of ResNet-18: 2.8 M parameters.
    "resnet18-half": ("resnet18", {"channels": [32, 64, 128, 256]}),
    # Half the depth of ViT-Ti, 16 tokens: 2.7 M parameters.
    "vit-tiny-6": ("vit_tiny_patch16_224", {"patch_size": 10, "depth": 6}),
}
CNN, VIT = tuple(STUDENTS)[:2]
# Half the width and depth of ResNet-18, 1.2 M parameters. Its last three levels have 7 x 7 places
# at 56 px, as many as the teacher has tokens at 98 px.
ALIGNED = "resnet10-stride8"
STUDENTS[ALIGNED] = (
    "resnet18",
    {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "output_stride": 8},
)
STUDENT_SIZES = {ALIGNED: 56}  # others: STUDENT_PX
TEACHER_SIZES = (56, 70, 84, 112)
ALIGNED_TEACHER_PX = 98

RATES: dict[str, dict[str, float]] = {
    CNN: {"none": 1.5e-3, "kd": 1.5e-3, "scalekd-light": 1.5e-3, "scalekd": 1.5e-3},
    VIT: {"none": 2.5e-4, "kd": 2.5e-4, "scalekd-light": 2.5e-4, "scalekd": 2.5e-4},
}
RATES[ALIGNED] = RATES[CNN]  # not tuned for this student

# Plain training in the CPU seconds of ScaleKD-light: the measured ratio of their steps, rounded.
EQUAL_TIME = 3

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

# Passes and codecs whose features of an image take a like number of bytes, or fewer; the last rows
# coarsen the coding further, to find where it begins to cost accuracy.
SPENT = (
    (2, "transform:error=0.001"),
    (8, "transform:error=0.01"),
    (24, "transform:error=0.05"),
    (48, "transform:error=0.1"),
    (48, "transform:error=0.2"),
    (48, "transform:error=0.4"),
)

# Errors of both stages for students that read stage 3 as well.
MID_CODECS = ("transform:error=0.01", "transform:error=0.1", "transform:error=0.4")


class Run(NamedTuple):
    """One student to train; two arms that agree in this are the same run.

    Attributes:
        student: Key of `STUDENTS`.
        objective: As ``--objective``, or ``stage3``: with the extra target.
        distillation: Knobs of the objective, by dotted name.
        cache: Which cache: a codec's name, ``passes-K``, ``KxCODEC`` for K passes by a codec and
            ``KxCODEC+3`` with stage 3 by the same codec, ``Tpx`` for the passes of short runs and
            the teacher at T px, or ``views``, which has no targets and does not repeat.
        epochs: Over the labelled images.
        seed: Of weights and order.
        rate: Learning rate; None is the one in `RATES`.
        online: The teacher runs live.
    """

    student: str
    objective: str
    distillation: tuple[tuple[str, Any], ...] = ()
    cache: str = "float16"
    epochs: int = SHORT
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
        names, left = [], set(self.distillation)
        for name, knobs in NAMED_KNOBS.items():
            if set(knobs) <= left:
                names.append(name)
                left -= set(knobs)
        names += [f"{name}={value}" for name, value in self.distillation if (name, value) in left]
        parts = [self.student, self.objective, ",".join(names), self.cache, f"{self.epochs}ep"]
        parts += [f"seed{self.seed}", f"lr{self.learning_rate:g}"]
        return " ".join(part for part in [*parts, "online" if self.online else ""] if part)


class Arm(NamedTuple):
    """One row of a table: a name, and its runs over the seeds."""

    name: str
    run: Run

    def runs(self, seeds: Iterable[int] = SEEDS) -> list[Run]:
        return [self.run._replace(seed=seed) for seed in seeds]


OBJECTIVES = ("none", "kd", "scalekd-light", "scalekd")


def weights(factor: float) -> tuple[tuple[str, float], ...]:
    """The published weights of the feature losses, times a factor."""
    return tuple(
        (f"stage{stage}.{view}_weight", round(factor * weight, 4))
        for stage in (3, 4)
        for view, weight in (("spatial", 0.08), ("frequency", 0.06))
    )


LOW_WEIGHTS = weights(0.3)
# The losses are sums over tokens, and published weights fall as tokens grow: 0.08 for the 49 of
# Swin, 0.016 for the 256 of EVA, about 4 a view. Here are 25 tokens.
BALANCED = weights(49 / 25)
NAMED_KNOBS = {"weights*0.3": LOW_WEIGHTS, "balanced": BALANCED}


def _light(name: str, *knobs: tuple[str, Any], objective: str = "scalekd-light", **run: Any) -> Arm:
    """The CNN's short run with the cheaper form, for the questions that need many runs."""
    return Arm(name, Run(CNN, objective, knobs, **run))


def _main(student: str) -> list[Arm]:
    epochs = REGIME.epochs
    return [
        Arm("no teacher", Run(student, "none", epochs=epochs)),
        Arm("logits only", Run(student, "kd", epochs=epochs)),
        Arm("ScaleKD-light", Run(student, "scalekd-light", epochs=epochs)),
        Arm("ScaleKD", Run(student, "scalekd", epochs=epochs)),
        Arm(
            "no teacher, the CPU time of ScaleKD-light, fresh views",
            Run(student, "none", cache="views", epochs=epochs * EQUAL_TIME),
        ),
    ]


def _parts(epochs: int) -> list[Arm]:
    return [
        _light("ScaleKD-light", epochs=epochs),
        _light("convolution for CAP", ("cap", False), epochs=epochs),
        _light("spatial view only", ("frequency", False), epochs=epochs),
        _light("frequency view only", ("spatial", False), epochs=epochs),
        _light("without TPP", ("tpp", False), epochs=epochs),
        _light("without KD", ("kd", False), epochs=epochs),
    ]


def _aligned(name: str, *knobs: tuple[str, Any], objective: str = "scalekd-light") -> Arm:
    return Arm(name, Run(ALIGNED, objective, knobs, cache=f"{ALIGNED_TEACHER_PX}px", epochs=TWICE))


def teacher_size(cache: str) -> int | None:
    """Pixels of the teacher in a cache named ``Tpx``; ``None`` for other names."""
    return int(cache[:-2]) if cache.endswith("px") else None


_COMPARED = {"no teacher": "none", "logits only": "kd", "ScaleKD-light": "scalekd-light"}


GROUPS: Mapping[str, list[Arm]] = {
    f"main-{CNN}": _main(CNN),
    f"main-{VIT}": _main(VIT),
    "ablation": _parts(REGIME.epochs),
    "ablation-short": [
        *_parts(SHORT),
        _light("weights × 0.3", *LOW_WEIGHTS),
        _light("ScaleKD, as published", objective="scalekd"),
        _light("ScaleKD, spatial view only", ("frequency", False), objective="scalekd"),
    ],
    "passes": [
        *(_light(f"{k} pass{'es' * (k > 1)}", cache=f"passes-{k}") for k in PASSES),
        _light("fresh views (24 passes)"),
    ],
    "codec": [_light("float16"), *(_light(codec, cache=codec) for codec in CODECS)],
    "budget": [
        _light(f"{passes} × {codec}", cache=f"{passes}x{codec}", epochs=REGIME.passes)
        for passes, codec in SPENT
    ],
    "budget-features": [
        _light(
            f"{passes} × {codec}", ("kd", False), cache=f"{passes}x{codec}", epochs=REGIME.passes
        )
        for passes, codec in SPENT
    ],
    "budget-stage3": [
        _light(codec, objective="stage3", cache=f"{SHORT}x{codec}+3") for codec in MID_CODECS
    ],
    "online": [_light("cache"), _light("live teacher", online=True)],
    "length": [
        Arm(f"{name}, {epochs} epochs", Run(CNN, objective, epochs=epochs))
        for epochs in (SHORT // 2, SHORT, REGIME.epochs)
        for name, objective in _COMPARED.items()
    ],
    "rates": [
        Arm(f"{name}, {rate:g}", Run(VIT, objective, epochs=REGIME.epochs, rate=rate))
        for rate in (5e-4, 2.5e-4)
        for name, objective in _COMPARED.items()
    ]
    + [
        Arm(
            "ScaleKD-light, 4 a view, 0.0005",
            Run(VIT, "scalekd-light", BALANCED, epochs=REGIME.epochs, rate=5e-4),
        )
    ],
    "strength": [
        Arm("no teacher", Run(CNN, "none", cache=f"{TEACHER_SIZES[0]}px", epochs=TWICE)),
        *(
            Arm(f"{name}, {px} px", Run(CNN, objective, cache=f"{px}px", epochs=TWICE))
            for name, objective in list(_COMPARED.items())[1:]
            for px in TEACHER_SIZES
        ),
    ],
    "aligned": [
        _aligned("ScaleKD-light"),
        _aligned("no teacher", objective="none"),
        _aligned("logits only", objective="kd"),
        _aligned("convolution for CAP", ("cap", False)),
        _aligned("without TPP", ("tpp", False)),
        _aligned("spatial view only", ("frequency", False)),
        _aligned("frequency view only", ("spatial", False)),
        _aligned("ScaleKD, as published", objective="scalekd"),
    ],
    "stage3": [
        _light("final stage"),
        _light("and stage 3", objective="stage3"),
    ],
}
