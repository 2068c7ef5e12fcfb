"""Write a cache's targets, decoded, to files that other programs read.

    scalekd cache export ./swin_l-cache --what logits --to parquet --output logits.parquet

Rows are views: all samples of the first pass, then those of the next. Blocks are read and written
one at a time.
"""

import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel

from scalekd.cache import CacheReader, open_cache, read_features, read_logits
from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.pipelines._cache_options import ExportTargetsConfig
from scalekd.pipelines._export_files import ExportBlock, ExportShape, check_form, open_export
from scalekd.pipelines._progress import ProgressReport
from scalekd.signals import terminable
from scalekd.storage.files import explained
from scalekd.text import format_bytes, printable

Rows = np.ndarray[Any, Any]


class ExportedTargets(BaseModel):
    """Result of ``scalekd cache export``.

    Attributes:
        output: The file or folder.
        what: Exported values.
        shape: Shape of the values, the number of views first.
        dtype: Type of the values.
        num_bytes: Size of the values before compression.
        seconds: Time taken.
    """

    output: str
    what: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        sizes = " x ".join(f"{size:,}" for size in self.shape)
        yield (
            f"{self.output}: {self.what} of {sizes}, {self.dtype}, {format_bytes(self.num_bytes)}"
            f" in {self.seconds:,.1f} s"
        )


@terminable()
def export_targets(config: ExportTargetsConfig) -> ExportedTargets:
    """Export decoded logits or features.

    Raises:
        UsageError: The cache lacks these values, ``output`` exists, or a package is missing.
        DataError: The cache or a sample does not exist; a value is beyond float16.
        CacheError: The cache is damaged.
        EnvironmentFault: The disk is too small.
    """
    started = time.monotonic()
    if config.output.exists():
        raise UsageError(f"--output {config.output}: exists already; choose another name")
    check_form(config.to)
    reader = open_cache(config.cache)
    source = _Source(reader, config)
    ranges = list(_ranges(reader, config.keys))
    passes = _passes(reader, config.passes)
    num_rows = len(passes) * sum(count for _, count in ranges)
    samples = reader.samples
    shape = ExportShape(
        what=config.what,
        num_rows=num_rows,
        row_shape=source.row_shape,
        dtype=np.dtype(config.dtype),
        max_key_bytes=max(
            len(bytes(key))
            for first, count in ranges
            for key in samples.keys[first : first + count]
        ),
        facts=_facts(reader, config, source.row_shape),
    )
    with explained(config.output, "cannot write"):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(config.output.parent).free
    if config.to != "parquet" and free < shape.num_bytes:
        raise EnvironmentFault(
            f"--output {config.output}: {format_bytes(free)} are free, and the export takes"
            f" {format_bytes(shape.num_bytes)}; free space, or choose fewer --passes or --keys"
        )
    with (
        explained(config.output, "cannot write"),
        open_export(config.to, config.output, shape) as file,
        ProgressReport("exporting", num_rows, aside=lambda: "decoded") as progress,
    ):
        for pass_index in passes:
            for first, count in ranges:
                rows = range(first, first + count)
                values = source.read(pass_index, first, count)
                file.write(
                    ExportBlock(
                        keys=[samples.key(row) for row in rows],
                        passes=np.full(count, pass_index, np.int32),
                        labels=samples.labels[first : first + count],
                        values=_converted(values, shape.dtype, samples.key(first)),
                    )
                )
                progress.advance(count)
    return ExportedTargets(
        output=str(config.output),
        what=config.what,
        shape=(num_rows, *source.row_shape),
        dtype=config.dtype,
        num_bytes=shape.num_bytes,
        seconds=time.monotonic() - started,
    )


