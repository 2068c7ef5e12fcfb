"""Measure a trained student, or any timm model, on a split.

scalekd evaluate ./run --data-dir /imagenet --split val
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from scalekd.cache import open_cache
from scalekd.distributed import process_faults
from scalekd.errors import DataError, UsageError, rewording
from scalekd.evaluation import (
    Answers,
    EvaluationConfig,
    EvaluationViews,
    Evaluator,
    cached_answers,
    evaluate_linear_probe,
    evaluate_neighbours,
    live_answers,
)
from scalekd.images import ImageDataset
from scalekd.loading import open_images, worker_faults
from scalekd.models.build import Preprocessing, build_model, preprocessing_of
from scalekd.models.classes import Classes, ClassMatch, classes_of_data, match_classes
from scalekd.models.names import ModelSource, describe_model
from scalekd.options import height_and_width
from scalekd.pipelines._notes import note
from scalekd.pipelines._run_options import EvaluateConfig
from scalekd.students import StudentSpec, resolve_student_name
from scalekd.teachers import (
    LIVE_TEACHER_ADVICE,
    TeacherConfig,
    TeacherSpec,
    load_teacher,
    match_teacher,
)
from scalekd.teachers.heads import class_names_of, why_no_classifier
from scalekd.training import find_run_checkpoint, load_trained_student
from scalekd.training.accelerator import make_accelerator


class _Opened(NamedTuple):
    """The model to evaluate, its preprocessing, and its classes."""

    model: nn.Module
    view: EvaluationConfig
    name: str
    classes: Classes
    samples_viewed: int | None
    goes_by_number: bool = False  # if names do not match, as for a run's own numbers


class Evaluation(dict[str, Any]):
    """Metrics of a model by name, and facts about the model and the images."""

    def lines(self) -> list[str]:
        """Return the lines to print."""
        subset, viewed = self["num_classes_evaluated"], self["samples_viewed"]
        scores = (
            f"top-1 {self['top1']:.2f} %, top-5 {self['top5']:.2f} %, loss {self['loss']:.4f}, "
            if "top1" in self
            else "no answers of its own, "
        )
        lines = [
            f"{self['model']} on {self['data']}: {scores}{self['num_samples']:,} images"
            + (f" of {subset} of its classes" if subset is not None else "")
            + (f", after {viewed:,} views" if viewed is not None else "")
        ]
        if "teacher_agreement" in self:
            lines.append(
                f"agrees with the teacher on {self['teacher_agreement']:.2f} %; "
                f"the teacher's top-1 is {self['teacher_top1']:.2f} %"
            )
        if "knn_top1" in self:
            lines.append(
                f"{self['knn_k']} nearest of {self['knn_num_gallery']:,} images: "
                f"top-1 {self['knn_top1']:.2f} %, top-5 {self['knn_top5']:.2f} %"
            )
        if "linear_top1" in self:
            tops = self["linear_top1_of_seeds"]
            spread = f" ± {statistics.stdev(tops):.2f} ({len(tops)} seeds)" if len(tops) > 1 else ""
            lines.append(
                f"logistic regression on the features of {self['linear_num_images']:,} images: "
                f"top-1 {self['linear_top1']:.2f} %{spread}, top-5 {self['linear_top5']:.2f} %"
            )
        return lines


@worker_faults()
@process_faults()
def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure a model.

    Raises:
        UsageError: The run or model does not exist, or the options contradict one another.
        DataError: The split does not exist, an image is corrupt, or labels are out of range.
        CacheMismatch: The cache of the teacher's answers is of other images.
    """
    accelerator = make_accelerator(config.amp)
    opened = _open_model(config)

    def views_of(split: str) -> EvaluationViews:
        whole = open_images(config.data_dir, split, options=config.image_options)
        images = whole.labelled()
        if not len(images):
            raise DataError(
                f"{whole.location}: none of its {len(whole):,} images has a label, so nothing can"
                " be evaluated on it; give a labelled split, or name what holds the labels with"
                " --target-key"
            )
        note(*images.notes)
        return EvaluationViews(images, accelerator, config.batch_size, config.workers)

    views = views_of(config.split)
    # A split that both options name is opened once, and its notes are printed once.
    galleries = {
        split: views_of(split)
        for split in dict.fromkeys((config.knn_split, config.linear_probe))
        if split is not None
    }
    for gallery in galleries.values():
        if gallery.images.fingerprint == views.images.fingerprint:
            note(
                f"{views.images.location}: the evaluated images are those of --knn-split or"
                " --linear-probe, so that each is its own example and the scores are too high"
            )
    data = _classes_of_data(views.images)
    model = opened.model.to(accelerator.device)
    metrics: dict[str, Any] = {
        "model": opened.name,
        "samples_viewed": opened.samples_viewed,
        "data": views.images.location,
        "img_size": list(opened.view.img_size),
        "crop_pct": opened.view.crop_pct,
        "interpolation": opened.view.policy.interpolation,
        "num_samples": len(views.images),
        "num_classes_evaluated": None,
    }
    match = _match(config, data, opened) if opened.classes.count else None
    if match is not None:
        if match.note is not None:
            note(match.note)
        evaluator = Evaluator(
            views, opened.view, class_map=match.indices, answers=_answers(config, views, data)
        )
        subset = None if match.indices is None else len(match.indices)
        metrics |= {"num_classes_evaluated": subset, **evaluator.evaluate(model).metrics()}
    neighbours = partial(evaluate_neighbours, k=config.knn_k, temperature=config.knn_temperature)
    probe = partial(evaluate_linear_probe, seeds=range(config.linear_probe_seeds))
    measures: tuple[tuple[str | None, Callable[..., Any]], ...] = (
        (config.knn_split, neighbours),
        (config.linear_probe, probe),
    )
    for split, measure in measures:
        if split is not None:
            others = galleries[split]
            class_map = None if config.class_map == "none" else _gallery_classes(views, others)
            metrics |= asdict(measure(model, views, others, opened.view, class_map=class_map))
    accelerator.end_training()
    return Evaluation(metrics)


