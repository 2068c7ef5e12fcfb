r"""Train a student from a cache.

    scalekd train-student --cache ./swin_l-cache --data-dir /imagenet --model resnet50 \
        --output ./run

Under ``torchrun`` or ``accelerate launch`` every process trains on its share of each epoch. The
same command with ``--resume auto`` continues from the last checkpoint; on one CPU process the
result is bit for bit that of an uninterrupted run.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from scalekd.cache import JoinedTargets
from scalekd.distillation import Objective
from scalekd.distributed import process_faults
from scalekd.errors import UsageError
from scalekd.loading import worker_faults
from scalekd.pipelines._initial import initial_weights
from scalekd.pipelines._live_teachers import LiveTargets, live_targets
from scalekd.pipelines._notes import note
from scalekd.pipelines._progress import doing
from scalekd.pipelines._run_facts import Source, run_facts
from scalekd.pipelines._validation import decode_dtype, local_cache_of, make_validation
from scalekd.pipelines.configure import departures_from_recipe
from scalekd.storage.locks import require_locks
from scalekd.students import Student, create_student, resolve_student_name
from scalekd.text import counted
from scalekd.training import (
    CachedTeacher,
    EpochLoader,
    LabelledImages,
    NoTargets,
    TrainConfig,
    Trainer,
    TrainResult,
    freeze_parameters,
    is_convolutional,
    planned_epochs,
    synchronise_batch_norm,
)
from scalekd.training.accelerator import make_accelerator
from scalekd.training.trackers import check_trackers

_NEED_A_CACHE = (
    "targets",
    "logits_from",
    "online",
    "teacher",
    "teacher_checkpoint",
    "val_cache",
    "class_map",
    "allow_pixel_drift",
)


@worker_faults()
@process_faults()
def train_student(config: TrainConfig) -> TrainResult:
    """Train a student, or continue the run in ``config.output``.

    Faults of cache, images, teacher and student are reported before the first update.

    Raises:
        ScaleKDError: Any fault that a user can correct; see also `Trainer.fit`.
    """
    require_locks()
    check_trackers(config.log_with)
    notes: list[str] = []
    accelerator = make_accelerator(
        config.amp, log_with=config.log_with, output=config.output, note=notes.append
    )
    if config.recipe is not None and accelerator.is_main_process:
        world_size = accelerator.num_processes
        note(*departures_from_recipe(config.recipe, config, world_size=world_size))
    set_seed(config.seed)  # every process builds the same student and projectors
    with doing("opening the cache and the images"):
        source = _open_source(config)
    with doing("building the student"):
        student = _make_student(config, source, notes)
    if config.sync_bn:
        synchronise_batch_norm(student, accelerator)
    module = source.module(
        student,
        objective=config.objective,
        config=config.objective_config,
        channels_last=_channels_last(config, student, accelerator),
        tail_checkpointing=config.tail_checkpointing,
    )
    if module.objective.contrasts_images and config.batch_size * accelerator.num_processes == 1:
        raise UsageError(
            "--batch-size 1: the summary loss tells the images of a batch apart, and learns nothing"
            " from one; give 2 or more (better 32), or --distillation summary=standardised"
        )
    note(*_notes(config, source, student, module.objective))
    targets = _make_targets(config, source, module.objective, accelerator)
    loader = _make_loader(config, source, student, targets, accelerator)
    validation = make_validation(config, source, module, accelerator)
    note(*validation.notes)
    trainer = Trainer(
        config,
        accelerator=accelerator,
        module=module,
        loader=loader,
        targets=targets,
        evaluate=validation.evaluate,
        choose=validation.choose,
        facts={**run_facts(config, source, student), "measure": validation.measure},
        notes=notes,
    )
    result = trainer.fit()
    accelerator.end_training()
    return result


def _channels_last(config: TrainConfig, student: Student, accelerator: Accelerator) -> bool:
    """Return the value of the option; by default, whether the student is a CNN on CUDA.

    A training step of ResNet-50 took 55 ms in this format, and 105 ms without.
    """
    if config.channels_last is not None:
        return config.channels_last
    return accelerator.device.type == "cuda" and is_convolutional(student.model)


def _notes(
    config: TrainConfig, source: Source, student: Student, objective: Objective
) -> list[str]:
    if isinstance(source, LabelledImages):
        return source.notes
    notes = [*source.notes_for(objective), *_constant_loss(student, objective)]
    if config.objective == "features" and (unread := _of_classifiers(config)):
        notes.append(
            "--objective features reads neither labels nor logits, so these settings have no"
            f" effect: {', '.join(unread)}"
        )
    num_passes, num_epochs = len(source.reader.passes), planned_epochs(config)
    if num_epochs > num_passes and not source.reader.policy.deterministic:
        notes.append(_reused_views(num_epochs, num_passes, fresh=config.online))
    return notes


def _constant_loss(student: Student, objective: Objective) -> list[str]:
    """Name the frequency loss of a final map of 1 x 1, whose projection is equal everywhere.

    One of the level before it can differ by position after a tail with rotary embeddings.
    """
    name = "stage4_frequency_loss"
    is_read = any(term.endswith(name) for term in objective.loss_names)
    if student.spec.levels[1].num_patch_tokens > 1 or not is_read:
        return []
    return [
        f"{name}: cannot be lowered, because this map of the student is 1 x 1 at"
        f" {' x '.join(map(str, student.spec.img_size))} px; give a larger --img-size, or"
        " --distillation stage4.frequency_weight=0"
    ]


def _of_classifiers(config: TrainConfig) -> list[str]:
    """Return the settings that were changed and that only losses of a classifier read."""
    fields = type(config).model_fields
    names = ("smoothing", "bce_loss", "logits_from", "class_map")
    changed = [name for name in names if getattr(config, name) != fields[name].default]
    settings = ("kd", "kd_alpha", "temperature", "task", "label_smoothing")
    changed += [name for name in settings if name in config.distillation.model_fields_set]
    return changed


def _make_loader(
    config: TrainConfig,
    source: Source,
    student: Student,
    targets: JoinedTargets | NoTargets | LiveTargets,
    accelerator: Accelerator,
) -> EpochLoader:
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_workers": config.workers,
        "seed": config.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
    }
    if isinstance(source, LabelledImages):
        return source.loader(student, **common)
    return source.loader(
        student,
        targets,
        **common,
        teacher_pixels=config.online,
        fresh_views=config.online and planned_epochs(config) > len(source.reader.passes),
        differences=accelerator.device.type != "cpu",  # a CPU restores them in the workers
        allowed_drift=config.allow_pixel_drift or 0.0,
    )


def _reused_views(num_epochs: int, num_passes: int, *, fresh: bool) -> str:
    passes = counted(num_passes, "pass")
    if fresh:
        return f"{num_epochs} epochs: {passes} of the cache, and fresh views from then on"
    times = num_epochs / num_passes
    return (
        f"{num_epochs} epochs over {passes}: every view is trained on {times:.3g} times; for fresh"
        " views add passes with `scalekd cache extend --passes`, or run the teacher with --online"
    )


def _open_source(config: TrainConfig) -> Source:
    if config.cache is None:
        return _open_images_alone(config)
    if config.aug is not None:
        raise UsageError(
            "--aug: is for training without a cache; the views of --cache are trained on, and"
            " cache-teacher --aug determines them"
        )
    if config.online and config.logits_from:
        raise UsageError("--online asks the live teacher for its logits; leave out --logits-from")
    for option in () if config.online else ("teacher", "teacher_checkpoint"):
        if getattr(config, option) is not None:
            raise UsageError(
                f"--{option.replace('_', '-')}: names a live teacher; add --online, or leave it"
                " out: the cache's targets are used"
            )
    return CachedTeacher(
        config.cache,
        data_dir=config.data_dir,
        split=config.split,
        image_options=config.image_options,
        local_cache=local_cache_of(config),
        num_classes=config.num_classes,
        targets=config.targets,
        logits_from=config.logits_from,
        class_map=config.class_map,
        live=config.online,
    )


def _open_images_alone(config: TrainConfig) -> LabelledImages:
    if config.objective != "none":
        raise UsageError(
            f"--cache is missing: --objective {config.objective} learns from a teacher; write one"
            " with `scalekd cache-teacher`, or train on labels alone by --objective none"
        )
    for name in _NEED_A_CACHE:
        if getattr(config, name) not in (None, (), False, "auto"):
            raise UsageError(
                f"--{name.replace('_', '-')}: applies to a teacher's cache, and no --cache is given"
            )
    if config.data_dir is None:
        raise UsageError("--data-dir is missing: without --cache, the student learns from images")
    return LabelledImages(
        config.data_dir,
        split=config.split,
        policy=config.aug or "crop-flip",
        image_options=config.image_options,
        local_cache=local_cache_of(config),
        num_classes=config.num_classes,
    )


def _make_student(config: TrainConfig, source: Source, notes: list[str]) -> Student:
    kwargs = dict(config.model_kwargs)
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    weights, class_names = initial_weights(
        config.model, config.initial_checkpoint, pretrained=config.pretrained
    )
    of_a_folder = ":" in resolve_student_name(config.model)[0]  # or of a hub's repository
    if weights is None and not config.pretrained and of_a_folder:
        notes.append(
            f"--model {config.model}: the architecture with random weights; --pretrained reads its"
            " own"
        )
    own = None if source.class_names is None else tuple(source.class_names)
    known = class_names is not None and own is not None
    num_classes = source.num_classes if config.num_classes is None else config.num_classes
    if config.num_classes == 0 and config.objective != "features":
        raise UsageError(
            f"--num-classes 0: --objective {config.objective} trains a classifier; leave the option"
            " out, or give --objective features"
        )
    if config.objective == "features":
        num_classes = config.num_classes or 0
        if num_classes:
            notes.append(
                f"--num-classes {num_classes}: --objective features trains no classifier, so the"
                " student's keeps its initial values"
            )
    student = create_student(
        config.model,
        num_classes=num_classes,
        img_size=config.img_size or getattr(source, "view_size", None),
        pretrained=config.pretrained,
        checkpoint=weights,
        model_kwargs=kwargs,
        mean=config.mean,
        std=config.std,
        crop_pct=config.crop_pct,
        interpolation=config.interpolation,
        # Classes are compared by name if both sides have names, otherwise by number.
        new_head=class_names != own if known else None,
        notes=notes,
    )
    if config.grad_checkpointing:
        student.model.set_grad_checkpointing(True)  # type: ignore[operator]
    freeze_parameters(student.model, config.freeze)
    return student


def _make_targets(
    config: TrainConfig, source: Source, objective: Objective, accelerator: Accelerator
) -> JoinedTargets | NoTargets | LiveTargets:
    if isinstance(source, LabelledImages):
        return NoTargets()
    if config.online and (objective.needs_features or objective.needs_logits):
        return live_targets(config, source, objective)
    return source.targets(objective, compute_dtype=decode_dtype(accelerator))
