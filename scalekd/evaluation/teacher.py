"""The teacher's predicted class of every sample of a split, computed or read from a cache."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalekd.cache import CacheReader, TargetDecoder
from scalekd.distillation import FullLogits, TopKLogits, select_classes
from scalekd.errors import CacheMismatch, UsageError
from scalekd.evaluation.views import EvaluationConfig, EvaluationViews
from scalekd.images import ImageDataset
from scalekd.teachers import Teacher
from scalekd.training.module import likeliest_class

Answers = np.ndarray[Any, np.dtype[np.int64]]


@torch.inference_mode()
def live_answers(
    teacher: Teacher, views: EvaluationViews, *, class_map: Sequence[int] | None = None
) -> Answers:
    """Run the teacher on its own evaluation view of this process's share of the samples.

    Args:
        teacher: The teacher, on the device.
        views: Evaluation views of the image set.
        class_map: Teacher's class of each label; its other classes are ignored.

    Returns:
        Class of each sample, numbered like the labels; -1 for samples of other processes.

    Raises:
        UsageError: The teacher has no classification head.
    """
    spec = teacher.spec
    if spec.num_classes is None:
        raise UsageError(
            f"{spec.model} has no classification head, so agreement cannot be measured"
        )
    config = EvaluationConfig.of(spec)
    answers = np.full(len(views.images), -1, np.int64)
    for batch in views.batches(config):
        with views.accelerator.autocast():
            logits = teacher.model(batch.images).float()
        answers[list(batch.positions)] = _likeliest(FullLogits(logits), class_map).cpu().numpy()
    return answers


@torch.inference_mode()
def cached_answers(
    reader: CacheReader, images: ImageDataset, *, class_map: Sequence[int] | None = None
) -> Answers:
    """Read the teacher's predicted classes from a cache of the evaluated split.

    Args:
        reader: A cache with a deterministic view of each sample, as ``--aug center`` makes it.
        images: The evaluated split.
        class_map: Teacher's class of each label; its other classes are ignored.

    Returns:
        Class of each sample, numbered like the labels.

    Raises:
        UsageError: The cache has no logits, or has random views.
        CacheMismatch: The cache was not made from this split.
        CacheCorrupt: The cache is damaged.
    """
    if not reader.policy.deterministic:
        raise UsageError(
            f"{reader.location}: contains random views ({reader.policy}), and an answer on a crop"
            " is not the teacher's answer on the image; write a cache of the split by cache-teacher"
            " --aug center"
        )
    fingerprint = reader.identity.data.fingerprint
    if images.fingerprint != fingerprint:
        raise CacheMismatch(
            f"{reader.location}: was made from other images than {images.location} (fingerprint "
            f"{fingerprint[:12]}… in the cache, {images.fingerprint[:12]}… here); give the cache "
            "of this split"
        )
    decoder = TargetDecoder(reader.codecs, features=False, logits=True)
    names = [array.name for array in reader.layout.views if array.name.startswith("logits/")]
    positions = images.positions(reader.samples.keys)
    answers = np.full(len(images), -1, np.int64)
    for first, count in reader.blocks():
        rows = reader.read_rows(0, first, count, names)
        planes = {name.replace("/", "."): torch.from_numpy(rows[name]) for name in names}
        logits = decoder(planes).logits
        answers[positions[first : first + count]] = _likeliest(logits, class_map).numpy()
    if (answers < 0).any():
        missing = images.key(int(np.flatnonzero(answers < 0)[0]))
        raise CacheMismatch(f"{reader.location}: does not contain sample {missing}")
    return answers


def _likeliest(logits: FullLogits | TopKLogits, class_map: Sequence[int] | None) -> Tensor:
    if class_map is None:
        return likeliest_class(logits)
    if max(class_map) >= logits.num_classes:
        raise UsageError(
            f"the class map has class {max(class_map)}, but the teacher has "
            f"{logits.num_classes} classes"
        )
    return likeliest_class(select_classes(logits, torch.tensor(list(class_map))))
