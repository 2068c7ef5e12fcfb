"""Describe a cache, and verify its files."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.forms import ZARR, Embed, form_named
from scalekd.cache.layout import SAMPLES, Unit
from scalekd.cache.reading.extensions import extension_names
from scalekd.errors import CacheCorrupt, CacheError, CacheMismatch, UsageError
from scalekd.pipelines._source_options import VerifyConfig
from scalekd.storage import Location, open_storage
from scalekd.text import counted, format_bytes, format_cache_size


class CacheInfo(BaseModel):
    """Result of ``scalekd cache info``."""

    path: str
    cache_id: str
    format_version: int
    form: Literal["zarr", "webdataset"]
    embed: Embed
    teacher: str
    weights_sha256: str
    licence: str | None
    precision: str
    num_samples: int
    num_skipped: int
    skipped: tuple[str, ...]
    num_passes: int
    num_shards: int
    shard_size: int
    block_size: int
    view_size: tuple[int, int]
    views: str
    seed: int
    stages: dict[str, dict[str, Any]]
    logits: dict[str, Any] | None
    has_tail: bool
    total_bytes: int
    fixed_bytes: int
    bytes_per_view: float
    bytes_per_view_by_array: dict[str, float]
    environment: dict[str, str]
    software: dict[str, str]
    computed: dict[str, str] | None
    computed_otherwise: tuple[dict[str, str], ...]
    note: str | None
    part: str | None
    extensions: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        rows = list(self._rows())
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {value}" for name, value in rows]

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "cache", f"{self.path} (format {self.format_version}, id {self.cache_id[:12]}…)"
        if summary := form_named(self.form, self.embed).summary:
            yield "form", summary
        yield "teacher", f"{self.teacher} ({self.precision}, weights {self.weights_sha256[:12]}…)"
        if self.licence:
            yield "licence", self.licence
        yield "samples", f"{self.num_samples:,}, of which {self.num_skipped} skipped as corrupt"
        for key in self.skipped:
            yield "  skipped", key
        height, width = self.view_size
        yield "views", f"{counted(self.num_passes, 'pass')} of {self.views}, {height} x {width} px"
        yield (
            "shards",
            f"{self.num_shards} of {self.shard_size:,} views, blocks of {self.block_size}",
        )
        for stage, facts in self.stages.items():
            grid = " x ".join(map(str, facts["grid"]))
            yield (
                f"stage {stage}",
                f"{grid} tokens + {facts['num_prefix_tokens']} prefix, {facts['num_channels']}"
                f" channels, {facts['codec']}",
            )
            for target in ("raw", "spatial", "frequency") if facts["errors"] else ():
                error = facts["errors"][target]
                yield (
                    f"  {target} error",
                    "mean {mean:.3%}, p95 {p95:.3%}, max {max:.3%}".format(**error),
                )
        yield "logits", str(self.logits["codec"]) if self.logits else "none"
        yield "tail", "yes" if self.has_tail else "no"
        sizes = (self.total_bytes, self.fixed_bytes, self.bytes_per_view)
        yield "size", format_cache_size(*sizes)
        for name, num_bytes in self.bytes_per_view_by_array.items():
            yield f"  {name}", f"{num_bytes:,.2f} B per view"
        yield "drawn with", ", ".join(f"{k} {v}" for k, v in self.environment.items())
        if self.computed is not None:
            yield "computed on", _machine(self.computed)
        for facts in self.computed_otherwise:
            # Rounding differs between the shards of these machines, within the codec's error.
            yield "  and, mixed,", _machine(facts)
        if self.part:
            yield "here", f"a part: {self.part}"
        if self.extensions:
            yield "extensions", ", ".join(self.extensions)
        if self.note:
            yield "note", self.note


def _machine(facts: dict[str, str]) -> str:
    """Format the facts about a machine, its device first."""
    others = [f"{name} {value}" for name, value in facts.items() if name != "device"]
    return ", ".join([facts.get("device", "an unnamed device"), *others])


def cache_info(location: Location) -> CacheInfo:
    """Describe a complete cache from its documents.

    Raises:
        DataError: ``location`` does not contain a cache.
        CacheError: The cache is damaged or incomplete.
    """
    reader = open_cache(location)
    manifest, identity = reader.manifest, reader.identity
    measured = manifest.plan.provenance.measured
    return CacheInfo(
        path=open_storage(location).location,
        cache_id=manifest.plan.cache_id,
        format_version=identity.format_version,
        form=reader.layout.form.name,
        embed=reader.embed,
        teacher=identity.teacher["model"],
        weights_sha256=identity.teacher["weights_sha256"],
        licence=manifest.plan.provenance.licence,
        precision=identity.precision,
        num_samples=identity.data.num_samples,
        num_skipped=len(manifest.skipped),
        skipped=manifest.skipped,
        num_passes=manifest.num_passes,
        num_shards=identity.num_shards,
        shard_size=identity.shard_size,
        block_size=identity.block_size,
        view_size=identity.views.view_size,
        views=str(reader.policy),
        seed=identity.views.seed,
        stages={
            stage: {
                "grid": info.grid,
                "num_channels": info.num_channels,
                "num_prefix_tokens": info.num_prefix_tokens,
                "codec": identity.request["codec"],
                "errors": measured.get(stage, {}),
            }
            for stage, info in identity.stages.items()
        },
        logits=identity.logits.config if identity.logits else None,
        has_tail=identity.tail is not None,
        total_bytes=manifest.total_bytes,
        fixed_bytes=manifest.fixed_bytes,
        bytes_per_view=manifest.bytes_per_view,
        bytes_per_view_by_array=_bytes_by_array(reader),
        environment=identity.views.environment,
        software=manifest.plan.provenance.software,
        computed=manifest.plan.provenance.computed,
        computed_otherwise=manifest.computed_otherwise,
        note=manifest.plan.provenance.note,
        part=None if reader.part.is_all else str(reader.part),
        extensions=_extensions(reader),
    )


def _extensions(reader: CacheReader) -> tuple[str, ...]:
    """Return the names of the extensions; empty on a web server, which cannot be listed."""
    try:
        return tuple(extension_names(reader.storage))
    except UsageError:
        return ()


def _bytes_by_array(reader: CacheReader) -> dict[str, float]:
    """Return the bytes per view of each array, counting the files that are present."""
    totals: dict[str, int] = {}
    num_views = 0
    units: tuple[Unit, ...] = (SAMPLES, *reader.passes)
    for unit in units:
        for shard in reader.shards:
            record = reader.record(unit, shard)
            num_views += 0 if unit == SAMPLES else record.num_rows
            for relative, digest in record.files.items():
                if not reader.part.has_file(relative):
                    continue
                form = ZARR if unit == SAMPLES else reader.layout.form
                name = form.part_of(relative, unit)
                totals[name] = totals.get(name, 0) + digest.num_bytes
    return {name: total / max(1, num_views) for name, total in sorted(totals.items())}


class DeepFindings(BaseModel):
    """Result of a deep verification.

    Attributes:
        num_views: Number of views that were drawn again.
        problems: One sentence for every view that differs from what the cache stores.
        largest_error: Largest relative squared error of any view, by stage and of the logits.
    """

    num_views: int
    problems: tuple[str, ...]
    largest_error: dict[str, float]


class Verification(BaseModel):
    """Result of ``scalekd cache verify``.

    Attributes:
        path: Location of the cache.
        sound: Whether every file is as it was committed.
        problems: One sentence for every damaged file.
        damaged_shards: ``(unit, shard)`` pairs with a damaged file.
        num_files: Number of files checked.
        num_bytes: Total size of these files.
        deep: Result of a deep verification; ``None`` if there was none.
    """

    path: str
    sound: bool
    problems: tuple[str, ...]
    damaged_shards: tuple[tuple[str, int], ...]
    num_files: int
    num_bytes: int
    deep: DeepFindings | None = None

    def lines(self) -> list[str]:
        """Return the lines to print."""
        lines = [f"damaged: {problem}" for problem in self.problems]
        lines.append(
            f"{self.path}: {self.num_files:,} files, {format_bytes(self.num_bytes)} checked,"
            f" {len(self.problems)} damaged"
        )
        if self.deep is not None:
            deep = self.deep
            lines += [f"differs: {problem}" for problem in deep.problems]
            errors = ", ".join(f"{name} {error:.2g}" for name, error in deep.largest_error.items())
            lines.append(
                f"{deep.num_views:,} views drawn again and given to the teacher:"
                f" {len(deep.problems)} differ; largest relative squared error: {errors or 'none'}"
            )
        return lines

    def failure(self) -> CacheError | None:
        """Return the error that the problems amount to; ``None`` for a sound cache."""
        if self.problems:
            count, first = len(self.problems), self.problems[0]
            return CacheCorrupt(f"{self.path}: {count} problems, first: {first}")
        if self.deep is not None and self.deep.problems:
            count, first = len(self.deep.problems), self.deep.problems[0]
            return CacheMismatch(
                f"{self.path}: {count} views differ from the cache, first: {first}"
            )
        return None


def verify_cache(location: Location, *, quick: bool = False) -> Verification:
    """Check every file of a cache; see :func:`scalekd.cache.care.verify.verify`."""
    verified = verify(location, quick=quick)
    return Verification(
        path=open_storage(location).location,
        sound=not verified.problems,
        problems=tuple(verified.problems),
        damaged_shards=tuple(sorted((str(s.unit), s.number) for s in verified.damaged)),
        num_files=verified.num_files,
        num_bytes=verified.num_bytes,
    )


def verify_as_asked(config: VerifyConfig) -> Verification:
    """Check the files of a cache and, with ``deep``, a sample of its views.

    Raises:
        UsageError: The options exclude each other, or images are missing.
        DataError, CacheError: See :func:`scalekd.pipelines.check_replay.deep_verify`.
    """
    if config.deep is None:
        if config.data_dir is not None:
            raise UsageError("--data-dir: images are only used with --deep; add --deep N")
        return verify_cache(config.cache, quick=config.quick)
    from scalekd.pipelines.check_replay import check_images_named, deep_verify  # loads the teacher

    if config.quick:
        raise UsageError("--deep draws views again: leave out --quick")
    check_images_named(config)
    verified = verify_cache(config.cache)
    if verified.problems:
        return verified
    return verified.model_copy(update={"deep": deep_verify(config, config.deep)})
