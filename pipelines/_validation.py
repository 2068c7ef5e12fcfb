"""Validation of a run: the metrics after an epoch, and the choice of the best epoch."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from scalekd.cache import CacheReader, open_cache
from scalekd.errors import CacheMismatch, DataError, UsageError, rewording
from scalekd.evaluation import (
    EvaluationConfig,
    EvaluationViews,
    Evaluator,
    FeatureLossEvaluator,
    NeighbourEvaluator,
    cached_answers,
    halves,
)
from scalekd.images import ImageDataset
from scalekd.loading import open_images
from scalekd.models.classes import Classes, ClassMatch, classes_of_data, match_classes
from scalekd.pipelines._run_facts import Source
from scalekd.storage import LocalCache, make_local_cache, open_storage
from scalekd.students import StudentSpec
from scalekd.teachers import TeacherSpec, match_teacher
from scalekd.training import CachedTeacher, TrainConfig
from scalekd.training.interfaces import Choose, Evaluate, by_metric, last_epoch
from scalekd.training.module import DistillationModule


class Validation(NamedTuple):
    """Functions with which a trainer validates a run.

    Attributes:
        evaluate: Measures a student; ``None`` if nothing is measured.
        choose: Decides which epoch is the best; ``None`` for the trainer's default.
        notes: Notes for the user.
        measure: Name of the metric that decides, and of the images that it is measured on.
    """

    evaluate: Evaluate | None = None
    choose: Choose | None = None
    notes: tuple[str, ...] = ()
    measure: str = "train_loss"


def make_validation(
    config: TrainConfig, source: Source, module: DistillationModule, accelerator: Accelerator
) -> Validation:
    """Open the images or the cache on which a run is validated.

    Students with a classifier are measured by its top-1. Without one, labelled images of
    ``--val-split`` are classified by nearest neighbours; without such images, the feature loss is
    measured on ``--val-cache``; without that, the last epoch is the best.

    Raises:
        DataError, UsageError: Images, cache or classes cannot be used.
        CacheMismatch: The cache is of other images or of another teacher.
    """
    objective = module.objective
    if config.knn_split is not None and objective.trains_classifier:
        raise UsageError(
            f"--knn-split: --objective {config.objective} trains a classifier, which validates the"
            " run; leave the option out (scalekd evaluate has it as well)"
        )
    images, notes = _validation_images(config, needed=objective.needs_labels)
    if images is not None and objective.trains_classifier:
        evaluator = _classifier_evaluator(config, source, _spec(module), images, accelerator)
        return Validation(evaluator, None, notes, f"top1 {images.fingerprint}")
    if objective.needs_labels:
        return Validation(None, None, notes)
    if objective.trains_classifier:
        return Validation(
            None, last_epoch, (*notes, _last("no labelled images in --val-split")), "epoch"
        )
    measured: list[tuple[Evaluate, Choose, str]] = []
    if images is not None:
        neighbours, more, where = _neighbour_evaluator(config, _spec(module), images, accelerator)
        notes = (*notes, *more)
        measured.append((neighbours, by_metric("knn_top1"), f"knn_top1 {where}"))
    elif config.knn_split is not None:
        raise UsageError(
            "--knn-split: classifies the labelled images of --val-split, and there are none; give a"
            " labelled --val-split, or leave --knn-split out"
        )
    if config.val_cache is not None and isinstance(source, CachedTeacher):
        loss, where = _feature_loss_evaluator(config, source, module, accelerator)
        measured.append((loss, by_metric("feature_loss", sign=-1), f"feature_loss {where}"))
    if not measured:
        why = "no labelled images in --val-split, and no --val-cache"
        return Validation(None, last_epoch, (*notes, _last(why)), "epoch")
    _, choose, measure = measured[0]
    return Validation(_all([each[0] for each in measured]), choose, notes, measure)


def local_cache_of(config: TrainConfig) -> LocalCache | None:
    """Return the folder for copies of remote files."""
    return make_local_cache(config.local_cache, config.local_cache_size)


def decode_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the type of products that decode targets: bfloat16 products are slower on CPUs."""
    on_cuda = accelerator.device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return torch.bfloat16 if on_cuda else torch.float32


def _last(why: str) -> str:
    return f"{why}: the last epoch counts as the best (model_best)"


def _all(evaluators: Sequence[Evaluate]) -> Evaluate:
    def evaluate(model: nn.Module) -> Mapping[str, float]:
        return {name: value for each in evaluators for name, value in each(model).items()}

    return evaluate


def _spec(module: DistillationModule) -> StudentSpec:
    spec: StudentSpec = module.student.spec  # type: ignore[assignment]
    return spec


def _validation_images(
    config: TrainConfig, *, needed: bool
) -> tuple[ImageDataset | None, tuple[str, ...]]:
    """Open the labelled images of ``--val-split``, if they are needed or exist."""
    if config.val_split is None or config.data_dir is None:
        return None, ()
    try:
        images = _open(config, config.data_dir, config.val_split)
    except DataError as error:
        if not needed and "val_split" not in config.model_fields_set:
            return None, (f"no validation split: {error}",)
        raise DataError(
            f"{error}; name the validation split with --val-split, or train without by "
            "--val-split none"
        ) from error
    labelled = images.labelled()
    if len(labelled):
        return labelled, labelled.notes
    if needed:
        raise DataError(
            f"{images.location}: none of its {len(images):,} images has a label to validate on;"
            " name a labelled split with --val-split, or train without by --val-split none"
        )
    return None, images.notes


def _open(config: TrainConfig, data_dir: str, split: str) -> ImageDataset:
    return open_images(
        data_dir,
        split,
        local_cache=local_cache_of(config),
        # Labels of a validation split are wanted even where training ignores its own.
        options=config.image_options.model_copy(update={"labels": "auto"}),
    )


