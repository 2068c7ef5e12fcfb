"""Convert a cache between the Zarr and WebDataset forms, with the same plan and values.

    scalekd cache convert ./swin_l-cache ./swin_l-tars --format webdataset --embed view \
        --data-dir /imagenet

Shards are claimed, written and committed as by `scalekd cache-teacher`, so an interrupted
conversion can be continued and several processes can share the work. Converting back reproduces the
original files.
"""

import time
from collections.abc import Iterator

import numpy as np
from pydantic import BaseModel

from scalekd.cache import CacheReader, open_cache
from scalekd.cache.cache import Cache
from scalekd.cache.documents.selection import Selection, refuse_part
from scalekd.cache.forms import Form, form_named
from scalekd.cache.layout import DIFFERENCES, Layout
from scalekd.cache.reading.extensions import begun_extensions, extension_path
from scalekd.cache.sharing.source import SourceCache
from scalekd.cache.sharing.transfer import Transfer
from scalekd.cache.tables import table_files
from scalekd.cache.writing.finishing import finish
from scalekd.cache.writing.planning import (
    begin_arrays,
    check_form,
    differences,
    read_plan,
)
from scalekd.cache.writing.rows import SampleRows, ViewRows
from scalekd.cache.writing.writer import CacheWriter
from scalekd.errors import CacheMismatch, UsageError
from scalekd.loading import open_images, worker_faults
from scalekd.loading.embedding import BlockImages, BlockRequest, ImagesToEmbed, images_of_blocks
from scalekd.pipelines._cache_options import ConvertConfig
from scalekd.pipelines._preflight import check_shards
from scalekd.pipelines._progress import ProgressReport
from scalekd.signals import terminable
from scalekd.storage import Storage, open_storage
from scalekd.storage.files import remove_abandoned
from scalekd.text import counted, format_cache_size


