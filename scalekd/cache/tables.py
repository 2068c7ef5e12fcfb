"""The table files of a cache: tail, witnesses and codec tables, with a check for each kind.

A digest proves only that a file has the bytes that the author of the cache wrote. The checks here
prove that a file is of its kind (that a tail belongs to the plan's teacher, for example) before the
file is written to a folder and before memory is allocated for its content.
"""

from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from scalekd.cache.documents.manifest import Identity, StageInfo
from scalekd.cache.files import FileDigest
from scalekd.codecs import FeatureCodec, codec_from_config
from scalekd.errors import CacheCorrupt
from scalekd.teachers import TeacherSpec

Tables = dict[str, np.ndarray[Any, Any]]


def table_files(identity: Identity) -> dict[str, FileDigest]:
    """Return the digests of the files that the plan names: tail, witnesses, codec tables."""
    codecs = [stage.codec for stage in identity.stages.values()]
    pairs = [
        (identity.tail, identity.tail_digest),
        (identity.views.witnesses, identity.views.witnesses_digest),
        *((codec.tables, codec.tables_digest) for codec in codecs),
    ]
    return {path: digest for path, digest in pairs if path and digest}


def check_table(identity: Identity, relative: str, content: bytes, where: str) -> None:
    """Check that the content of a table file is of the kind that the plan names.

    Args:
        identity: Identity of the cache.
        relative: Path inside the cache, one of :func:`table_files`.
        content: Content of the file, which has the committed digest.
        where: Location of the file, for messages.

    Raises:
        CacheCorrupt: The file is of another kind, or belongs to another teacher or other views.
    """
    if relative == identity.tail:
        _check_tail(identity, content, where)
    elif relative == identity.views.witnesses:
        load_witnesses(identity, content, where)
    else:
        for stage in identity.stages.values():
            if stage.codec.tables == relative:
                stage_codec(stage, load_tables(content, where), where)


def stage_codec(stage: StageInfo, tables: Tables, where: str) -> FeatureCodec:
    """Rebuild the codec of a stage; ``where`` is the location of its tables, or of the plan.

    Raises:
        CacheCorrupt: Configuration or tables are damaged or do not fit the stage's shape.
        CacheMismatch: This release does not know the codec.
    """
    try:
        return codec_from_config(stage.codec.config, tables, stage.shape)
    except CacheCorrupt as error:
        raise CacheCorrupt(f"{where}: {error}") from None


def load_tables(content: bytes, where: str) -> Tables:
    """Read the arrays of a safetensors file whose bytes were checked.

    Raises:
        CacheCorrupt: The bytes are not a safetensors file.
    """
    try:
        return safetensors.numpy.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CacheCorrupt(f"{where}: not a safetensors file ({error})") from None


def load_witnesses(identity: Identity, content: bytes, where: str) -> np.ndarray[Any, Any]:
    """Return the pixels of the first views, ``(view, height, width, 3)`` uint8.

    Raises:
        CacheCorrupt: The content is not the pixels of such views.
    """
    arrays = load_tables(content, where)
    pixels = arrays.get("pixels")
    if (
        pixels is None
        or len(arrays) != 1
        or pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[1:] != (*identity.views.view_size, 3)
    ):
        raise CacheCorrupt(f"{where}: does not contain the pixels of views")
    return pixels


def _check_tail(identity: Identity, content: bytes, where: str) -> None:
    from scalekd.teachers import inspect_tail  # loads torch and timm

    teacher, tail = TeacherSpec.model_validate(identity.teacher), inspect_tail(content, where)
    described = {
        "architecture": teacher.architecture,
        "family": teacher.family,
        "model_kwargs": teacher.model_kwargs,
        "img_size": teacher.img_size,
        "num_classes": teacher.num_classes or 0,
        "tail_blocks": teacher.tail_blocks,
    }
    for name, value in described.items():
        stored = getattr(tail.config, name)
        if stored != value:
            raise CacheCorrupt(
                f"{where}: {name} of the tail is {str(stored)[:80]}, and the plan's teacher has"
                f" {str(value)[:80]}"
            )
    for stage, shape in teacher.stages.items():
        if tail.stages[stage] != shape:
            raise CacheCorrupt(
                f"{where}: stage {stage} of the tail is {tail.stages[stage]}, and the plan's"
                f" teacher has {shape}"
            )
