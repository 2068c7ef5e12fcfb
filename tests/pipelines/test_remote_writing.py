"""cache-teacher writes to a bucket: the same bytes as to a disk, whatever interrupts it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import open_cache
from scalekd.cache.layout import MANIFEST_FILE, PLAN_FILE, ShardId
from scalekd.cache.writing.publish import send_files
from scalekd.errors import CacheMismatch, EnvironmentFault, UsageError
from scalekd.pipelines.inspect_cache import verify_cache
from scalekd.storage import LocalStorage, open_storage


def contents(place: str) -> dict[str, bytes]:
    storage = open_storage(place)
    return {f.path: storage.read(f.path, max_bytes=f.size) for f in storage.list()}


@pytest.fixture
def local(sound_cache: Path, file_contents: Callable[[Path], dict[str, bytes]]) -> dict[str, bytes]:
    return file_contents(sound_cache)


def test_a_bucket_receives_the_same_bytes_as_a_folder(
    s3: Any, make_cache: Callable[..., Any], local: dict[str, bytes], tmp_path: Path
) -> None:
    place = f"{s3.bucket}/deep/cache"
    s3.fail("status", status=503, times=2, method="PUT")
    s3.fail("lost", times=2, path="stage4")
    result = make_cache(place)
    assert result.complete
    assert result.output == place
    assert contents(place) == local
    order = [r.path.partition("/deep/cache/")[2] for r in s3.requests if r.method == "PUT"]
    assert order[-1] == MANIFEST_FILE
    for pass_index in (0, 1):
        for shard, block in ((0, 2), (1, 5), (2, 8)):
            record = order.index(f"records/{pass_index:04d}/{shard:06d}.json")
            assert order.index(f"passes/{pass_index:04d}/stage4/values/c/{block}/0/0") < record
    s3.reset()
    again = make_cache(place)
    assert (again.shards_written, again.shards_found) == (0, 6)
    assert contents(place) == local
    written = [r.path for r in s3.requests if r.method == "PUT" and r.status == 200]
    assert written == [], "nothing that stood there was replaced"


def test_a_tar_cache_is_written_to_a_bucket(
    s3: Any,
    make_cache: Callable[..., Any],
    tmp_path: Path,
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    settings = {"format": "webdataset", "embed": "source", "passes": 1}
    make_cache(tmp_path / "cache", **settings)
    make_cache(f"{s3.bucket}/cache", **settings)
    assert contents(f"{s3.bucket}/cache") == file_contents(tmp_path / "cache")


@pytest.mark.slow
def test_more_passes_are_added_to_a_cache_in_a_bucket(
    s3: Any, make_cache: Callable[..., Any], local: dict[str, bytes]
) -> None:
    place = f"{s3.bucket}/cache"
    assert make_cache(place, passes=1).complete
    assert open_cache(place).num_passes == 1
    result = make_cache(place, passes=2)
    assert (result.shards_written, result.shards_found) == (3, 3)
    assert contents(place) == local


@pytest.mark.slow
def test_parts_of_a_job_make_one_cache(
    s3: Any, make_cache: Callable[..., Any], local: dict[str, bytes]
) -> None:
    place = f"{s3.bucket}/cache"
    assert not make_cache(place, shards=(2, 2)).complete
    assert not make_cache(place, shards=(0, 0)).complete
    assert make_cache(place, shards=(1, 1)).complete
    assert contents(place) == local


def test_another_job_is_refused(s3: Any, make_cache: Callable[..., Any]) -> None:
    place = f"{s3.bucket}/cache"
    make_cache(place, shards=(0, 0))
    with pytest.raises(CacheMismatch, match=r"s3://.*was begun for something else: .*seed"):
        make_cache(place, seed=1)


@pytest.mark.slow
def test_overwrite_removes_only_a_cache(
    s3: Any, make_cache: Callable[..., Any], local: dict[str, bytes]
) -> None:
    place = f"{s3.bucket}/cache"
    make_cache(place, seed=1, passes=1)
    open_storage(place).commit("README.md", b"its card")
    make_cache(place, overwrite=True)
    assert contents(place) == local | {"README.md": b"its card"}
    open_storage(place).delete("README.md")
    open_storage(place).commit("thesis.tex", b"x")
    with pytest.raises(UsageError, match=r"not part of a cache \(thesis\.tex\)"):
        make_cache(place, overwrite=True)
    assert contents(place) == local | {"thesis.tex": b"x"}


@pytest.mark.parametrize("status", [403, 400])
def test_no_permission_is_found_before_the_teacher_is_loaded(
    s3: Any, make_cache: Callable[..., Any], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalekd.pipelines import _job

    monkeypatch.setattr(_job, "load_teacher", lambda config: pytest.fail("loaded"))
    body = b"<Error><Code>ExpiredToken</Code></Error>"
    s3.fail("status", status=status, body=body, method="PUT", times=None)
    with pytest.raises(EnvironmentFault, match="refuses the credentials"):
        make_cache(f"{s3.bucket}/cache")
    assert s3.count("PUT") == 1


def test_a_web_server_cannot_be_written_to(web: Any, make_cache: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="a web server is read-only"):
        make_cache(f"{web.url}/cache")


def test_files_with_other_bytes_replace_nothing_that_is_committed_or_recent(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound_cache: Path
) -> None:
    """Files are sent to a place where the same, other, or old other bytes stand."""
    path, place = "passes/0000/stage4/values/c/0/0/0", open_storage(f"{s3.bucket}/cache")
    folder = LocalStorage(sound_cache)
    record = open_cache(sound_cache).record(0, 0)
    files = {path: record.files[path]}
    ours = folder.read(path, max_bytes=10**7)
    send_files(folder, place, files, ShardId(0, 0))
    s3.reset()
    send_files(folder, place, files, ShardId(0, 0))
    assert place.read(path, max_bytes=10**7) == ours
    place.commit(path, ours[::-1])
    with pytest.raises(CacheMismatch, match=r"another job is writing shard 0 of pass 0.*an hour"):
        send_files(folder, place, files, ShardId(0, 0))
    place.commit("records/0000/000000.json", b"{}")
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    with pytest.raises(CacheMismatch, match="another job has committed shard 0 of pass 0"):
        send_files(folder, place, files, ShardId(0, 0))
    assert place.read(path, max_bytes=10**7) == ours[::-1]
    place.delete("records/0000/000000.json")
    send_files(folder, place, files, ShardId(0, 0))
    assert place.read(path, max_bytes=10**7) == ours


_JOB = """
import sys
from scalekd.pipelines import cache_teacher as stage_one
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.teachers import TeacherConfig
stage_one.cache_teacher(CacheTeacherConfig(
    teacher=TeacherConfig(model="test_vit", pretrained=False, img_size=32,
                          model_kwargs={"num_classes": 10}),
    data_dir=sys.argv[1], output=sys.argv[2], passes=2, batch_size=10, workers=0,
    shard_size=24, block_size=8, codec="float16"))
"""


@pytest.mark.slow
def test_a_job_killed_at_any_moment_can_be_continued(
    s3: Any, tiny_images: Path, local: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed when the n-th file arrives, for several n, then let finish."""
    place = f"{s3.bucket}/cache"
    # One thread, as in this process: sums of another number of threads differ in the last bit.
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _JOB, str(tiny_images), place]
    for wanted in (3, 70):
        s3.reset()
        job = subprocess.Popen(command, env=environment)
        while s3.count("PUT") < wanted and job.poll() is None:
            time.sleep(0.005)
        job.send_signal(signal.SIGKILL)
        job.wait()
        standing = contents(place)
        assert MANIFEST_FILE not in standing
        for name, content in standing.items():  # whole, or not there
            if name.startswith(("passes", "samples")) and f"{name}" in local:
                assert content == local[name]
    subprocess.run(command, env=environment, check=True)
    found = contents(place)
    assert found[PLAN_FILE] == local[PLAN_FILE]
    assert found == local
    assert verify_cache(place).problems == ()