def _classifier_evaluator(
    config: TrainConfig,
    source: Source,
    spec: StudentSpec,
    images: ImageDataset,
    accelerator: Accelerator,
) -> Evaluator:
    data = classes_of_data(images.location, images.class_names, images.labels)
    # A validation folder may lack a class of the training set: its labels would be shifted.
    class_map = None
    if data.names is not None and source.class_names is not None:
        trained = Classes("the student", source.num_classes, source.class_names)
        advice = "remove what is of no class of the training set, or evaluate by --val-split none"
        class_map = match_classes(data, trained, advice=advice).indices
    answers = None
    if config.val_cache is not None and isinstance(source, CachedTeacher):
        location = open_storage(config.val_cache, local_cache=local_cache_of(config))
        validated = open_cache(location)
        answer_map = _teacher_class_map(config, source, validated, data, class_map)
        answers = cached_answers(validated, images, class_map=answer_map)
    return Evaluator(
        EvaluationViews(images, accelerator, config.batch_size, config.workers),
        _view(spec),
        class_map=class_map,
        answers=answers,
    )


def _neighbour_evaluator(
    config: TrainConfig, spec: StudentSpec, images: ImageDataset, accelerator: Accelerator
) -> tuple[NeighbourEvaluator, tuple[str, ...], str]:
    """Return the evaluator, notes about the images of ``--knn-split``, and a name of all images."""
    class_map: Sequence[int] | None = None
    notes: tuple[str, ...] = ()
    if config.knn_split is None or config.data_dir is None:
        queries, gallery = halves(images)
    else:
        queries, gallery = images, _open(config, config.data_dir, config.knn_split).labelled()
        notes = gallery.notes
        if gallery.fingerprint == queries.fingerprint:
            notes += (
                f"--knn-split {config.knn_split}: has the images of --val-split, each of which is"
                " its own neighbour, so that the scores are too high; without the option they are"
                " divided into halves",
            )
        if not len(gallery):
            raise DataError(
                f"--knn-split {config.knn_split}: no image of {gallery.location} has a label; name"
                " a labelled split, or leave the option out"
            )
        ours, theirs = (
            classes_of_data(part.location, part.class_names, part.labels)
            for part in (queries, gallery)
        )
        if ours.names is not None and theirs.names is not None:
            class_map = match_classes(ours, theirs, advice="leave out --knn-split").indices

    def views(images: ImageDataset) -> EvaluationViews:
        return EvaluationViews(images, accelerator, config.batch_size, config.workers)

    pair = views(queries), views(gallery)
    evaluator = NeighbourEvaluator(*pair, _view(spec), class_map=class_map)
    return evaluator, notes, f"{queries.fingerprint} {gallery.fingerprint}"


def _feature_loss_evaluator(
    config: TrainConfig,
    source: CachedTeacher,
    module: DistillationModule,
    accelerator: Accelerator,
) -> tuple[FeatureLossEvaluator, str]:
    """Return the evaluator, and a name of its cache."""
    missing = {"--data-dir is missing": "--val-split is missing"}
    with rewording(missing if config.val_split is None else {}):
        validated = CachedTeacher(
            str(config.val_cache),
            data_dir=None if config.val_split is None else config.data_dir,
            split=config.val_split or config.split,
            image_options=config.image_options,
            local_cache=local_cache_of(config),
            targets=config.targets,
        )
    for name, ours in source.feature_teachers.items():
        theirs = validated.feature_teachers[name]
        if (theirs.weights_sha256, theirs.stages) != (ours.weights_sha256, ours.stages):
            raise CacheMismatch(
                f"--val-cache {config.val_cache}: was made by the teacher {theirs.model} at"
                f" {theirs.img_size} px (weights {theirs.weights_sha256[:12]}…), and the student"
                f" learns from {ours.model} at {ours.img_size} px ({ours.weights_sha256[:12]}…);"
                " give a cache of validation images by the same teacher"
            )
    world_size, student = accelerator.num_processes, module.student
    targets = validated.targets(module.objective, compute_dtype=decode_dtype(accelerator))
    loader = validated.loader(
        student,  # type: ignore[arg-type]
        targets,
        batch_size=max(1, min(config.batch_size, len(validated.reader.samples) // world_size)),
        num_workers=config.workers,
        seed=config.seed,
        allowed_drift=config.allow_pixel_drift or 0.0,
        rank=accelerator.process_index,
        world_size=world_size,
    )
    evaluator = FeatureLossEvaluator(module, targets, loader, accelerator)
    return evaluator, validated.chosen.base.manifest.plan.cache_id


def _view(spec: StudentSpec) -> EvaluationConfig:
    try:
        return EvaluationConfig.of(spec)
    except UsageError as error:
        raise UsageError(
            f"{spec.model}: {error}; train without evaluation by --val-split none"
        ) from error


def _teacher_class_map(
    config: TrainConfig,
    source: CachedTeacher,
    validated: CacheReader,
    data: Classes,
    class_map: Sequence[int] | None,
) -> Sequence[int] | None:
    """Return the class of the ``--val-cache`` teacher for each label of the validation split."""
    identity = validated.identity
    spec = TeacherSpec.model_validate(identity.teacher)
    trained = next(iter(source.matches.values()))
    if spec.weights_sha256 == source.spec.weights_sha256 and isinstance(trained, ClassMatch):
        # Validation labels are the student's classes, which were matched with this teacher's.
        if trained.indices is None or class_map is None:
            return class_map if trained.indices is None else trained.indices
        return [trained.indices[label] for label in class_map]
    return match_teacher(data, spec, config.class_map, stored=identity.class_map).indices
