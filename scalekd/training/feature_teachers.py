"""Teachers of a cache as an objective takes them: settings, shapes and tail."""

from scalekd.cache import CacheReader
from scalekd.distillation import FORMS, ScaleKDConfig, TeacherFeatures
from scalekd.errors import UsageError
from scalekd.teachers import FEATURES_ONLY, Tail, TeacherSpec, load_tail_bytes


def teacher_features(
    reader: CacheReader,
    spec: TeacherSpec,
    config: ScaleKDConfig,
    *,
    tail_checkpointing: bool | None,
) -> TeacherFeatures:
    """Describe a teacher's features for the objective.

    Args:
        reader: Cache of the teacher.
        spec: The teacher, as its cache describes it.
        config: Settings of this teacher; ``tpp`` is off without a tail unless it is set explicitly.
        tail_checkpointing: See `CachedTeacher.module`; ``None``: no tail is needed.

    Raises:
        UsageError: The settings need a tail, and the cache contains none.
        CacheCorrupt: The tail is damaged.
    """
    if spec.family == FEATURES_ONLY and "tpp" not in config.model_fields_set:
        config = config.model_copy(update={"tpp": False})
    tail = None
    if tail_checkpointing is not None and config.tpp:
        tail = _tail(reader, spec)
        tail.set_grad_checkpointing(tail_checkpointing)
    return TeacherFeatures(config, spec.stages, tail)


def has_summary(objective: str, config: ScaleKDConfig) -> bool:
    """Return whether an objective compares summaries with these settings of a teacher."""
    if objective == "features" and config.summary_weight is None:
        return True
    return objective in FORMS and bool(config.summary_weight)


def _tail(reader: CacheReader, spec: TeacherSpec) -> Tail:
    identity = reader.identity
    if spec.family == FEATURES_ONLY:
        raise UsageError(
            f"{reader.location}: the teacher {spec.model} has no tail, which tpp=true passes stage"
            " 3 through; give --distillation tpp=false"
        )
    if identity.tail is None:
        raise UsageError(
            f"{reader.location}: contains no teacher tail, which stage 3 of the scalekd objective"
            " passes through; write the cache again by cache-teacher, which keeps it with any"
            " --stages, or give --distillation tpp=false"
        )
    content = reader.file(identity.tail, identity.tail_digest)  # checks its bytes
    return load_tail_bytes(content, reader.storage.locate(identity.tail))
