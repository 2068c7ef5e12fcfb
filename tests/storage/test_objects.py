"""Object stores and web servers: reading, writing, and the errors when they fail."""

import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.errors import CacheCorrupt, DataError, EnvironmentFault, UsageError
from scalekd.storage import (
    LocalStorage,
    NotStored,
    StoredFileError,
    is_remote,
    objects,
    open_storage,
)

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["folder", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """One of each kind that can be written to."""
    if request.param == "folder":
        return open_storage(tmp_path / "folder")
    if request.param == "memory":
        return open_storage("memory://")
    return open_storage(request.getfixturevalue("s3").bucket + "/some/place")


def test_committed_files_are_read_whole_and_in_ranges(storage: Any) -> None:
    assert storage.commit("a/b/file.bin", CONTENT)
    assert storage.read("a/b/file.bin", max_bytes=len(CONTENT)) == CONTENT
    assert storage.read_range("a/b/file.bin", 100, 300) == CONTENT[100:400]
    assert storage.read_range("a/b/file.bin", len(CONTENT) - 1, 1) == CONTENT[-1:]
    assert b"".join(storage.stream("a/b/file.bin")) == CONTENT
    assert storage.size("a/b/file.bin") == len(CONTENT)
    assert storage.exists("a/b/file.bin")
    assert storage.commit("a/b/file.bin", memoryview(b"other"))
    assert storage.read("a/b/file.bin", max_bytes=5) == b"other"


def test_an_empty_file_is_a_file(storage: Any) -> None:
    storage.commit("empty", b"")
    assert storage.read("empty", max_bytes=0) == b""
    assert storage.size("empty") == 0
    assert b"".join(storage.stream("empty")) == b""
    assert storage.read_range("empty", 0, 0) == b""


def test_write_once_keeps_the_first_content(storage: Any) -> None:
    assert storage.commit("record", b"first", exclusive=True)
    assert not storage.commit("record", b"second", exclusive=True)
    assert storage.read("record", max_bytes=9) == b"first"


def test_one_of_many_concurrent_writers_succeeds(storage: Any) -> None:
    won: list[bytes] = []

    def write(content: bytes) -> None:
        if storage.commit("record", content, exclusive=True):
            won.append(content)

    threads = [threading.Thread(target=write, args=(b"%d" % n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [storage.read("record", max_bytes=9)]


def test_missing_and_too_large_files_have_different_errors(storage: Any) -> None:
    storage.commit("file", CONTENT)
    with pytest.raises(StoredFileError, match=r"has 10,240 bytes, more than the 10,239 allowed"):
        storage.read("file", max_bytes=len(CONTENT) - 1)
    for ask in (
        lambda: storage.read("missing", max_bytes=9),
        lambda: storage.read_range("missing", 0, 1),
        lambda: list(storage.stream("missing")),
        lambda: storage.read("file/below", max_bytes=9),
    ):
        with pytest.raises(NotStored, match="is missing"):
            ask()
    for start, length in ((len(CONTENT) - 1, 2), (len(CONTENT) + 5, 1)):
        with pytest.raises(StoredFileError, match="ends"):
            storage.read_range("file", start, length)
    assert storage.size("missing") is None
    assert not storage.exists("missing")


def test_a_listing_names_files_below_a_folder_only(storage: Any) -> None:
    for path in ("top", "a/one", "a/deeper/two", "ab/three"):
        storage.commit(path, path.encode())
    assert sorted(f.path for f in storage.list()) == ["a/deeper/two", "a/one", "ab/three", "top"]
    found = {f.path: f for f in storage.list("a")}
    assert sorted(found) == ["a/deeper/two", "a/one"]
    assert found["a/one"].size == 5
    assert found["a/one"].modified > 1_600_000_000
    assert list(storage.folders()) == ["a", "ab"]
    assert list(storage.folders("a")) == ["deeper"]
    assert list(storage.list("nothing")) == []
    assert list(storage.folders("nothing")) == []


def test_deleting_is_no_error_when_there_is_nothing(storage: Any) -> None:
    storage.commit("file", b"x")
    storage.delete("file")
    storage.delete("file")
    assert not storage.exists("file")


@pytest.mark.parametrize("relative", ["../x", "/etc/passwd", "", "a/../x", "a\\..\\b", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(storage: Any, relative: str) -> None:
    for ask in (
        lambda: storage.read(relative, max_bytes=9),
        lambda: storage.read_range(relative, 0, 1),
        lambda: storage.commit(relative, b"x"),
        lambda: storage.delete(relative),
        lambda: storage.size(relative),
    ):
        with pytest.raises(CacheCorrupt, match="not a path inside"):
            ask()


def test_a_storage_can_be_pickled_for_other_processes(s3: Any) -> None:
    storage = open_storage(s3.bucket + "/p")
    storage.commit("file", b"x")
    sent = pickle.dumps(storage)
    assert b"secret" not in sent
    assert pickle.loads(sent).read("file", max_bytes=1) == b"x"


def test_a_web_server_is_read_only(web: Any) -> None:
    (web.root / "sub").mkdir()
    (web.root / "sub" / "file").write_bytes(CONTENT)
    storage = open_storage(web.url + "/sub/")
    assert storage.location == web.url + "/sub"
    assert storage.read("file", max_bytes=len(CONTENT)) == CONTENT
    assert storage.read_range("file", 7, 9) == CONTENT[7:16]
    assert storage.size("file") == len(CONTENT)
    assert storage.size("missing") is None
    with pytest.raises(NotStored):
        storage.read("missing", max_bytes=1)
    for ask in (lambda: storage.commit("x", b""), lambda: storage.delete("x")):
        with pytest.raises(UsageError, match="a web server is read-only"):
            ask()
    for ask in (lambda: list(storage.list()), lambda: storage.folders()):
        with pytest.raises(UsageError, match="cannot list its files"):
            ask()


@pytest.mark.parametrize(
    ("place", "remote"),
    [
        ("s3://b/p", True),
        ("https://h/p", True),
        ("/a/b", False),
        ("file:///a", False),
        ("a", False),
    ],
)
def test_locations_are_local_or_remote(place: str, remote: bool) -> None:
    assert is_remote(place) == remote
    assert open_storage(place).is_remote == remote
    assert isinstance(open_storage(place), LocalStorage) != remote


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("ftp://host/x", "ftp:// is not one of"),
        ("https://user:secret@host/x", "user or password"),
        ("https://host/x?X-Amz-Signature=secret", "signed links"),
        ("s3:///x", "the bucket or host is missing"),
    ],
)
def test_an_invalid_url_is_refused_without_printing_its_secret(place: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        open_storage(place)
    assert "secret" not in str(refused.value)


# Faults. Each is met by the very client that users have, at a server that really misbehaves.


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20)}
    monkeypatch.setitem(objects._RETRIES, "backoff", {**backoff, "base": 2})
    monkeypatch.setitem(objects._RETRIES, "max_retries", 3)


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 503, "body": b"<Error><Code>SlowDown</Code></Error>"},
        {"kind": "status", "status": 429},
        {"kind": "drop"},
        {"kind": "lost"},
    ],
)
def test_temporary_faults_are_retried(s3: Any, fault: dict[str, Any]) -> None:
    storage = open_storage(s3.bucket)
    storage.commit("file", CONTENT)
    for read in (
        lambda: storage.read("file", max_bytes=len(CONTENT)),
        lambda: b"".join(storage.stream("file")),
        lambda: storage.read_range("file", 0, len(CONTENT)),
    ):
        s3.fail(times=2, method="GET", **fault)
        assert read() == CONTENT
        assert not any(fault.times for fault in s3.faults)


