"""An image set with labels, for training without a teacher and without a cache."""

from typing import Any, cast, get_args

from scalekd.distillation import ObjectiveName, ScaleKDConfig, build_objective
from scalekd.errors import DataError, UsageError
from scalekd.loading import open_images
from scalekd.loading.image_loader import ImageLoader
from scalekd.models.classes import check_labels, classes_of_data
from scalekd.options import ImageOptions
from scalekd.storage import LocalCache
from scalekd.students import Student
from scalekd.training.module import DistillationModule
from scalekd.views import Interpolation, ViewPolicy


class LabelledImages:
    """Images and labels that a student learns from, with fresh views in every epoch.

    Args:
        data_dir: The images; see `scalekd.images.open_dataset`.
        split: Split of the image set.
        policy: Text of the view policy, as ``--aug`` of `cache-teacher`.
        image_options: How images, labels and keys are read.
        local_cache: Keeps copies of what is read from remote locations.
        num_classes: Number of classes of the student; by default that of the data set.

    Attributes:
        images: The samples that have a label.
        class_names: Name of each class of the student, where known.
        num_classes: Number of classes of the student.
        notes: Messages for the user, one line each.

    Raises:
        DataError: There is no image set, none of its images has a label, or a label is not one of
            the classes.
        UsageError: The text is not a view policy, or ``num_classes`` is 0.
    """

    def __init__(
        self,
        data_dir: str,
        *,
        split: str = "train",
        policy: str = "crop-flip",
        image_options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
        local_cache: LocalCache | None = None,
        num_classes: int | None = None,
    ) -> None:
        ViewPolicy.parse(policy)
        if num_classes == 0:
            raise UsageError("--num-classes 0: --objective none trains a classifier; leave it out")
        self._policy = policy
        images = open_images(data_dir, split, local_cache=local_cache, options=image_options)
        labelled = images.labelled()
        if not len(labelled):
            why = " with --labels none" if image_options.labels == "none" else ""
            raise DataError(
                f"{images.location}: none of its {len(images):,} images has a label{why}, which"
                " --objective none learns from; give class folders or label members (see"
                " --target-key), or train from the cache of a teacher by --objective features"
            )
        images = labelled
        self.images = images.mixed_unless_shuffled()
        self.notes = list(dict.fromkeys([*images.notes, *self.images.notes]))
        data = classes_of_data(images.location, images.class_names, images.labels)
        self.num_classes = num_classes or data.count
        check_labels(images.location, images.labels, self.num_classes)
        self.class_names = data.names if data.count == self.num_classes else None

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the images, for the checkpoints of a run."""
        return {"teacher": None, "data_fingerprint": self.images.fingerprint}

    def module(
        self,
        student: Student,
        *,
        objective: ObjectiveName = "none",
        config: ScaleKDConfig | None = None,
        channels_last: bool = False,
        tail_checkpointing: bool = False,
    ) -> DistillationModule:
        """Build student and task loss as one module.

        Raises:
            UsageError: The objective needs a teacher.
        """
        del tail_checkpointing
        if objective != "none":
            raise UsageError(f"--objective {objective} learns from a teacher; give --cache")
        return DistillationModule(
            student,
            build_objective(objective, config),
            mean=student.spec.mean,
            std=student.spec.std,
            channels_last=channels_last,
        )

    def loader(self, student: Student, **options: Any) -> ImageLoader:
        """Build a loader of fresh views at the student's image size.

        Args:
            student: Gives image size, resize filter, and mean and std of the views' fill and noise.
            options: ``batch_size``, ``num_workers``, ``seed``, ``rank`` and ``world_size`` of
                `scalekd.loading.image_loader.ImageLoader`.

        Raises:
            UsageError: The image set has fewer samples than one batch of all ranks.
        """
        spec = student.spec
        known = spec.interpolation in get_args(Interpolation)
        policy = ViewPolicy.parse(
            self._policy,
            interpolation=cast(Interpolation, spec.interpolation) if known else "bicubic",
            mean=spec.mean,
            std=spec.std,
        )
        return ImageLoader(self.images, policy, view_size=spec.img_size, **options)
