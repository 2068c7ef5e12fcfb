"""Copies of remote files replace requests, are limited and shared, and are not trusted."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from scalekd.cache.files import CommittedFiles, digest
from scalekd.errors import CacheCorrupt, EnvironmentFault
from scalekd.storage import (
    LocalCache,
    LocalStorage,
    StoredFileError,
    make_local_cache,
    open_storage,
)

CONTENT = bytes(range(256)) * 40


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    return LocalCache(tmp_path / "copies", 10**6)


def copies(cache: LocalCache) -> list[Path]:
    return [p for p in cache.folder.glob("??/*") if p.is_file()]


def test_a_file_with_a_digest_is_fetched_once(web: Any, cache: LocalCache) -> None:
    (web.root / "file").write_bytes(CONTENT)
    for _ in range(3):  # a reader opened again uses the copies of the one before
        storage = open_storage(web.url, local_cache=cache)
        assert storage.read("file", max_bytes=len(CONTENT), sha256=sha(CONTENT)) == CONTENT
    assert web.count() == 1


def test_a_file_without_a_digest_is_fetched_every_time(web: Any, cache: LocalCache) -> None:
    storage = open_storage(web.url, local_cache=cache)
    for content in (b"first", b"second"):
        (web.root / "file").write_bytes(content)
        assert storage.read("file", max_bytes=9) == content
    assert copies(cache) == []


def test_parts_of_a_file_come_from_one_copy_of_its_version(web: Any, cache: LocalCache) -> None:
    storage = open_storage(web.url, local_cache=cache)
    (web.root / "shard.tar").write_bytes(CONTENT)
    found = storage.describe("shard.tar")
    assert found is not None
    web.reset()
    for start in (0, 7, 1000):
        part = storage.read_range("shard.tar", start, 50, version=found.version)
        assert part == CONTENT[start : start + 50]
    with storage.open("shard.tar", version=found.version) as file:
        assert file.seekable()
        assert file.read() == CONTENT
    assert web.count() == 1
    (web.root / "shard.tar").write_bytes(CONTENT[::-1])
    os.utime(web.root / "shard.tar", (1, 1))
    changed = storage.describe("shard.tar")
    assert changed is not None
    assert changed.version != found.version
    assert storage.read_range("shard.tar", 0, 9, version=changed.version) == CONTENT[::-1][:9]


def test_a_shard_that_changed_size_since_it_was_opened_is_noticed(
    web: Any, cache: LocalCache
) -> None:
    storage = open_storage(web.url, local_cache=cache)
    (web.root / "shard.tar").write_bytes(CONTENT)
    found = storage.describe("shard.tar")
    assert found is not None
    (web.root / "shard.tar").write_bytes(CONTENT[:-5])
    with pytest.raises(StoredFileError, match=r"has 10,235 bytes, but had 10,240"):
        storage.read_range("shard.tar", 0, 9, version=found.version)
    assert copies(cache) == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "grown", "empty"])
def test_a_damaged_copy_is_fetched_again_once(web: Any, cache: LocalCache, damage: str) -> None:
    (web.root / "file").write_bytes(CONTENT)
    files = CommittedFiles(open_storage(web.url, local_cache=cache), {"file": digest(CONTENT)})
    assert files.read("file") == CONTENT
    (copy,) = copies(cache)
    harmed = {
        "flipped": CONTENT[:50] + bytes([CONTENT[50] ^ 8]) + CONTENT[51:],
        "cut": CONTENT[:-1],
        "grown": CONTENT + b"x",
        "empty": b"",
    }
    copy.write_bytes(harmed[damage])
    web.reset()
    assert files.read("file") == CONTENT
    assert files.read("file") == CONTENT
    assert web.count() == 1


def test_damage_at_the_source_is_an_error_after_one_retry(web: Any, cache: LocalCache) -> None:
    (web.root / "file").write_bytes(CONTENT[::-1])
    files = CommittedFiles(open_storage(web.url, local_cache=cache), {"file": digest(CONTENT)})
    with pytest.raises(CacheCorrupt, match=r"/file: its bytes changed"):
        files.read("file")
    assert web.count() == 2


@pytest.mark.parametrize("kind", ["short", "flip"])
def test_a_file_damaged_in_transit_is_fetched_again(web: Any, kind: str) -> None:
    (web.root / "file").write_bytes(CONTENT)
    files = CommittedFiles(open_storage(web.url), {"file": digest(CONTENT)})
    web.fail(kind)
    assert files.read("file") == CONTENT
    assert web.count() == 2
    web.fail(kind, times=2)
    with pytest.raises(CacheCorrupt, match="/file"):
        files.read("file")


def test_the_size_limit_removes_the_least_recently_used_first(web: Any, tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "copies", 10_000)
    storage = open_storage(web.url, local_cache=cache)
    contents = [bytes([number]) * 1000 for number in range(30)]
    for number, content in enumerate(contents):
        (web.root / f"{number}").write_bytes(content)

    def read(number: int) -> None:
        content = contents[number]
        assert storage.read(f"{number}", max_bytes=1000, sha256=sha(content)) == content

    for number in range(30):
        read(0)  # in use all the time
        read(number)
        for place, path in enumerate(sorted(copies(cache), key=lambda p: p.stat().st_mtime_ns)):
            os.utime(path, ns=(place, place) if path.name != sha(contents[0]) else (99, 99))
        assert sum(p.stat().st_size for p in copies(cache)) <= 10_000
    web.reset()
    read(0)
    read(29)
    assert web.count() == 0
    read(1)
    assert web.count() == 1


def test_a_copy_in_progress_counts_towards_the_size_limit(tmp_path: Path) -> None:
    cache = LocalCache(tmp_path / "copies", 4000)

    def fetch(name: str, size: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        def fill(file: BinaryIO) -> None:
            meanwhile()
            file.write(bytes(size))

        cache.fetch(sha(name.encode()), size, fill).close()

    fetch("a", 1000)
    fetch("b", 1000)
    fetch("c", 2000, meanwhile=lambda: fetch("d", 1000))
    assert sum(path.stat().st_size for path in copies(cache)) <= 4000
    kept = cache.find(sha(b"c"))
    assert kept is not None
    kept.close()


def test_a_file_larger_than_the_limit_is_not_kept(web: Any, tmp_path: Path) -> None:
    storage = open_storage(web.url, local_cache=LocalCache(tmp_path / "copies", 100))
    (web.root / "file").write_bytes(CONTENT)
    found = storage.describe("file")
    assert found is not None
    assert storage.read("file", max_bytes=len(CONTENT), sha256=sha(CONTENT)) == CONTENT
    assert storage.read_range("file", 3, 4, version=found.version) == CONTENT[3:7]
    assert not list((tmp_path / "copies").rglob("*"))


# A process of its own: importing this file would import torch.
_READ_ALL = """
import hashlib, sys
from pathlib import Path
from scalekd.storage import LocalCache, open_storage
url, folder, limit, *names = sys.argv[1:]
storage = open_storage(url, local_cache=LocalCache(Path(folder), int(limit)))
for name in names:
    content = name.encode() * 500
    sha256 = hashlib.sha256(content).hexdigest()
    assert storage.read(name, max_bytes=len(content), sha256=sha256) == content