@pytest.mark.parametrize("kind", ["status", "lost"])
def test_a_write_that_was_interrupted_is_repeated(s3: Any, kind: str) -> None:
    storage = open_storage(s3.bucket)
    s3.fail(kind, times=2, method="PUT")
    assert storage.commit("file", CONTENT)
    assert storage.read("file", max_bytes=len(CONTENT)) == CONTENT


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "status", "status": 500}, "500 Internal Server Error"),
        ({"kind": "status", "status": 503}, "503 Service Unavailable"),
        ({"kind": "drop"}, "body"),
    ],
)
def test_permanent_faults_end_after_bounded_retries(
    s3: Any, fault: dict[str, Any], words: str
) -> None:
    storage = open_storage(s3.bucket)
    storage.commit("file", CONTENT)
    s3.reset()
    s3.fail(times=None, **fault)
    with pytest.raises(EnvironmentFault, match=words) as failed:
        storage.read("file", max_bytes=len(CONTENT))
    assert "\n" not in str(failed.value)
    assert f"{s3.bucket}/file" in str(failed.value)
    assert s3.count() == 4


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 400, "body": b"<Error><Code>ExpiredToken</Code></Error>"},
        {"status": 403, "body": b"<Error><Code>InvalidAccessKeyId</Code></Error>"},
        {"status": 403, "body": b""},
        {"status": 401, "body": b""},
    ],
)
def test_refused_credentials_are_an_error_without_retries(s3: Any, fault: dict[str, Any]) -> None:
    storage = open_storage(s3.bucket)
    for ask in (
        lambda: storage.read("file", max_bytes=9),
        lambda: storage.read_range("file", 0, 9),
        lambda: storage.commit("file", b"x"),
        lambda: storage.commit("file", b"x", exclusive=True),
        lambda: list(storage.list()),
        lambda: storage.folders(),
        lambda: storage.delete("file"),
    ):
        s3.reset()
        s3.fail("status", times=None, **fault)
        with pytest.raises(EnvironmentFault, match="refuses the credentials") as refused:
            ask()
        assert s3.count() == 1
        assert "AWS_ACCESS_KEY_ID" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "secret-of-the-tests" not in str(refused.value)


