"""The codecs of a cache: writing their tables, and rebuilding them from plan and tables.

Nothing here loads torch; :mod:`scalekd.distillation.decoding` has the modules that decode targets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from scalekd.cache.documents.manifest import CodecInfo, Identity, StageInfo
from scalekd.cache.files import FileDigest, digest, read_checked
from scalekd.cache.forms import Form
from scalekd.cache.layout import (
    PLAN_FILE,
    TABLES_FOLDER,
    ArraySpec,
    Layout,
    pixel_arrays,
    sample_arrays,
    view_arrays,
)
from scalekd.cache.tables import Tables, load_tables, stage_codec
from scalekd.codecs import (
    FeatureCodec,
    LogitCodec,
    PlaneSpec,
    codec_outline,
    logit_codec_from_config,
)
from scalekd.storage import Location, Storage, open_storage
from scalekd.views import ViewPolicy, view_columns


def commit_codec(location: Location, codec: FeatureCodec | LogitCodec, name: str) -> CodecInfo:
    """Return the description of a codec for the plan; commit its tables, if it has any."""
    tables = codec.tables()
    if not tables:
        return CodecInfo(config=codec.to_config())
    relative, committed = save_arrays(location, name, tables)
    return CodecInfo(config=codec.to_config(), tables=relative, tables_digest=committed)


def _tables(storage: Storage, info: CodecInfo) -> Tables:
    if info.tables is None or info.tables_digest is None:
        return {}
    content = read_checked(storage, info.tables, info.tables_digest)
    return load_tables(content, storage.locate(info.tables))


def save_table(location: Location, name: str, content: bytes) -> tuple[str, FileDigest]:
    """Commit a file of tables under a name that contains its hash.

    Returns:
        Path inside the cache, and digest of the file.
    """
    committed = digest(content)
    relative = f"{TABLES_FOLDER}/{name}-{committed.sha256[:16]}.safetensors"
    open_storage(location).commit(relative, content)
    return relative, committed


def save_arrays(location: Location, name: str, arrays: Tables) -> tuple[str, FileDigest]:
    """Commit arrays as a safetensors file of the cache; see :func:`save_table`."""
    contiguous = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    return save_table(location, name, safetensors.numpy.save(contiguous))


@dataclass(frozen=True, eq=False)
class CacheCodecs:
    """The codecs of a cache.

    Attributes:
        stages: Feature codec of each stage, by its number.
        logits: Logit codec; ``None`` for a cache without logits.
    """

    stages: dict[int, FeatureCodec]
    logits: LogitCodec | None

    @classmethod
    def load(cls, location: Location, identity: Identity) -> "CacheCodecs":
        """Rebuild the codecs from the plan and the cache's table files.

        Raises:
            CacheCorrupt: Configuration or tables are damaged or do not fit the stage's shape.
        """
        storage = open_storage(location)
        return cls(
            {
                int(stage): stage_codec(
                    info,
                    _tables(storage, info.codec),
                    storage.locate(info.codec.tables or PLAN_FILE),
                )
                for stage, info in sorted(identity.stages.items())
            },
            logit_codec_from_config(identity.logits.config) if identity.logits else None,
        )

    @property
    def planes(self) -> dict[str, tuple[PlaneSpec, ...]]:
        """Planes by group of arrays: ``stage3``, ``stage4``, ``logits``."""
        planes = {f"stage{stage}": codec.planes for stage, codec in self.stages.items()}
        return planes | ({"logits": self.logits.planes} if self.logits else {})


def outline(identity: Identity) -> dict[str, tuple[PlaneSpec, ...]]:
    """Return :attr:`CacheCodecs.planes` without reading tables; sizes that depend on them are 1.

    Raises:
        CacheCorrupt, CacheMismatch: As for :meth:`CacheCodecs.load`.
    """
    planes = {
        f"stage{stage}": codec_outline(info.codec.config, info.shape)
        for stage, info in sorted(identity.stages.items())
    }
    if identity.logits:
        planes["logits"] = logit_codec_from_config(identity.logits.config).planes
    return planes


def make_layout(
    identity: Identity, planes: Mapping[str, Sequence[PlaneSpec]], form: Form
) -> Layout:
    """Return the layout of a cache: the planes of its codecs, and the small arrays."""
    arrays = [ArraySpec.of_plane(group, plane) for group in planes for plane in planes[group]]
    policy = ViewPolicy.from_config(identity.views.policy)
    pixels = pixel_arrays(identity.views.view_size) if form.embed == "pixels" else ()
    return Layout(
        identity,
        samples=sample_arrays(identity.data.max_key_bytes),
        views=(*arrays, *view_arrays(view_columns(policy)), *pixels),
        form=form,
    )


def stage_info(codec: FeatureCodec, info: CodecInfo) -> StageInfo:
    """Return the description of one stage for the plan."""
    shape = codec.shape
    return StageInfo(
        grid=shape.grid,
        num_channels=shape.num_channels,
        num_prefix_tokens=shape.num_prefix_tokens,
        codec=info,
    )
