"""Whether a teacher's head is a classifier, and the names of its classes.

A head with new random weights classifies nothing, and the projection of an image tower (CLIP,
SigLIP, PE) into the space of texts has no classes. Teachers are built without either.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from scalekd.errors import DataError, UsageError
from scalekd.models.classes import (
    MAX_NAME_LENGTH,
    Classes,
    ClassMatch,
    imagenet_names,
    match_classes,
)
from scalekd.models.names import ModelSource, describe_model
from scalekd.teachers.spec import TeacherSpec

# Class counts of published classifiers that are not in timm's ImageNet lists: the winter release of
# ImageNet-21K (MViTv2), Bamboo.
_OTHER_CLASSIFIERS = frozenset({19168, 115217})
# All widths of published projections are multiples of this, and no number of classes is.
_EMBEDDING_MULTIPLE = 64


def why_no_classifier(
    source: ModelSource, num_outputs: int, *, reads_published: bool, named: bool
) -> str | None:
    """Return a clause that says why a model's head is no classifier; ``None`` if it is one.

    Args:
        source: The model.
        num_outputs: Requested number of outputs of the head; 0 for no head.
        reads_published: Whether the weights are the published ones, or those of a folder or
            repository, rather than a checkpoint or random.
        named: Whether the user names the classes, which makes any head a classifier.
    """
    if num_outputs == 0:
        return "it has no classification head"
    published = source.pretrained_cfg.get("num_classes")
    if reads_published and published is not None and int(published) != num_outputs:
        return (
            f"its head is new, with random weights: num_classes={num_outputs} is asked for, and its"
            f" weights have {published or 'no'} classes"
        )
    if (
        not named
        and not source.pretrained_cfg.get("label_names")
        and _is_embedding(source.architecture, num_outputs)
    ):
        return (
            f"its head is a projection into an embedding of {num_outputs} dimensions, not a"
            " classifier"
        )
    return None


def class_names_of(
    source: ModelSource, num_classes: int, *, published: bool, given: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return the names of a classifier's classes from the user, its folder or timm.

    Args:
        source: The model.
        num_classes: Number of outputs of the model's head.
        published: Whether the model has the weights that ``source`` describes.
        given: Names from the user, which take precedence.

    Raises:
        UsageError: The number of names from the user is wrong.
        DataError: The number of names in the model's folder is wrong, or they are not names.
    """
    if given is not None:
        if len(given) != num_classes:
            raise UsageError(
                f"--teacher-classes has {len(given):,} names, and {source.label} {num_classes:,}"
                " classes; expected one name a line for each of them"
            )
        return tuple(given)
    if not published:
        return None
    names = source.pretrained_cfg.get("label_names")
    if names is None:
        described_here = source.name == source.label and ":" not in source.name  # by timm itself
        return imagenet_names(num_classes) if described_here else None
    if not isinstance(names, list | tuple) or not all(
        isinstance(name, str) and len(name) <= MAX_NAME_LENGTH for name in names
    ):
        raise DataError(f"{source.label}: label_names of its config.json is not a list of names")
    if len(names) != num_classes:
        raise DataError(
            f"{source.label}: label_names of its config.json has {len(names):,} names, and the"
            f" model {num_classes:,} classes; correct it"
        )
    return tuple(names)


def _is_embedding(architecture: str, num_outputs: int) -> bool:
    """Return whether timm's weights of the architecture have a projection of this width."""
    from timm.models import get_arch_pretrained_cfgs

    if num_outputs in _OTHER_CLASSIFIERS or imagenet_names(num_outputs) is not None:
        return False
    published = {int(cfg.num_classes) for cfg in get_arch_pretrained_cfgs(architecture).values()}
    return num_outputs in published and num_outputs % _EMBEDDING_MULTIPLE == 0


def match_teacher(
    data: Classes,
    teacher: TeacherSpec,
    request: str | Path | Sequence[int] = "auto",
    *,
    stored: Sequence[int] | str | None = None,
) -> ClassMatch:
    """Find the teacher's class of each label of a data set.

    Args:
        data: The classes of the data set.
        teacher: Description of the teacher that gives the logits.
        request: Requested mapping; see :func:`scalekd.models.classes.match_classes`.
        stored: ``class_map`` of the cache of the logits; used if ``request`` is ``auto``.

    Raises:
        DataError: Classes cannot be matched.
        UsageError: The teacher's head is not a classifier, or the requested map does not fit.
    """
    names = teacher.class_names
    published = teacher.weights_source == "pretrained"
    if names is None and teacher.num_classes and published and ":" not in teacher.model:
        # Caches of older versions have no class names, and any head.
        reason, names = _published(teacher.model, teacher.num_classes)
        if reason is not None:
            raise UsageError(f"the teacher {teacher.model} gives no logits to learn from: {reason}")
    if request == "auto" and stored is not None:
        request = "none" if isinstance(stored, str) else stored
    classes = Classes(teacher.classes.owner, teacher.num_classes or 0, names)
    if request == "auto" and teacher.weights_source == "random" and names is None:
        # The classes of random weights have no meaning.
        match = match_classes(data, classes, "none")
        if data.count == teacher.num_classes or not data.count:
            return match
        return replace(match, note=f"{classes.owner} has random weights: classes go by number")
    return match_classes(data, classes, request)


def _published(model: str, num_classes: int) -> tuple[str | None, tuple[str, ...] | None]:
    """Return why published weights are no classifier, and the names of their classes."""
    from timm.models import is_model

    if not is_model(model.partition(".")[0]):
        return None, None  # the model is a folder
    source = describe_model(model)
    reason = why_no_classifier(source, num_classes, reads_published=True, named=False)
    if reason is not None:
        return reason, None
    return None, class_names_of(source, num_classes, published=True, given=None)