class _Source:
    """Reads the values of consecutive views.

    Raises:
        UsageError: The cache does not contain them.
    """

    def __init__(self, reader: CacheReader, config: ExportTargetsConfig) -> None:
        self._reader, self._config = reader, config
        self.row_shape: tuple[int, ...]
        if config.what == "logits":
            if reader.codecs.logits is None:
                raise UsageError(
                    f"--what logits: {reader.location} has no logits (it was written with"
                    " --logits none); export --what pooled or tokens"
                )
            reader.require("logits")
            self.row_shape = (reader.codecs.logits.num_classes,)
            return
        codec = reader.codecs.stages.get(config.stage)
        if codec is None:
            stages = ", ".join(map(str, reader.codecs.stages)) or "none"
            raise UsageError(
                f"--what {config.what}: {reader.location} has no features of stage"
                f" {config.stage} (stages: {stages}); choose another --stage"
            )
        reader.require(f"stage{config.stage}")
        shape = codec.shape
        self._num_prefix = shape.num_prefix_tokens
        if config.what == "pooled" and config.pool == "class" and not self._num_prefix:
            raise UsageError(
                f"--pool class: the teacher of {reader.location} has no class token; pass"
                " --pool mean"
            )
        tokens = (shape.num_tokens, shape.num_channels)
        self.row_shape = tokens if config.what == "tokens" else tokens[1:]

    def read(self, pass_index: int, first: int, count: int) -> Rows:
        """Return the values of views of one shard, float32 ``(view, *row_shape)``."""
        reader, config = self._reader, self._config
        if config.what == "logits":
            return read_logits(reader, pass_index=pass_index, first=first, count=count)
        features = read_features(
            reader, stage=config.stage, pass_index=pass_index, first=first, count=count
        )
        if config.what == "tokens":
            return features
        if config.pool == "class":
            return features[:, 0]
        return np.asarray(features[:, self._num_prefix :].mean(axis=1))


def _passes(reader: CacheReader, asked: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the passes to export."""
    if asked is None:
        return reader.passes
    first, last = asked
    if not first <= last or not set(range(first, last + 1)) <= set(reader.passes):
        here = ", ".join(map(str, reader.passes[:8])) + (", …" if len(reader.passes) > 8 else "")
        raise UsageError(f"--passes {first}-{last}: the cache has passes {here} here")
    return tuple(range(first, last + 1))


def _ranges(reader: CacheReader, keys: tuple[str, ...] | None) -> Iterator[tuple[int, int]]:
    """Yield the first sample and the number of samples of each read."""
    if keys is None:
        yield from reader.blocks()
        return
    row_of = {bytes(key): row for row, key in enumerate(reader.samples.keys)}
    for key in keys:
        row = row_of.get(key.encode())
        if row is None:
            raise DataError(
                f"--keys: {reader.location} has no sample {printable(key, limit=120)!r}; a key is"
                f" written like {printable(reader.samples.key(0), limit=120)!r}"
            )
        yield row, 1


def _facts(
    reader: CacheReader, config: ExportTargetsConfig, row_shape: tuple[int, ...]
) -> dict[str, str]:
    """Describe the export and its cache, as texts for a file's metadata."""
    identity, provenance = reader.identity, reader.manifest.plan.provenance
    facts: dict[str, Any] = {
        "what": config.what,
        "shape": row_shape,
        "cache_id": reader.manifest.plan.cache_id,
        "teacher": identity.teacher,
        "precision": identity.precision,
        "data": identity.data.model_dump(mode="json"),
        "views": str(reader.policy),
        "view_size": identity.views.view_size,
        "seed": identity.views.seed,
        "software": provenance.software,
        "licence": provenance.licence,
    }
    if config.what == "logits":
        facts["codec"] = identity.logits.config if identity.logits else None
    else:
        facts["codec"] = identity.request["codec"]
        facts["stage"] = config.stage
        facts["grid"] = reader.codecs.stages[config.stage].shape.grid
        facts["num_prefix_tokens"] = reader.codecs.stages[config.stage].shape.num_prefix_tokens
        facts["measured"] = provenance.measured.get(str(config.stage))
        facts["pool"] = config.pool if config.what == "pooled" else None
    return {
        f"scalekd.{name}": value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
        if value is not None
    }


def _converted(values: Rows, dtype: np.dtype[Any], key: str) -> Rows:
    """Return values in the type of the export.

    Raises:
        DataError: A value is beyond the type.
    """
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if (np.isinf(converted) & np.isfinite(values)).any():
        raise DataError(
            f"--dtype {dtype.name}: a value of the views from sample {printable(key, limit=120)!r}"
            " is beyond 65504; pass --dtype float32"
        )
    return converted
