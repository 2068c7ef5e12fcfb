"""Commands of ``scalekd cache``; each imports its pipeline, and thus torch, when it is called."""

from scalekd.cli._output import Result
from scalekd.cli._paths import check_cache_folder, check_data_dir, check_paths
from scalekd.cli._record import record_command
from scalekd.pipelines._cache_options import (
    ConvertConfig,
    ExportTargetsConfig,
    InfoConfig,
    ListConfig,
    MergeConfig,
    ShareConfig,
)
from scalekd.pipelines._source_options import (
    ExtendConfig,
    RepairConfig,
    ShowConfig,
    VerifyConfig,
)


@record_command("ls", ListConfig, arguments=("root",))
def ls(config: ListConfig) -> Result:
    """List the caches below a folder or in a bucket, with their contents and state.

    Reads manifests and plans only; `scalekd cache verify` checks the data.
    """
    from scalekd.pipelines.list_caches import CacheList, list_caches

    caches = list_caches(config.root, max_depth=config.depth)
    return CacheList(root=config.root, caches=tuple(caches))


@record_command("info", InfoConfig, arguments=("cache",))
def info(config: InfoConfig) -> Result:
    """Describe a cache: teacher, views, stages, codecs and their errors, size."""
    from scalekd.pipelines.inspect_cache import cache_info

    return cache_info(config.cache)


@record_command("show", ShowConfig, arguments=("cache",), leave_out=("workers",))
def show(config: ShowConfig) -> Result:
    """Write a page that shows a cache: its views, stored features and the teacher's answers.

    The page is one HTML file that needs no network. Pass --data-dir to see the pixels of all views,
    and --teacher to compare the stored features with the teacher's.
    """
    check_paths(
        cache=str(config.cache),
        data_dir=config.data_dir,
        split=config.split,
        labels=config.labels,
    )

    from scalekd.pipelines.show_cache import show_cache

    return show_cache(config)


@record_command("export", ExportTargetsConfig, arguments=("cache",))
def export(config: ExportTargetsConfig) -> Result:
    """Write decoded logits or features of a cache for other programs.

    Every row has the key, the pass and the label of its view. The file's metadata describes the
    cache.
    """
    check_paths(cache=config.cache, data_dir=None)

    from scalekd.pipelines.export_targets import export_targets

    return export_targets(config)


@record_command(
    "verify",
    VerifyConfig,
    arguments=("cache",),
    leave_out=("workers", "local_cache", "local_cache_size"),
)
def verify(config: VerifyConfig) -> Result:
    """Check the digest of every file of a cache; the exit code is 4 for a damaged cache."""
    check_cache_folder(config.cache)

    from scalekd.pipelines.inspect_cache import verify_as_asked

    return verify_as_asked(config)


@record_command("convert", ConvertConfig, arguments=("source", "output"))
def convert(config: ConvertConfig) -> Result:
    """Write a cache in its other form: Zarr arrays, or WebDataset tars.

    Every stored value is kept; the same command finishes an interrupted conversion.
    """
    from scalekd.pipelines.convert_cache import convert_cache

    return convert_cache(config)


@record_command("repair", RepairConfig, arguments=("cache",))
def repair(config: RepairConfig) -> Result:
    """Write damaged and missing files again, with the bytes that were committed."""
    check_cache_folder(config.cache)

    from scalekd.pipelines.repair_cache import repair_cache

    return repair_cache(config)


@record_command("extend", ExtendConfig, arguments=("cache",))
def extend(config: ExtendConfig) -> Result:
    """Add passes to a cache; or, with --name, stages or another teacher's targets.

    Options that are left out are taken from the cache, and existing files are not changed. The same
    command continues after an interruption.
    """
    check_cache_folder(config.cache)
    check_data_dir(config.data_dir)

    from scalekd.pipelines.extend_cache import extend_cache

    return extend_cache(config)


@record_command("merge", MergeConfig, arguments=("parts",))
def merge(config: MergeConfig) -> Result:
    """Join parts of one cache that were written on different machines.

    Every file is checked before it is linked or copied. The same command continues after an
    interruption.
    """
    from scalekd.pipelines.merge_caches import merge_caches

    return merge_caches(config.parts, config.output, copy=config.copy_files)


@record_command("push", ShareConfig, arguments=("source", "target"))
def push(config: ShareConfig) -> Result:
    """Send a cache, or a part of it, to a folder, a bucket or a Hugging Face dataset.

    Only missing files are sent: first the files of a shard, then its record, and last the manifest.
    The command may be interrupted, repeated, and run twice at the same time.
    """
    from scalekd.pipelines.share_cache import share_cache

    return share_cache(config)


@record_command("pull", ShareConfig, arguments=("source", "target"))
def pull(config: ShareConfig) -> Result:
    """Fetch a cache, or a part of it; a later pull can extend the part.

    Every file is checked after it is written. The command may be interrupted, repeated, and run
    twice at the same time. While a cache is still being written, its committed shards are fetched.
    """
    from scalekd.pipelines.share_cache import share_cache

    return share_cache(config)
