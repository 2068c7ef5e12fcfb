"""The codecs of a cache: committed beside it, and rebuilt from its documents.

Nothing here loads torch; :mod:`scalekd.cache.targets` has the modules that decode on a device.
"""

import numpy as np
import safetensors.numpy

from scalekd.cache.documents.manifest import CodecInfo, Identity, StageInfo
from scalekd.cache.files import FileDigest, digest, read_checked
from scalekd.cache.forms import Form, read_form
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
from scalekd.codecs import FeatureCodec, LogitCodec, logit_codec_from_config
from scalekd.storage import Location, Storage, open_storage
from scalekd.views import ViewPolicy, view_columns


def save_codec(location: Location, codec: FeatureCodec | LogitCodec, name: str) -> CodecInfo:
    """Describe a codec, and commit its tables, if it has any."""
    tables = codec.tables()
    if not tables:
        return CodecInfo(config=codec.to_config())
    relative, found = save_arrays(location, name, tables)
    return CodecInfo(config=codec.to_config(), tables=relative, tables_digest=found)


def _tables(storage: Storage, info: CodecInfo) -> Tables:
    if info.tables is None or info.tables_digest is None:
        return {}
    content = read_checked(storage, info.tables, info.tables_digest)
    return load_tables(content, storage.locate(info.tables))


def save_table(location: Location, name: str, content: bytes) -> tuple[str, FileDigest]:
    """Commit a file of tables under a name made from its content, so that none is overwritten.

    Returns:
        Path inside the cache, and digest.
    """
    found = digest(content)
    relative = f"{TABLES_FOLDER}/{name}-{found.sha256[:16]}.safetensors"
    open_storage(location).commit(relative, content)
    return relative, found


def save_arrays(location: Location, name: str, arrays: Tables) -> tuple[str, FileDigest]:
    """Commit arrays as a safetensors file of the cache; see :func:`save_table`."""
    contiguous = {key: np.ascontiguousarray(arrays[key]) for key in sorted(arrays)}
    return save_table(location, name, safetensors.numpy.save(contiguous))


class CacheCodecs:
    """The feature codecs by stage number, the logit codec, and the form, of one cache.

    Args:
        stages: By stage number.
        logits: ``None`` for a cache without.
        form: How its passes are stored.
    """

    def __init__(
        self,
        stages: dict[int, FeatureCodec],
        logits: LogitCodec | None,
        form: Form,
    ) -> None:
        self.stages = stages
        self.logits = logits
        self.form = form

    @classmethod
    def load(cls, location: Location, identity: Identity) -> "CacheCodecs":
        """Rebuild the codecs from the plan and the cache's table files, and read its form.

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
            read_form(storage),
        )

    def in_form(self, form: Form) -> "CacheCodecs":
        """The same codecs for a cache of another form."""
        return CacheCodecs(self.stages, self.logits, form)

    def layout(self, identity: Identity) -> Layout:
        """The arrays of a cache with these codecs."""
        arrays: list[ArraySpec] = []
        for stage, codec in self.stages.items():
            arrays += (ArraySpec.of_plane(f"stage{stage}", plane) for plane in codec.planes)
        if self.logits is not None:
            arrays += (ArraySpec.of_plane("logits", plane) for plane in self.logits.planes)
        policy = ViewPolicy.from_config(identity.views.policy)
        pixels = pixel_arrays(identity.views.view_size) if self.form.embed == "pixels" else ()
        return Layout(
            identity,
            samples=sample_arrays(identity.data.max_key_bytes),
            views=(*arrays, *view_arrays(view_columns(policy)), *pixels),
            form=self.form,
        )


def stage_info(codec: FeatureCodec, info: CodecInfo) -> StageInfo:
    """How the plan describes one stage."""
    shape = codec.shape
    return StageInfo(
        grid=shape.grid,
        num_channels=shape.num_channels,
        num_prefix_tokens=shape.num_prefix_tokens,
        codec=info,
    )