"""


@pytest.mark.parametrize("limit", [10**6, 4_000])
def test_processes_and_threads_share_a_folder(web: Any, tmp_path: Path, limit: int) -> None:
    names = [f"f{number}" for number in range(12)]
    for name in names:
        (web.root / name).write_bytes(name.encode() * 500)
    arguments = [web.url, str(tmp_path / "copies"), str(limit), *names]
    processes = [subprocess.Popen([sys.executable, "-c", _READ_ALL, *arguments]) for _ in range(2)]
    storage = open_storage(web.url, local_cache=LocalCache(tmp_path / "copies", limit))

    def read_all(_: int) -> None:
        for name in names:
            content = name.encode() * 500
            assert storage.read(name, max_bytes=len(content), sha256=sha(content)) == content

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(read_all, range(3)))
    assert [process.wait(60) for process in processes] == [0, 0]
    found = list((tmp_path / "copies").glob("??/*"))
    assert not [p for p in found if p.suffix in (".lock", ".partial")]
    assert sum(p.stat().st_size for p in found) <= limit
    if limit == 10**6:
        assert web.count() == len(names)  # whoever came second waited for the first


def test_a_fetch_that_failed_leaves_nothing_and_the_next_one_works(
    web: Any, cache: LocalCache
) -> None:
    (web.root / "file").write_bytes(CONTENT)
    storage = open_storage(web.url, local_cache=cache)
    web.fail("status", status=403)
    with pytest.raises(EnvironmentFault):
        storage.read("file", max_bytes=len(CONTENT), sha256=sha(CONTENT))
    assert copies(cache) == []
    assert storage.read("file", max_bytes=len(CONTENT), sha256=sha(CONTENT)) == CONTENT


def test_a_local_folder_is_not_copied(tmp_path: Path, cache: LocalCache) -> None:
    assert isinstance(open_storage(tmp_path, local_cache=cache), LocalStorage)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentFault, match="--local-cache"):
        make_local_cache(str(tmp_path / "file" / "below"), 100)
