"""What a student learns from: a cache and its images, for the trainer and for any other loop."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from scalekd.cache import CacheReader, ChosenTargets, JoinedTargets
from scalekd.distillation import (
    FORMS,
    Objective,
    ObjectiveName,
    ScaleKDConfig,
    Targets,
    build_objective,
)
from scalekd.errors import DataError, UsageError
from scalekd.images import ImageDataset
from scalekd.loading import CachedViewLoader, open_images
from scalekd.loading.cached_views import embedded_images
from scalekd.storage import LocalCache, LocalStorage, Place, open_storage
from scalekd.students import Student
from scalekd.teachers import Tail, TeacherSpec, load_tail
from scalekd.training.module import DistillationModule
from scalekd.training.targets import NoTargets


class TargetSource(Protocol):
    """A module that makes a batch's targets; see `scalekd.training.targets`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of the cache's arrays that a batch must hold for it."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Targets of a batch on the device."""


class CachedTeacher:
    """A teacher that has already said everything: its cache, and the images it was shown.

    ``docs/your-own-loop.md`` shows it in plain PyTorch, Accelerate and Lightning.

    Args:
        cache: Folder or URL of a complete cache.
        data_dir: The images the cache was made from; see `scalekd.images.open_dataset`.
            Needed where the cache holds no images itself, or holds views and the student takes
            another size.
        split: Which of them.
        local_cache: Keeps copies of what is read from remote places.
        num_classes: Of the student; by default the teacher's, or, of a teacher without a head,
            those of the data set.
        targets: Extension of the cache that gives features, tail and, if it has any, logits.
        logits_from: Extensions that give logits, or ``base``; several teachers are averaged.

    Attributes:
        chosen: The opened cache and extensions.
        reader: What views and targets are read from.
        images: The image set; ``None`` where the cache's own images do.
        class_names: Name of each class where the cache tells, or else the images do.
        spec: The teacher whose features count, as its cache describes it.
        num_classes: Of the student.

    Raises:
        DataError: There is no cache or no image set, or a label of the cache, which is what the
            student learns, is none of the classes.
        CacheCorrupt: The cache is incomplete or damaged.
        UsageError: The cache holds no images, and ``data_dir`` is not given.
    """

    def __init__(
        self,
        cache: Place,
        *,
        data_dir: str | Path | None = None,
        split: str = "train",
        local_cache: LocalCache | None = None,
        num_classes: int | None = None,
        targets: str | None = None,
        logits_from: Sequence[str] = (),
    ) -> None:
        storage = open_storage(cache, local_cache=local_cache)
        self.chosen = ChosenTargets.open(storage, targets=targets, logits_from=logits_from)
        self.reader = self.chosen.reader
        self._data_dir, self._split, self._local_cache = data_dir, split, local_cache
        self.images = self._open_images() if self.reader.embed == "none" else None
        self.spec = _spec(self._features)
        # Batches take their labels from the cache, so names and numbers are its own; the loader
        # compares those of the images.
        samples = self.reader.samples
        self.class_names = self.reader.identity.data.class_names
        of_images = 0
        if self.images is not None:
            self.class_names = self.class_names or self.images.class_names
            of_images = self.images.num_classes
        largest = int(samples.labels.max(initial=-1))
        # The teacher's classes are the student's wherever its logits are learnt from.
        said = [teacher.num_classes for teacher in self.logit_teachers]
        # A part of a cache may lack classes that the images have.
        of_data = len(self.class_names or ()) or max(of_images, largest + 1)
        found = (num_classes, *said, self.spec.num_classes, of_data)
        self.num_classes = next((number for number in found if number), 0)
        unlabelled = np.flatnonzero(samples.labels < 0)
        if len(unlabelled):
            raise DataError(
                f"{self.reader.place}: {len(unlabelled):,} of the cache's {len(samples):,} samples "
                f"have no label, such as {samples.key(int(unlabelled[0]))!r}; every image needs a "
                "label when its cache is written, so write it again from labelled images"
            )
        if largest >= self.num_classes:
            raise DataError(
                f"{self.reader.place}: labels run up to {largest}, and the student "
                f"has classes 0 to {self.num_classes - 1} (see --num-classes)"
            )

    @property
    def logit_teachers(self) -> list[TeacherSpec]:
        """Those whose logits count."""
        return [_spec(self.chosen.caches[name]) for name in self.chosen.logits]

    @property
    def _features(self) -> CacheReader:
        return self.chosen.caches[self.chosen.features]

    @property
    def licence(self) -> str | None:
        """Of the weights that features come from, as the maker of the cache states it."""
        return self._features.manifest.plan.provenance.licence or self.spec.licence

    @property
    def note(self) -> str | None:
        """What the maker of the cache noted."""
        return self._features.manifest.plan.provenance.note

    @property
    def view_size(self) -> tuple[int, int]:
        """Height and width in pixels of the views that the teacher saw."""
        return self.reader.identity.views.view_size

    def module(
        self,
        student: Student,
        *,
        objective: ObjectiveName = "scalekd",
        config: ScaleKDConfig | None = None,
        channels_last: bool = False,
        tail_checkpointing: bool = False,
    ) -> DistillationModule:
        """Student, projectors and losses as one module: what to optimise, and to wrap in DDP.

        Args:
            student: Made by `scalekd.students.create_student`.
            objective: ``scalekd``, ``scalekd-light``, ``kd`` (logits only) or ``none``.
            config: Weights, heads and switches of the objective.
            channels_last: See `DistillationModule`.
            tail_checkpointing: Keep less of the teacher's tail in memory, at the price of a second
                forward through it.

        Raises:
            UsageError: The cache lacks what the objective reads, or the classes differ.
            CacheCorrupt: The teacher's tail is damaged.
        """
        config = config or ScaleKDConfig()
        tail = None
        if objective in FORMS and config.tpp:
            tail = self._tail()
            tail.set_grad_checkpointing(tail_checkpointing)
        built = build_objective(
            objective,
            config,
            student_levels=student.spec.levels,
            teacher_stages=self.spec.stages,
            tail=tail,
        )
        for teacher in self.logit_teachers if built.needs_logits else ():
            if teacher.num_classes != student.spec.num_classes:
                raise UsageError(
                    f"the KD loss compares classes one by one, and the teacher {teacher.model} has "
                    f"{teacher.num_classes} of them where the student has "
                    f"{student.spec.num_classes}; train without it "
                    "(--distillation kd=false), or with the teacher's classes"
                )
        return DistillationModule(
            student,
            built,
            mean=student.spec.mean,
            std=student.spec.std,
            channels_last=channels_last,
        )

    def targets(self, objective: Objective) -> JoinedTargets | NoTargets:
        """A module that decodes, on the device, what an objective reads of the cache.

        Raises:
            UsageError: The cache does not hold it.
        """
        if not objective.needs_features and not objective.needs_logits:
            return NoTargets()
        return self.chosen.decoder(features=objective.needs_features, logits=objective.needs_logits)

    def loader(self, student: Student, targets: TargetSource, **options: Any) -> CachedViewLoader:
        """Epochs of batches at the student's image size, with the arrays that targets need.

        Args:
            student: Its image size is the batches'.
            targets: From :meth:`targets`.
            options: ``batch_size``, ``num_workers``, ``seed``, ``allowed_drift``,
                ``teacher_pixels``, ``fresh_views``, ``rank`` and ``world_size`` of
                `scalekd.loading.CachedViewLoader`.

        Raises:
            CacheMismatch: The images are not those of the cache, or are labelled or drawn
                differently here.
            UsageError: The cache holds fewer views than one batch of all ranks.
        """
        size, images = student.spec.img_size, self.images
        embedded = embedded_images(self.reader, size)
        drawn = embedded == "none" or (embedded == "view" and options.get("fresh_views", False))
        if drawn and images is None and self._data_dir is not None:
            images = self._open_images()
        return CachedViewLoader(
            self.reader,
            images,
            view_size=size,
            groups=targets.groups,
            **options,
        )

    def _open_images(self) -> ImageDataset:
        if self._data_dir is None:
            raise UsageError(
                f"--data-dir is missing: {self.reader.place} holds targets, and the images stay"
                " where they are"
            )
        return open_images(str(self._data_dir), self._split, local_cache=self._local_cache)

    def _tail(self) -> Tail:
        reader = self._features
        identity, storage = reader.identity, reader.storage
        if identity.tail is None:
            raise UsageError(
                f"{reader.place}: holds no teacher tail, which stage 3 of the scalekd "
                "objective passes through; write the cache again (any --stages keeps it now), "
                "or give --distillation tpp=false"
            )
        content = reader.file(identity.tail, identity.tail_digest)  # checks its bytes
        if isinstance(storage, LocalStorage):
            return load_tail(storage.path(identity.tail))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(identity.tail).name
            path.write_bytes(content)
            return load_tail(path)


def _spec(reader: CacheReader) -> TeacherSpec:
    return TeacherSpec.model_validate(reader.identity.teacher)
