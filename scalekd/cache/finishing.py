"""The end of a cache: its manifest, once every shard is committed."""

from scalekd.cache.files import digest, read_bounded
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, SAMPLES, Layout, Unit, record_path
from scalekd.cache.lease import remove_settled
from scalekd.cache.manifest import MAX_JSON_BYTES, Manifest, Plan, canonical, parse_committed
from scalekd.cache.planning import commit_documents
from scalekd.cache.publish import all_recorded
from scalekd.cache.records import read_record, record_hash
from scalekd.cache.store import unit_documents
from scalekd.cache.tables import table_files
from scalekd.errors import CacheCorrupt, CacheMismatch
from scalekd.storage import LocalStorage, Place, Storage, open_storage


def finish(place: Place, plan: Plan, layout: Layout, num_passes: int) -> Manifest | None:
    """Write the manifest if every shard of every pass is committed, else return ``None``.

    Another job may have added passes meanwhile; they are kept.

    Raises:
        CacheError: A record is damaged, or a pass holds other samples than the cache's table.
    """
    storage = open_storage(place)
    num_passes = max(num_passes, committed_passes(storage, plan))
    shards = range(plan.identity.num_shards)
    units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
    if not all_recorded(storage, units, shards):
        return None
    if isinstance(storage, LocalStorage):
        remove_settled(storage.root)
    manifest = manifest_of(storage, plan, layout, num_passes)
    commit_documents(storage, final_documents(storage, plan, layout))
    commit_documents(storage, {MANIFEST_FILE: canonical(manifest)})
    return manifest


def final_documents(storage: Storage, plan: Plan, layout: Layout) -> dict[str, bytes]:
    """Documents of the form that are written when all shards of pass 0 are committed.

    Raises:
        CacheError: A record of pass 0 is missing or damaged.
    """
    return layout.form.final_documents(
        lambda shard: read_record(storage, plan, layout, 0, shard).num_rows,
        plan.identity.num_shards,
    )


def manifest_of(place: Place, plan: Plan, layout: Layout, num_passes: int) -> Manifest:
    """The manifest that plan and commit records make; they leave no choice.

    Raises:
        CacheError: A record is missing or damaged, or a pass holds other samples than the table.
    """
    storage, identity = open_storage(place), plan.identity
    units: tuple[Unit, ...] = (SAMPLES, *range(num_passes))
    files = {PLAN_FILE: digest(canonical(plan)), **table_files(identity)}
    documents = layout.form.documents() | final_documents(storage, plan, layout)
    for unit in units:
        documents |= unit_documents(layout, unit)
    files |= {relative: digest(content) for relative, content in documents.items()}
    records: dict[str, str] = {}
    samples: list[str] = []
    skipped: list[str] = []
    computed: dict[str, dict[str, str]] = {}
    num_views, total_bytes = 0, sum(entry.num_bytes for entry in files.values())
    for unit in units:
        for shard in range(identity.num_shards):  # one record in memory at a time
            record = read_record(storage, plan, layout, unit, shard)
            records[record_path(unit, shard)] = record_hash(record)
            total_bytes += sum(entry.num_bytes for entry in record.files.values())
            if unit == SAMPLES:
                samples.append(record.samples_sha256)
                skipped.extend(record.skipped)
                continue
            num_views += record.num_rows
            if record.computed is not None:
                computed[str(sorted(record.computed.items()))] = record.computed
            if record.samples_sha256 != samples[shard]:
                raise CacheCorrupt(
                    f"{storage.place}: shard {shard} of pass {unit} holds other samples than the"
                    " cache's table"
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


def committed_passes(place: Place, plan: Plan) -> int:
    """Passes of the manifest that stands; 0 before the first is written.

    Raises:
        CacheCorrupt: The manifest is damaged.
        CacheMismatch: It is the manifest of another cache.
    """
    storage = open_storage(place)
    path = storage.locate(MANIFEST_FILE)
    if not storage.exists(MANIFEST_FILE):
        return 0
    data = read_bounded(storage, MANIFEST_FILE, max_bytes=MAX_JSON_BYTES, what="the manifest")
    try:
        manifest = parse_committed(Manifest, data, where=path)
    except CacheCorrupt as error:
        raise CacheCorrupt(
            f"{error}; delete it and run the same command again: it is made from the records"
        ) from None
    if manifest.plan.cache_id != plan.cache_id:
        raise CacheMismatch(
            f"{path}: is of cache {manifest.plan.cache_id[:12]}…, and the plan beside it of"
            f" {plan.cache_id[:12]}…: files of two caches were mixed"
        )
    return manifest.num_passes
