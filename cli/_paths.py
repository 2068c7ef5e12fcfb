"""Checks of paths before a pipeline, and torch with it, is imported."""

from scalekd.storage import Location, is_remote


def check_paths(*, cache: str | None, data_dir: str | None) -> None:
    """Refuse a local cache or image set that does not exist; URLs are left to the pipeline.

    Raises:
        DataError: There is no such folder, or it contains no cache.
        CacheError: The cache is not complete, or its manifest is damaged.
    """
    if cache is not None and not is_remote(cache):
        from scalekd.cache import read_manifest

        read_manifest(cache)
    check_data_dir(data_dir)


def check_cache_folder(cache: Location) -> None:
    """Refuse the folder of a cache, complete or not, that does not exist.

    Raises:
        DataError: There is no such folder.
    """
    from scalekd.cache.reading.reader import check_folder

    check_folder(cache)


def check_data_dir(data_dir: str | None) -> None:
    """Refuse a local image set that does not exist.

    Raises:
        DataError: There is no such folder.
    """
    if data_dir is not None:
        from scalekd.images.opening import check_location

        check_location(data_dir)
