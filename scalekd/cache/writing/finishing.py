"""Complete a cache: write its manifest once every shard is committed."""

from scalekd.cache.cache import Cache
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest
from scalekd.cache.documents.records import record_hash
from scalekd.cache.files import digest
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, SAMPLES, ShardId, Unit
from scalekd.cache.tables import table_files
from scalekd.cache.writing.lease import remove_settled
from scalekd.cache.writing.planning import commit_documents
from scalekd.errors import CacheCorrupt
from scalekd.storage.files import remove_abandoned


def finish(cache: Cache, num_passes: int) -> Manifest | None:
    """Write the manifest and return it, or return ``None`` if a shard is not committed yet.

    Args:
        cache: The cache.
        num_passes: Number of passes; the existing manifest may have more, which are kept.

    Raises:
        CacheError: A record is damaged, or a pass contains other samples than the cache's table.
    """
    storage = cache.storage
    num_passes = max(num_passes, committed_passes(cache))
    if cache.missing(cache.shards(num_passes)):
        return None
    if storage.root is not None:
        remove_settled(storage.root)
        remove_abandoned(storage.root)  # of jobs that were killed while this one wrote
    manifest = manifest_of(cache, num_passes)
    commit_documents(storage, _final_documents(cache))
    commit_documents(storage, {MANIFEST_FILE: canonical(manifest)})
    return manifest


def manifest_of(cache: Cache, num_passes: int) -> Manifest:
    """Return the manifest that follows from plan and commit records.

    Raises:
        CacheError: A record is missing or damaged, or a pass contains other samples than the table.
    """
    plan, identity = cache.plan, cache.identity
    units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
    documents = cache.layout.form.documents() | _final_documents(cache)
    for unit in units:
        documents |= cache.documents(unit)
    files = {PLAN_FILE: digest(canonical(plan)), **table_files(identity)}
    files |= {relative: digest(content) for relative, content in documents.items()}
    records: dict[str, str] = {}
    samples: list[str] = []
    skipped: list[str] = []
    computed: dict[str, dict[str, str]] = {}
    num_views, total_bytes = 0, sum(entry.num_bytes for entry in files.values())
    for shard in cache.shards(num_passes):  # one record in memory at a time
        record = cache.record(shard)
        records[shard.record_path] = record_hash(record)
        total_bytes += sum(entry.num_bytes for entry in record.files.values())
        if shard.unit == SAMPLES:
            samples.append(record.samples_sha256)
            skipped.extend(record.skipped)
            continue
        num_views += record.num_rows
        if record.computed is not None:
            computed[str(sorted(record.computed.items()))] = record.computed
        if record.samples_sha256 != samples[shard.number]:
            raise CacheCorrupt(
                f"{cache.location}: {shard} contains other samples than the cache's table"
            )
    return Manifest(
        plan=plan,
        num_passes=num_passes,
        num_views=num_views,
        skipped=tuple(skipped),
        files=files,
        records=records,
        total_bytes=total_bytes,
        computed_otherwise=tuple(computed[facts] for facts in sorted(computed)),
    ).sealed()


def committed_passes(cache: Cache) -> int:
    """Return the number of passes in the existing manifest; 0 if there is none.

    Raises:
        CacheCorrupt: The manifest is damaged.
        CacheMismatch: The manifest belongs to another cache.
    """
    try:
        manifest = cache.manifest()
    except CacheCorrupt as error:
        raise CacheCorrupt(
            f"{error}; delete it and run the same command again, which makes it from the records"
        ) from None
    return manifest.num_passes if manifest is not None else 0


def _final_documents(cache: Cache) -> dict[str, bytes]:
    """Return the form's documents that are written when all shards of pass 0 are committed."""
    return cache.layout.form.final_documents(
        lambda number: cache.record(ShardId(0, number)).num_rows, cache.identity.num_shards
    )
