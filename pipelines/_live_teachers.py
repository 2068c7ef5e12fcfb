"""Teachers that run beside the student: those of a cache, with the same weights."""

from scalekd.distillation import JoinedTargets, Objective
from scalekd.errors import CacheMismatch, UsageError, rewording
from scalekd.pipelines._sources import same_teacher
from scalekd.teachers import (
    LIVE_TEACHER_ADVICE,
    Teacher,
    TeacherSpec,
    has_class_token,
    load_teacher,
    teacher_named_by_cache,
)
from scalekd.training import CachedTeacher, OnlineTargets, TrainConfig
from scalekd.training.precision import AUTOCAST_DTYPES, choose_precision

LiveTargets = OnlineTargets | JoinedTargets


def live_targets(config: TrainConfig, source: CachedTeacher, objective: Objective) -> LiveTargets:
    """Build the target source of ``--online``: the teachers of ``--targets``, loaded.

    Args:
        config: Options of the run.
        source: Opened with ``live=True``.
        objective: Decides what the teachers give.

    Raises:
        UsageError: A teacher cannot be named, or ``--teacher`` has another number of names.
        CacheMismatch: A teacher has other weights than its cache says.
        EnvironmentFault: Weights cannot be read.
    """
    specs = source.feature_teachers
    names = _for_each(config.teacher, len(specs), option="--teacher")
    checkpoints = _for_each(config.teacher_checkpoint, len(specs), option="--teacher-checkpoint")
    (owner,) = source.chosen.logits
    targets = {}
    for (key, spec), name, checkpoint in zip(specs.items(), names, checkpoints, strict=True):
        logits = objective.needs_logits and key == owner
        targets[key] = OnlineTargets(
            _live_teacher(spec, name, checkpoint, where=str(source.chosen.caches[key].location)),
            amp_dtype=AUTOCAST_DTYPES[choose_precision(config.amp)],
            classes=source.class_indices().get(key) if logits else None,
            class_token=objective.needs_pooled and has_class_token(spec),
        )
    if len(targets) == 1:
        return targets[owner]
    return JoinedTargets(targets, features=tuple(targets), logits=[owner])


def _for_each(value: str | None, count: int, *, option: str) -> list[str | None]:
    """Divide an option at its commas into one value for each teacher, ``None`` where it is empty.

    A single teacher's value is not divided, since the path of a file may contain commas.
    """
    if value is None or count == 1:
        return [value] * count
    values = [part.strip() or None for part in value.split(",")]
    if len(values) != count:
        raise UsageError(
            f"{option} {value}: names {len(values)} teachers, and --targets {count}; give one for"
            " each with commas between them, empty where the cache's own name is right"
        )
    return values


def _live_teacher(
    spec: TeacherSpec, name: str | None, checkpoint: str | None, *, where: str
) -> Teacher:
    asked = same_teacher(
        spec,
        model=name or teacher_named_by_cache(spec.model, option="--teacher"),
        checkpoint=checkpoint,
        pretrained=spec.weights_source != "random",
    )
    with rewording(LIVE_TEACHER_ADVICE):
        teacher = load_teacher(asked)
    if teacher.spec.weights_sha256 != spec.weights_sha256:
        raise CacheMismatch(
            f"{where}: was made by {spec.model} with weights {spec.weights_sha256[:12]}…, and the"
            f" live teacher has {teacher.spec.weights_sha256[:12]}…; give --teacher or"
            " --teacher-checkpoint for the same weights"
        )
    return teacher