def _open_model(config: EvaluateConfig) -> _Opened:
    size = None if config.img_size is None else height_and_width(config.img_size)
    run = Path(config.model)
    if find_run_checkpoint(run) is not None:
        if config.checkpoint is not None:
            raise UsageError(
                f"--checkpoint: applies to models by name, and {run} is a training run; to choose"
                f" one of its checkpoints, give its folder as the model, such as {run}/model_best"
            )
        student = load_trained_student(run, use_ema=config.use_ema)
        view = _view(config, student.spec, student.spec.img_size)
        viewed = student.state.get("samples_viewed")
        name = str(student.checkpoint)
        classes = Classes(name, student.spec.num_classes, student.class_names)
        if not classes.count:
            _require_features(config, name, "it was trained without a head")
        return _Opened(student.model, view, name, classes, viewed, student.class_names is None)
    if (run / "args.yaml").is_file():
        raise UsageError(f"{run}: this training run has written no checkpoint yet")
    if config.use_ema:
        raise UsageError(f"--use-ema: {config.model} is not a training run")
    if "/" in config.model and ":" not in config.model and not run.exists():
        raise DataError(
            f"{config.model}: no such folder; give a run, an exported folder or a model"
        )
    source = describe_model(resolve_student_name(config.model)[0])
    kwargs = dict(source.model_args)
    if size is not None and source.pretrained_cfg.get("fixed_input_size"):
        kwargs["img_size"] = size
    with rewording({"Classes, image size and widths are set with --model-kwargs and": "See"}):
        model = build_model(
            source,
            pretrained=config.pretrained,
            checkpoint=config.checkpoint,
            model_kwargs=kwargs,
            seed=0,  # random weights are the same in every process
        )
    recorded = preprocessing_of(model)
    native = source.pretrained_cfg.get("input_size") or (3, 224, 224)
    view = _view(config, recorded, (int(native[1]), int(native[2])))
    classes = _classes_of(source, int(model.num_classes), config)  # type: ignore[arg-type]
    is_random = not config.pretrained and config.checkpoint is None
    return _Opened(model.eval(), view, source.label, classes, None, is_random)


def _classes_of(source: ModelSource, num_classes: int, config: EvaluateConfig) -> Classes:
    published = config.pretrained and config.checkpoint is None
    reason = why_no_classifier(source, num_classes, reads_published=published, named=False)
    if reason is not None:
        _require_features(config, source.label, reason)
        return Classes(source.label, 0, None)
    names = class_names_of(source, num_classes, published=published, given=None)
    return Classes(source.label, num_classes, names)


