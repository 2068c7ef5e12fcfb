"""What is compared, and on what: this text opens the section of the results.

Do students transfer better to other classes? They are pre-trained on 576 labelled images of six
CIFAR-10 classes, and transferred to the other four (automobile, bird, dog, ship). The student is a
ResNet with half the depth and width of ResNet-18 and output stride 8 (1.2 M parameters): at 40 px
its last three levels have 5 x 5 places, like the tokens of the teacher at 70 px. All arms but the
last read the same cached views: 24 passes, read twice (27,648 views), in batches of 32, with AdamW
at 0.0015 (the rate of the other grids), one epoch of warm-up and a cosine to zero.

No teacher has seen a label of the four classes. The *headless* teacher is a ViT-S/14, pre-trained
by others without labels on other images, and tuned by them for saliency; students of its features
read no label at all. The *tuned* teacher is the same network, fine-tuned for six epochs on the
students' own 576 images, so that it adds no label to theirs. A gain over "no teacher" includes what
the headless teacher learned from its own images.

Segmentation: scenes of 64 px are composed of one or two objects of the four classes, cut out as
ellipses, on photographs; masks follow from the composition. A small decoder over four levels of the
student is trained on 400 scenes, and tested on 400 scenes of other images and photographs, with the
backbone frozen or fine-tuned; mean intersection over union is that of the four classes, without the
background. The linear probe and the 20 nearest neighbours use 2,000 training images of the four
classes, and are tested on their 1,605 validation images.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

AUG = "crop:0.35..1+flip"
PASSES, EPOCHS, BATCH_SIZE = 24, 48, 32
RATE = 1.5e-3  # of the other grids
TEACHER_PX, STUDENT_PX = 70, 40
TEACHER = "vit_small_patch14_dinov2_headless"
# The teacher of the pre-training classes: mean of the patch tokens, as `features` of CNNs are.
TUNED = {"epochs": 6, "lr": 1e-4, "layer_decay": 0.75, "smoothing": 0.1}
STUDENT = "resnet18"
STUDENT_KWARGS: Mapping[str, Any] = {
    "layers": [1, 1, 1, 1],
    "channels": [32, 64, 128, 256],
    "output_stride": 8,
}
LEVELS = (1, 2, 3, 4)  # of the decoder; level 0 has the stride 2
EQUAL_TIME = 4  # epochs without a teacher in the CPU time of ScaleKD-light: 3.6, rounded up
SCENES = {"train": 400, "test": 400}
FROZEN = {"epochs": 15, "rate": 3e-3}
FINE_TUNED = {"epochs": 10, "rate": 1.5e-3}


class Arm(NamedTuple):
    """One way of pre-training the student.

    Attributes:
        name: First column of the table.
        objective: As ``--objective``; ``scratch`` is not pre-trained, and ``teacher`` no student.
        teacher: ``tuned``, ``headless``, or nothing.
        distillation: Settings of the objective.
        fresh: Draw fresh views in every epoch.
        factor: Multiple of the epochs.
    """

    name: str
    objective: str
    teacher: str = ""
    distillation: Mapping[str, Any] = {}
    fresh: bool = False
    factor: int = 1


ARMS = (
    Arm("the tuned teacher itself, at 70 px", "teacher", "tuned"),
    Arm("the headless teacher itself, at 70 px", "teacher", "headless"),
    Arm("from scratch", "scratch"),
    Arm("no teacher", "none"),
    Arm("logits only", "kd", "tuned"),
    Arm("ScaleKD-light", "scalekd-light", "tuned"),
    Arm("ScaleKD-light, convolution for CAP", "scalekd-light", "tuned", {"cap": False}),
    Arm("features only", "features", "headless"),
    Arm(
        "features only, convolution for CAP, without TPP",
        "features",
        "headless",
        {"cap": False, "tpp": False},
    ),
    Arm(
        "no teacher, CPU time of ScaleKD-light, fresh views", "none", fresh=True, factor=EQUAL_TIME
    ),
)