def test_a_missing_bucket_is_named(s3: Any) -> None:
    storage = open_storage("s3://no-such-bucket-here/cache")
    for ask in (
        lambda: storage.read("file", max_bytes=9),
        lambda: storage.commit("file", b"x"),
        lambda: list(storage.list()),
    ):
        with pytest.raises(DataError, match="no such bucket"):
            ask()


def test_a_server_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="cannot read s3://bucket/x/file") as failed:
        open_storage("s3://bucket/x").read("file", max_bytes=1)
    assert "\n" not in str(failed.value)


def test_a_body_cut_short_by_a_proxy_is_never_accepted(web: Any) -> None:
    """Its announced length fits it: only who knows the true length can tell."""
    (web.root / "file").write_bytes(CONTENT)
    storage = open_storage(web.url)
    web.fail("short", path="file")
    with pytest.raises(StoredFileError, match="ends"):
        storage.read_range("file", 0, len(CONTENT))


def test_use_after_a_fork_is_an_error_and_does_not_hang(s3: Any) -> None:
    import multiprocessing

    storage = open_storage(s3.bucket)
    storage.commit("file", b"x")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def child() -> None:
        try:
            results.put(storage.read("file", max_bytes=1))
        except UsageError as error:
            results.put(str(error))

    process = context.Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert "forkserver" in results.get()


def test_every_read_is_one_request(s3: Any) -> None:
    storage = open_storage(s3.bucket)
    storage.commit("file", CONTENT)
    reads: list[Callable[[], Any]] = [
        lambda: storage.read("file", max_bytes=len(CONTENT)),
        lambda: storage.read_range("file", 5, 10),
        lambda: list(storage.stream("file")),
        lambda: storage.commit("other", b"x", exclusive=True),
    ]
    for read in reads:
        s3.reset()
        read()
        assert s3.count() == 1


def test_messages_of_a_store_are_shown_without_the_query_of_a_url() -> None:
    said = "Error performing GET https://a.blob.core.windows.net/c/x?sv=1&sig=secret in 3ms - lost"
    assert objects._answer(f"{said}\n\nDebug source: secret") == (
        "Error performing GET https://a.blob.core.windows.net/c/x?… in 3ms - lost"
    )


@pytest.mark.parametrize("place", ["s3://b/x", "https://h/x"])
def test_a_missing_package_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    objects._obstore.cache_clear()
    with pytest.raises(UsageError, match=r"pip install 'scalekd\[remote\]'"):
        open_storage(place)
    monkeypatch.undo()
    objects._obstore.cache_clear()