def _require_features(config: EvaluateConfig, name: str, reason: str) -> None:
    """Check that a model without classes is evaluated by its features alone."""
    if config.knn_split is None and config.linear_probe is None:
        raise UsageError(
            f"{name} has no classes to evaluate: {reason}; evaluate its features with --knn-split"
            " or --linear-probe"
        )
    for name_of_option in ("teacher", "teacher_cache"):
        if getattr(config, name_of_option) is not None:
            raise UsageError(
                f"--{name_of_option.replace('_', '-')}: {name} has no classes that could agree with"
                f" a teacher's: {reason}"
            )


def _view(
    config: EvaluateConfig, own: StudentSpec | Preprocessing, img_size: tuple[int, int]
) -> EvaluationConfig:
    """Return the preprocessing of the model, changed by the options."""
    try:
        return EvaluationConfig(
            img_size=height_and_width(config.img_size or img_size),
            mean=own.mean,
            std=own.std,
            crop_pct=config.crop_pct or own.crop_pct,
            interpolation=config.interpolation or own.interpolation,
        )
    except UsageError as error:
        raise UsageError(f"{config.model}: {error}; choose one with --interpolation") from error


def _match(config: EvaluateConfig, data: Classes, opened: _Opened) -> ClassMatch | None:
    """Match the classes; ``None`` for other classes, on which only the features are measured."""
    try:
        return match_classes(data, opened.classes, config.class_map)
    except DataError as error:
        if config.class_map != "auto":
            raise
        if opened.goes_by_number:
            return match_classes(data, opened.classes, "none")
        by_features = config.knn_split is not None or config.linear_probe is not None
        if not by_features or config.teacher is not None or config.teacher_cache is not None:
            raise
        note(f"only the features are measured, not the model's own answers: {error}")
        return None


def _match_teacher(
    config: EvaluateConfig,
    data: Classes,
    spec: TeacherSpec,
    stored: Sequence[int] | str | None = None,
) -> ClassMatch:
    """Match by name if possible; ``--class-map FILE`` applies to the teacher only if names fail."""
    if config.class_map == "none":
        return match_teacher(data, spec, "none")
    try:
        return match_teacher(data, spec, stored=stored)
    except DataError:
        if config.class_map == "auto":
            raise
        return match_teacher(data, spec, config.class_map)


def _gallery_classes(views: EvaluationViews, gallery: EvaluationViews) -> Sequence[int] | None:
    ours, theirs = _classes_of_data(views.images), _classes_of_data(gallery.images)
    if ours.names is None or theirs.names is None:
        return None
    advice = "leave out --knn-split and --linear-probe, or go by numbers with --class-map none"
    return match_classes(ours, theirs, advice=advice).indices


def _classes_of_data(images: ImageDataset) -> Classes:
    return classes_of_data(images.location, images.class_names, images.labels)


def _answers(config: EvaluateConfig, views: EvaluationViews, data: Classes) -> Answers | None:
    if config.teacher_cache is not None:
        if config.teacher is not None:
            raise UsageError("--teacher and --teacher-cache: one or the other")
        reader = open_cache(config.teacher_cache)
        spec = TeacherSpec.model_validate(reader.identity.teacher)
        match = _match_teacher(config, data, spec, reader.identity.class_map)
        return cached_answers(reader, views.images, class_map=match.indices)
    if config.teacher is None:
        if config.teacher_checkpoint is not None:
            raise UsageError("--teacher-checkpoint needs --teacher, the name of its model")
        return None
    asked = TeacherConfig(
        model=config.teacher,
        checkpoint=config.teacher_checkpoint,
        pretrained=config.teacher_pretrained,
    )
    with rewording({"--no-pretrained": "--no-teacher-pretrained", **LIVE_TEACHER_ADVICE}):
        teacher = load_teacher(asked)
    if teacher.no_classifier is not None:
        raise UsageError(f"--teacher {config.teacher}: gives no answers: {teacher.no_classifier}")
    match = _match_teacher(config, data, teacher.spec)
    device = views.accelerator.device
    return live_answers(teacher.to(device), views, class_map=match.indices)
