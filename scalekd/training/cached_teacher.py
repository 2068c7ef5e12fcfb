"""A cached teacher and its images, for the trainer and for any other training loop."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from scalekd.cache import CacheReader, ChosenTargets, JoinedTargets
from scalekd.cache.forms import RENDERED
from scalekd.distillation import (
    FORMS,
    Objective,
    ObjectiveName,
    ScaleKDConfig,
    Targets,
    build_objective,
)
from scalekd.distillation.decoding import NO_LOGITS
from scalekd.errors import DataError, ScaleKDError, UsageError
from scalekd.images import ImageDataset
from scalekd.loading import CachedViewLoader, open_images
from scalekd.loading.cached_views import embedded_images
from scalekd.models.classes import Classes, ClassMatch, check_labels, classes_of_data
from scalekd.options import ImageOptions
from scalekd.storage import LocalCache, Location, open_storage
from scalekd.students import Student
from scalekd.teachers import (
    TeacherSpec,
    has_class_token,
    match_teacher,
)
from scalekd.training.feature_teachers import has_summary, teacher_features
from scalekd.training.module import DistillationModule, freeze_unread
from scalekd.training.targets import NoTargets


class TargetSource(Protocol):
    """A module that makes a batch's targets; see `scalekd.training.targets`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of the cache's arrays that a batch must contain."""

    def __call__(self, batch: Mapping[str, Tensor]) -> Targets:
        """Return the targets of a batch on the device."""


class CachedTeacher:
    """A teacher whose outputs are read from a cache, and the images that it saw.

    ``docs/your-own-loop.md`` shows it in plain PyTorch, Accelerate and Lightning.

    Args:
        cache: Folder or URL of a complete cache.
        data_dir: The images the cache was made from; see `scalekd.images.open_dataset`.
            Needed if the cache contains no images, or contains views of a size other than the
            student's.
        split: Split of the image set.
        image_options: How images, labels and keys are read.
        local_cache: Keeps copies of what is read from remote locations.
        num_classes: Number of classes of the student; by default that of the data set.
        targets: Extension of the cache that gives features, tail and, if it has any, logits; names
            with commas between them are several teachers.
        logits_from: Extensions that give logits, or ``base``; several teachers are averaged.
        class_map: The teacher's class of each label: ``auto``, as the cache maps them, or by name;
            ``none``, by number; or a file, see `scalekd.models.classes.read_class_map`.
        live: The teachers of the features run beside the student; logits are those of the first
            that has a classifier, whether or not its cache contains any.

    Attributes:
        chosen: The opened cache and extensions.
        reader: Reads views and targets.
        images: The image set; ``None`` if the images of the cache are used.
        class_names: Name of each class of the student, where known.
        matches: For each cache that gives logits, the teacher's class of each label, or the error
            to raise when logits are read.
        spec: The first teacher whose features are used, as its cache describes it.
        num_classes: Number of classes of the student; 0 if unknown.

    Raises:
        DataError: There is no cache or no image set, or a label of the cache is not one of the
            classes.
        CacheCorrupt: The cache is incomplete or damaged.
        UsageError: The cache contains no images, and ``data_dir`` is not given.
    """

    def __init__(
        self,
        cache: Location,
        *,
        data_dir: str | Path | None = None,
        split: str = "train",
        image_options: ImageOptions = ImageOptions(),  # noqa: B008 (frozen)
        local_cache: LocalCache | None = None,
        num_classes: int | None = None,
        targets: str | None = None,
        logits_from: Sequence[str] = (),
        class_map: str = "auto",
        live: bool = False,
    ) -> None:
        storage = open_storage(cache, local_cache=local_cache)
        self.chosen = ChosenTargets.open(storage, targets=targets, logits_from=logits_from)
        self._live = live
        if live:
            specs = self.feature_teachers
            owner = next((n for n, spec in specs.items() if spec.num_classes), next(iter(specs)))
            self.chosen = replace(self.chosen, logits=(owner,))
        self.reader = self.chosen.reader
        self._data_dir, self._split, self._local_cache = data_dir, split, local_cache
        self._image_options = image_options
        self.images = self._open_images() if self.reader.embed == "none" else None
        self.spec = _spec(self.chosen.caches[self.chosen.features[0]])
        # Batches take their labels from the cache, so names and numbers are its own; the loader
        # compares those of the images.
        samples = self.reader.samples
        data = self._data_classes()
        self.matches = {
            name: self._match(data, self.chosen.caches[name], class_map)
            for name in self.chosen.logits
        }
        match = next((m for m in self.matches.values() if isinstance(m, ClassMatch)), None)
        self.class_names = (match.names if match is not None else None) or data.names
        classes = match.count if match is not None else data.count
        self.num_classes = num_classes or classes or self.spec.num_classes or 0
        self._unlabelled = np.flatnonzero(samples.labels < 0)
        check_labels(str(self.reader.location), samples.labels, self.num_classes)

    def _data_classes(self) -> Classes:
        """Return the classes that the cache names, or else those of the images."""
        names, labels = self.reader.identity.data.class_names, self.reader.samples.labels
        owner = str(self.reader.location)
        if names is None and self.images is not None:
            # A part of a cache may lack classes that the images have.
            names, labels = self.images.class_names, np.append(labels, self.images.labels)
        return classes_of_data(owner, names, labels)

    def _match(self, data: Classes, cache: CacheReader, request: str) -> ClassMatch | ScaleKDError:
        spec, holds_logits = _spec(cache), self._live or cache.identity.logits is not None
        alone = ClassMatch(None, data.count, data.names)
        if spec.num_classes is None:
            return alone
        try:
            return match_teacher(data, spec, request, stored=cache.identity.class_map)
        except (DataError, UsageError) as error:
            return error if holds_logits else alone

    @property
    def notes(self) -> list[str]:
        """Messages about the classes for the user, one line each."""
        notes = [m.note for m in self.matches.values() if isinstance(m, ClassMatch)]
        return [note for note in dict.fromkeys(notes) if note]

    def notes_for(self, objective: Objective) -> list[str]:
        """Return messages about classes and labels that an objective reads, one line each."""
        notes = self.notes if objective.needs_logits else []
        if objective.needs_labels and self._image_options.labels == "none":
            notes.append(
                "--labels none: the objective reads the labels of the cache; the option only leaves"
                " out those of --data-dir"
            )
        if objective.needs_labels and len(self._unlabelled):
            samples = self.reader.samples
            first = samples.key(int(self._unlabelled[0]))
            notes.append(
                f"{self.reader.location}: {len(self._unlabelled):,} of the {len(samples):,} samples"
                f" have no label, such as {first!r}; they are left out of the task loss and of"
                " top-1 only"
            )
        return notes

    def class_indices(self) -> dict[str, tuple[int, ...] | None]:
        """Return the teacher's class of each of the student's, for each cache that gives logits.

        Raises:
            DataError, UsageError: Classes cannot be matched.
        """
        indices: dict[str, tuple[int, ...] | None] = {}
        for name, match in self.matches.items():
            if not isinstance(match, ClassMatch):
                raise match
            indices[name] = match.indices
        return indices

    @property
    def logit_teachers(self) -> list[TeacherSpec]:
        """Teachers whose logits are used."""
        return [_spec(self.chosen.caches[name]) for name in self.chosen.logits]

    @property
    def feature_teachers(self) -> dict[str, TeacherSpec]:
        """Teachers whose features are used, by name."""
        return {name: _spec(self.chosen.caches[name]) for name in self.chosen.features}

    @property
    def licence(self) -> str | None:
        """Licences of the teachers' weights, as stated when the caches were written."""
        licences = [
            self.chosen.caches[name].manifest.plan.provenance.licence or spec.licence
            for name, spec in self.feature_teachers.items()
        ]
        return ", ".join(dict.fromkeys(filter(None, licences))) or None

    @property
    def note(self) -> str | None:
        """Notes that were stored when the caches were written."""
        notes = (self.chosen.caches[n].manifest.plan.provenance.note for n in self.chosen.features)
        return "\n".join(dict.fromkeys(filter(None, notes))) or None

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
        """Build student, projectors and losses as one module, to optimise and to wrap in DDP.

        Args:
            student: Made by `scalekd.students.create_student`.
            objective: ``scalekd``, ``scalekd-light``, ``features`` (no labels, no logits), ``kd``
                (logits only) or ``none``.
            config: Weights, heads and switches of the objective. If the teacher has no tail,
                ``tpp`` is off unless it is set explicitly.
            channels_last: See `DistillationModule`.
            tail_checkpointing: Keep less of the teacher's tail in memory, at the price of a second
                forward through it.

        Raises:
            UsageError: The cache lacks what the objective reads, or the classes differ.
            DataError: The objective needs labels, and no sample of the cache has one.
            CacheCorrupt: The teacher's tail is damaged.
        """
        config = config or ScaleKDConfig()
        unknown = sorted(config.teachers.keys() - set(self.chosen.features))
        if unknown:
            raise UsageError(
                f"--distillation {unknown[0]}: is neither a setting nor a teacher whose features"
                f" are compared ({', '.join(self.chosen.features)}; see --targets)"
            )
        teachers = {
            name: teacher_features(
                self.chosen.caches[name],
                spec,
                config.for_teacher(name),
                tail_checkpointing=tail_checkpointing if objective in FORMS else None,
            )
            for name, spec in self.feature_teachers.items()
        }
        (name, first), *others = teachers.items()
        summary = any(has_summary(objective, teacher.config) for teacher in teachers.values())
        built = build_objective(
            objective,
            first.config,
            student_levels=student.spec.levels,
            teacher_stages=first.stages,
            tail=first.tail,
            student_features=student.num_features() if summary else None,
            name_of_teacher=name,
            others=dict(others),
        )
        if built.needs_labels and self._labelled == "none":
            raise DataError(self._no_labels(objective))
        if built.trains_classifier and not student.spec.num_classes:
            raise UsageError(
                f"the objective {objective} trains a classifier, and the student has none"
                " (num_classes=0); leave out --num-classes, or give --objective features"
            )
        if built.needs_logits:
            self._check_classes(student)
        if not built.trains_classifier:
            freeze_unread(student, pooled=built.needs_pooled)
        return DistillationModule(
            student,
            built,
            mean=student.spec.mean,
            std=student.spec.std,
            channels_last=channels_last,
            labelled=self._labelled,
        )

    @property
    def _labelled(self) -> Literal["all", "some", "none"]:
        num_unlabelled, num_samples = len(self._unlabelled), len(self.reader.samples)
        if not num_unlabelled:
            return "all"
        return "none" if num_unlabelled == num_samples else "some"

    def _no_labels(self, objective: str) -> str:
        instead = "give --objective features, which reads no labels"
        if self.logit_teachers and self.chosen.caches[self.chosen.logits[0]].identity.logits:
            instead += ", or --objective kd --distillation kd_alpha=1, the teacher's answers alone"
        return (
            f"{self.reader.location}: none of the cache's {len(self._unlabelled):,} samples has a"
            f" label, which the task loss of --objective {objective} needs; {instead}"
        )

    def _check_classes(self, student: Student) -> None:
        caches = [self.chosen.caches[name] for name in self.chosen.logits]
        if self._live and not self.logit_teachers[0].num_classes:
            names = ", ".join(spec.model for spec in self.feature_teachers.values())
            raise UsageError(
                f"{self.reader.location}: the live teacher ({names}) has no classifier, and the KD"
                " loss needs logits; train with --distillation kd=false or --objective features"
            )
        if not self._live and any(cache.identity.logits is None for cache in caches):
            raise UsageError(NO_LOGITS)
        self.class_indices()
        for name, match in self.matches.items():
            if isinstance(match, ClassMatch) and match.count != student.spec.num_classes:
                teacher = _spec(self.chosen.caches[name])
                raise UsageError(
                    f"the KD loss compares classes one by one: {match.count:,} classes are matched"
                    f" with those of the teacher {teacher.model}, and the student has"
                    f" {student.spec.num_classes:,}; leave out --num-classes, or train without it"
                    " (--distillation kd=false)"
                )

    def targets(
        self, objective: Objective, *, compute_dtype: torch.dtype = torch.float32
    ) -> JoinedTargets | NoTargets:
        """Build a module that decodes the targets of an objective on the device.

        Args:
            objective: Objective of the module.
            compute_dtype: Type of the products that decode features; bfloat16 adds an error of
                1e-5 to the codec's 1e-2, and uses a GPU's tensor cores.

        Raises:
            UsageError: The cache does not contain what the objective reads.
        """
        if not objective.needs_features and not objective.needs_logits:
            return NoTargets()
        return self.chosen.decoder(
            features=objective.needs_features,
            logits=objective.needs_logits,
            classes=self.class_indices() if objective.needs_logits else None,
            compute_dtype=compute_dtype,
            class_token=[
                name
                for name, spec in self.feature_teachers.items()
                if objective.needs_pooled and has_class_token(spec)
            ],
        )

    def loader(self, student: Student, targets: TargetSource, **options: Any) -> CachedViewLoader:
        """Build a loader of batches at the student's image size with the arrays of the targets.

        Args:
            student: Gives the image size of the batches.
            targets: Result of :meth:`targets`.
            options: ``batch_size``, ``num_workers``, ``seed``, ``allowed_drift``,
                ``teacher_pixels``, ``fresh_views``, ``differences``, ``rank`` and ``world_size`` of
                `scalekd.loading.CachedViewLoader`.

        Raises:
            CacheMismatch: The images are not those of the cache, or are labelled or drawn
                differently here.
            UsageError: The cache contains fewer views than one batch of all ranks.
        """
        size, images = student.spec.img_size, self.images
        embedded = embedded_images(self.reader, size)
        drawn = embedded == "none" or (embedded in RENDERED and options.get("fresh_views", False))
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
                f"--data-dir is missing: {self.reader.location} contains targets but no images;"
                " pass the images that it was made from"
            )
        return open_images(
            str(self._data_dir),
            self._split,
            local_cache=self._local_cache,
            options=self._image_options,
        )


def _spec(reader: CacheReader) -> TeacherSpec:
    return TeacherSpec.model_validate(reader.identity.teacher)