class ConvertResult(BaseModel):
    """Result of a conversion; sizes and extensions are set once the new cache is complete."""

    source: str
    output: str
    complete: bool
    num_passes: int
    num_shards: int
    shards_written: int
    shards_elsewhere: tuple[str, ...]
    seconds: float
    total_bytes: int | None
    fixed_bytes: int | None
    bytes_per_view: float | None
    extensions: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines to print."""
        state = "complete" if self.complete else "not complete: other shards are still to be done"
        if self.shards_elsewhere:
            state = f"not complete: another process is writing {self.shards_elsewhere[0]}"
        lines = [
            f"{self.output}: {state}; {counted(self.num_passes, 'pass')},"
            f" {counted(self.num_shards, 'shard')}"
            f" ({self.shards_written} written now) in {self.seconds:,.1f} s"
        ]
        if self.total_bytes is not None:
            fixed, per_view = self.fixed_bytes or 0, self.bytes_per_view or 0
            lines.append(format_cache_size(self.total_bytes, fixed, per_view))
        if self.extensions:
            lines.append(f"extensions copied unchanged: {', '.join(self.extensions)}")
        return lines


@terminable()
@worker_faults()
def convert_cache(config: ConvertConfig) -> ConvertResult:
    """Write a cache in another form, or continue a conversion.

    Raises:
        DataError: The cache or the images do not exist.
        CacheError: The source is damaged, the images are not those of the cache, or ``output``
            contains another cache.
        UsageError: Required images are not given, or the options contradict one another.
    """
    started = time.monotonic()
    form = form_named(config.format, config.embed)
    output = open_storage(config.output)
    if output.root is None:
        raise UsageError(
            f"{config.output}: shards are written to a local folder; convert into a folder, then"
            " copy it with `scalekd cache push`"
        )
    source = open_storage(config.source).root
    both_exist = source is not None and source.exists() and output.root.exists()
    if source is not None and both_exist and source.samefile(output.root):
        raise UsageError(f"{config.output}: source and destination are the same folder")
    reader = open_cache(config.source)
    refuse_part(reader.storage, "converted")
    if reader.layout.form == form:
        raise UsageError(f"{reader.location} is in {form} already; copy it instead")
    plan, num_passes = reader.manifest.plan, reader.num_passes
    check_shards(config.shards, plan.identity.num_shards)
    first, last = config.shards or (0, plan.identity.num_shards - 1)
    images = None
    if config.data_dir is not None:
        images = open_images(config.data_dir, config.split, options=config.image_options)
    embedding = ImagesToEmbed(reader, config.embed, images)
    cache = _begin(output, reader, form)
    begin_arrays(output, plan, cache.layout, num_passes)
    remove_abandoned(output.root)
    with CacheWriter(cache) as writer:
        shards = [
            (pass_index, shard)
            for pass_index in range(num_passes)
            for shard in writer.missing(pass_index, range(first, last + 1))
        ]
        num_views = sum(plan.identity.rows_of(shard) for _, shard in shards)
        with ProgressReport("converting", num_views) as progress:
            # The second round takes over shards claimed by a process that died during the first.
            num_written = sum(
                _copy_shards(reader, writer, embedding, shards, config.workers, progress)
                for _ in range(2)
            )
        elsewhere = writer.elsewhere()
    manifest = finish(cache, num_passes)
    return ConvertResult(
        source=reader.location,
        output=config.output,
        complete=manifest is not None,
        num_passes=num_passes,
        num_shards=plan.identity.num_shards,
        shards_written=num_written,
        shards_elsewhere=elsewhere,
        seconds=time.monotonic() - started,
        total_bytes=manifest.total_bytes if manifest else None,
        fixed_bytes=manifest.fixed_bytes if manifest else None,
        bytes_per_view=manifest.bytes_per_view if manifest else None,
        extensions=_copy_extensions(reader.storage, output) if manifest else (),
    )


def _copy_extensions(source: Storage, target: Storage) -> tuple[str, ...]:
    """Copy the extensions unchanged: each is a cache with its own form."""
    names = begun_extensions(source)
    for name in names:
        extension = SourceCache(source.below(extension_path(name)))
        transfer = Transfer(extension, target.below(extension_path(name)))
        transfer.prepare()
        transfer.copy(Selection(cache_id=extension.plan.cache_id), lambda: None)
        transfer.finish()
    return tuple(names)


def _begin(output: Storage, reader: CacheReader, form: Form) -> Cache:
    """Write the plan, its tables and the form, unless another process has done so."""
    plan = reader.manifest.plan
    committed = read_plan(output)
    if committed is None:
        for relative, expected in table_files(plan.identity).items():
            output.commit(relative, reader.file(relative, expected))
        committed = Cache.begin(output, plan, form).plan
    if committed.cache_id != plan.cache_id:
        raise CacheMismatch(
            f"{output.location} contains another cache:"
            f" {differences(committed.identity, plan.identity)}. Choose another folder"
        )
    check_form(output, form)
    return Cache(output, plan, form=form)


def _requests(
    reader: CacheReader, writer: CacheWriter, shards: list[tuple[int, int]]
) -> Iterator[BlockRequest]:
    """Yield the blocks of the shards; a shard is claimed when its first block is requested."""
    size, starts = reader.identity.block_size, reader.samples.starts.tolist()
    for pass_index, shard in shards:
        if not writer.claim(pass_index, shard):
            continue
        first, end = starts[shard], starts[shard + 1]
        for start in range(first, max(end, first + 1), size):
            count = min(size, end - start)
            yield BlockRequest(pass_index, shard, start, count, last=start + size >= end)


def _copy_shards(
    reader: CacheReader,
    writer: CacheWriter,
    embedding: ImagesToEmbed,
    shards: list[tuple[int, int]],
    workers: int,
    progress: ProgressReport,
) -> int:
    """Copy the values of missing shards; return the number of shards committed."""
    missing = [pair for pair in shards if not writer.has_record(*pair)]
    requests = _requests(reader, writer, missing)
    shard, num_written = None, 0
    for block in images_of_blocks(embedding, requests, num_workers=workers):
        request = block.request
        if shard is None:
            shard = writer.shard(request.pass_index, request.shard)
        if request.count:
            planes, rows = _read(reader, block, writer.layout)
            shard.write_block(lambda planes=planes: planes, rows)  # type: ignore[misc]
        if request.last:
            record = reader.record(request.pass_index, request.shard)
            shard.commit(record.skipped, record.computed)
            shard, num_written = None, num_written + 1
        progress.advance(request.count)
    return num_written


def _read(
    reader: CacheReader, block: BlockImages, layout: Layout
) -> tuple[dict[str, np.ndarray], ViewRows]:
    """Read the arrays of a block that both caches have; take pixels from the block."""
    request, samples = block.request, reader.samples
    span = slice(request.first, request.first + request.count)
    wanted = {array.name for array in layout.views}
    names = [array.name for array in reader.layout.views if array.name in wanted]
    rows_by_array = reader.read_rows(request.pass_index, request.first, request.count, names)
    planes = {
        array.name: np.ascontiguousarray(np.moveaxis(rows_by_array[array.name], 0, array.view_axis))
        for array in reader.layout.views
        if array.per_block and array.name in wanted
    }
    rows = ViewRows(
        samples=SampleRows(
            tuple(samples.key(index) for index in range(span.start, span.stop)),
            samples.labels[span],
            samples.source_hashes[span],
        ),
        columns={name: column for name, column in rows_by_array.items() if name not in planes},
        images=block.images,
    )
    if block.differences is not None:
        planes[DIFFERENCES] = block.differences.numpy()
    return planes, rows
