"""Checks of paths before a pipeline, and torch with it, is imported."""

from pathlib import Path

from scalekd.storage import Location, is_remote


def check_paths(
    *, cache: str | None, data_dir: str | None, split: str | None = None, labels: str = "auto"
) -> None:
    """Refuse a local cache or image set that does not exist; URLs are left to the pipeline.

    Raises:
        DataError: There is no such folder, or it contains no cache.
        CacheError: The cache is not complete, or its manifest is damaged.
    """
    if cache is not None and not is_remote(cache):
        from scalekd.cache import read_manifest

        read_manifest(cache)
    check_data_dir(data_dir, split, labels)


def check_cache_folder(cache: Location) -> None:
    """Refuse the folder of a cache, complete or not, that does not exist.

    Raises:
        DataError: There is no such folder.
    """
    from scalekd.cache.reading.reader import check_folder

    check_folder(cache)


def check_data_dir(data_dir: str | None, split: str | None = None, labels: str = "auto") -> None:
    """Refuse a local image set that does not exist or has no split of this name.

    Args:
        data_dir: Image set, or a cache that embeds images.
        split: Name, folder or pattern; ``None`` checks the folder alone.
        labels: ``auto`` or ``none``.

    Raises:
        DataError: There is no such folder, or nothing in it is the split.
    """
    if data_dir is None:
        return
    from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE
    from scalekd.images.opening import check_location, recognise
    from scalekd.options import ImageOptions

    location, pattern = check_location(data_dir)
    is_cache = any((Path(location) / name).exists() for name in (PLAN_FILE, MANIFEST_FILE))
    checked = pattern is None and not is_remote(location) and not is_cache
    if split is not None and checked:
        recognise(data_dir, split, options=ImageOptions.model_validate({"labels": labels}))
