"""Push and pull: what arrives is the cache to the byte, or the part asked for, whatever happens."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scalekd.cache import open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical
from scalekd.cache.files import digest
from scalekd.cache.reading.reader import read_manifest
from scalekd.errors import (
    CacheCorrupt,
    CacheMismatch,
    DataError,
    EnvironmentFault,
    UsageError,
)
from scalekd.pipelines.share_cache import ShareConfig, ShareResult, share_cache
from scalekd.storage import LocalStorage, StoredFile, open_storage

Contents = Callable[[Path], dict[str, bytes]]


def share(source: object, target: object, **options: Any) -> ShareResult:
    return share_cache(ShareConfig(source=str(source), target=str(target), **options))


def holds(root: Path) -> set[str]:
    """Groups of arrays of which there is any chunk, with their passes."""
    return {"/".join(path.relative_to(root).parts[:3]) for path in root.glob("passes/*/*/**/c/*")}


@pytest.fixture(scope="module")
def small(make_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pass over 40 images in two shards, for stores that take their time."""
    root = tmp_path_factory.mktemp("small") / "cache"
    assert make_cache(root, passes=1, limit=40, stages=(4,)).complete
    return root


@pytest.fixture
def bucket(s3: Any) -> str:
    return f"{s3.bucket}/lab/cache"


def test_push_and_pull_give_the_same_bytes(
    sound_cache: Path, bucket: str, s3: Any, tmp_path: Path, file_contents: Contents
) -> None:
    pushed = share(sound_cache, bucket)
    assert (pushed.complete, pushed.part, pushed.num_found) == (True, None, 0)
    puts = [request.path for request in s3.requests if request.method == "PUT"]
    assert puts[-1].endswith("/manifest.json")
    for shard in range(3):
        record = next(i for i, path in enumerate(puts) if path.endswith(f"0001/{shard:06d}.json"))
        chunks = [i for i, path in enumerate(puts) if f"0001/pixel_hash/c/{shard}" in path]
        assert max(chunks) < record  # a record is a promise about files that stand
    assert verify(bucket).problems == []
    pulled = share(bucket, tmp_path / "back")
    assert pulled.num_bytes == pushed.num_bytes
    assert file_contents(tmp_path / "back") == file_contents(sound_cache)


def test_only_missing_files_are_transferred(small: Path, bucket: str, s3: Any) -> None:
    share(small, bucket)
    s3.requests.clear()
    again = share(small, bucket)
    assert (again.num_files, again.num_found, again.num_shards) == (0, 4, 4)
    answered = [r.path for r in s3.requests if r.method == "PUT" and r.status == 200]
    assert answered == []  # plan and manifest were offered, and stood
    lost = "passes/0000/stage4/values/c/2/0/0"
    open_storage(bucket).delete(lost)
    assert share(small, bucket).num_files == 1
    assert verify(bucket).problems == []


@pytest.mark.parametrize(
    ("options", "groups", "part"),
    [
        (
            {"passes": (1, 1)},
            {f"passes/0001/{g}" for g in ("stage3", "stage4", "logits", "view", "pixel_hash")},
            "passes 1",
        ),
        (
            {"stages": (4,)},
            {
                f"passes/000{p}/{g}"
                for p in (0, 1)
                for g in ("stage4", "logits", "view", "pixel_hash")
            },
            "targets logits, stage4",
        ),
        (
            {"logits_only": True, "passes": (0, 0), "shards": (1, 2)},
            {f"passes/0000/{g}" for g in ("logits", "view", "pixel_hash")},
            "passes 0, shards 1-2, targets logits",
        ),
    ],
)
def test_a_part_is_a_cache_that_can_be_verified(
    sound_cache: Path, tmp_path: Path, options: dict[str, Any], groups: set[str], part: str
) -> None:
    root = tmp_path / "part"
    result = share(sound_cache, root, **options)
    assert (result.complete, result.part) == (True, part)
    assert holds(root) == groups
    assert verify(root).problems == []
    assert (root / "manifest.json").read_bytes() == (sound_cache / "manifest.json").read_bytes()
    tail = open_cache(sound_cache).identity.tail
    assert (root / str(tail)).exists() == ("logits_only" not in options)
    chunk = next(path for path in root.glob("passes/*/logits/**/c/*/*") if path.is_file())
    chunk.write_bytes(b"")
    assert len(verify(root).problems) == 1


def test_data_that_were_not_fetched_are_named_in_the_error(
    sound_cache: Path, tmp_path: Path
) -> None:
    root = tmp_path / "part"
    share(sound_cache, root, logits_only=True, passes=(1, 1), shards=(0, 1))
    reader = open_cache(root)
    assert (reader.passes, reader.shards, len(reader.samples)) == ((1,), (0, 1), 48)
    whole = open_cache(sound_cache)
    for first, count in reader.blocks():
        ours, theirs = (
            r.read_rows(1, first, count, ["logits/values", "pixel_hash"]) for r in (reader, whole)
        )
        assert all((ours[name] == theirs[name]).all() for name in theirs)
    for call, message in (
        (lambda: reader.read_rows(0, 0, 8, ["logits/values"]), "contains only .*, not pass 0"),
        (lambda: reader.read_rows(1, 0, 8, ["stage4/values"]), "contains only .*, not stage4"),
        (lambda: reader.file(reader.identity.tail, reader.identity.tail_digest), "not tail"),
        (
            lambda: share(root, tmp_path / "b", passes=(0, 1)),
            r"is a partial copy \(.*\), and the request is passes 0-1",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_a_part_without_the_first_samples_has_no_witnesses(
    sound_cache: Path, tmp_path: Path
) -> None:
    share(sound_cache, tmp_path / "a", shards=(1, 1))
    share(sound_cache, tmp_path / "b", shards=(0, 0))
    assert len(open_cache(tmp_path / "a").witnesses) == 0
    assert len(open_cache(tmp_path / "b").witnesses) == 8
    blocks = open_cache(tmp_path / "a").blocks()
    assert blocks == [(0, 8), (8, 8), (16, 8)]


def test_later_pulls_extend_a_part_to_the_whole_cache(
    sound_cache: Path, tmp_path: Path, file_contents: Contents
) -> None:
    root = tmp_path / "part"
    share(sound_cache, root, logits_only=True, passes=(0, 0))
    wider = share(sound_cache, root, stages=(4,), passes=(1, 1))
    assert wider.part == "passes 0-1, targets logits, stage4"  # the product of both
    assert verify(root).problems == []
    whole = share(sound_cache, root)
    assert (whole.part, verify(root).problems) == (None, [])
    brought = file_contents(root)
    assert {k: v for k, v in brought.items() if k[:9] != "selection"} == file_contents(sound_cache)
    again = share(sound_cache, root)
    assert (again.num_files, again.part) == (0, None)


def test_a_part_can_be_pushed_and_pulled(small: Path, bucket: str, tmp_path: Path) -> None:
    share(small, bucket, logits_only=True)
    result = share(bucket, tmp_path / "part")
    assert result.part == "targets logits"
    assert verify(tmp_path / "part").problems == []
    assert verify(bucket).problems == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": (1, 2)}, r"--passes 1-2: .* has passes 0 to 1"),
        ({"shards": (3, 3)}, r"--shards 3-3: .* has shards 0 to 2"),
    ],
)
def test_passes_and_shards_that_the_cache_lacks_are_refused(
    sound_cache: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        share(sound_cache, tmp_path / "part", **options)
    assert not (tmp_path / "part").exists()


def test_targets_that_the_cache_lacks_are_refused(make_cache: Any, tmp_path: Path) -> None:
    make_cache(tmp_path / "lean", stages=(4,), logits="none", passes=1)
    with pytest.raises(UsageError, match="but not stage3"):
        share(tmp_path / "lean", tmp_path / "part", stages=(3, 4))
    with pytest.raises(UsageError, match="no logits"):
        share(tmp_path / "lean", tmp_path / "part", logits_only=True)


def test_a_web_server_can_be_pulled_from_but_not_pushed_to(
    sound_cache: Path, web: Any, tmp_path: Path, file_contents: Contents
) -> None:
    shutil.copytree(sound_cache, web.root / "cache")
    share(f"{web.url}/cache", tmp_path / "back")
    assert file_contents(tmp_path / "back") == file_contents(sound_cache)
    with pytest.raises(UsageError, match="web server"):
        share(sound_cache, f"{web.url}/other")
    (web.root / "cache/manifest.json").unlink()
    with pytest.raises(UsageError, match="cannot list its files"):
        share(f"{web.url}/cache", tmp_path / "more")


# Several at once.


def at_once(*calls: Callable[[], object]) -> None:
    """Run calls in threads of their own; the first error is raised."""
    errors: list[BaseException] = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_pushes_and_two_pulls_may_run_at_once(
    small: Path, bucket: str, s3: Any, tmp_path: Path, file_contents: Contents
) -> None:
    s3.latency = 0.002  # so that they meet
    at_once(lambda: share(small, bucket), lambda: share(small, bucket))
    assert verify(bucket).problems == []
    root = tmp_path / "back"
    at_once(lambda: share(bucket, root), lambda: share(bucket, root))
    assert file_contents(root) == file_contents(small)


def test_two_pulls_of_different_parts_may_run_at_once(
    small: Path, bucket: str, s3: Any, tmp_path: Path
) -> None:
    share(small, bucket)
    s3.latency = 0.002
    root = tmp_path / "part"
    at_once(
        lambda: share(bucket, root, logits_only=True, shards=(0, 0)),
        lambda: share(bucket, root, stages=(4,), shards=(1, 1)),
    )
    assert verify(root).problems == []
    reader = open_cache(root)
    assert reader.shards == (0, 1)
    assert {"stage4/values", "logits/values"} <= {
        path.split("/c/")[0].removeprefix("passes/0000/")
        for shard in (0, 1)
        for path in reader.record(0, shard).files
        if (root / path).exists()
    }


def test_a_cache_can_be_pulled_while_it_is_written(
    make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    """Whatever was committed at each moment comes, and nothing else; then the rest."""
    source, target = tmp_path / "source", tmp_path / "target"
    done = threading.Event()
    incomplete: list[bool] = []

    def keep_pulling() -> None:
        while not done.is_set():
            try:
                incomplete.append(not share(source, target).complete)
            except DataError:
                time.sleep(0.01)  # not begun yet
            for record in target.glob("records/*/*.json"):
                for relative, expected in json.loads(record.read_bytes())["files"].items():
                    assert digest((target / relative).read_bytes()).sha256 == expected["sha256"]

    def write() -> None:
        try:
            make_cache(source, passes=2)
            make_cache(source, passes=3)
        finally:
            done.set()

    at_once(write, keep_pulling)
    assert any(incomplete)
    assert share(source, target).complete
    assert file_contents(target) == file_contents(source)


def test_an_incomplete_cache_is_pulled_as_incomplete(
    make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    make_cache(source, shards=(0, 1))
    result = share(source, target)
    assert (result.complete, (target / "manifest.json").exists()) == (False, False)
    with pytest.raises(CacheCorrupt, match=r"not complete.*scalekd cache pull"):
        open_cache(target)
    make_cache(source)
    assert share(source, target).complete
    assert file_contents(target) == file_contents(source)


def test_an_older_manifest_does_not_replace_a_newer_one(make_cache: Any, tmp_path: Path) -> None:
    make_cache(tmp_path / "grown", passes=3)
    make_cache(tmp_path / "old", passes=2)
    share(tmp_path / "grown", tmp_path / "target")
    assert share(tmp_path / "old", tmp_path / "target").complete
    assert open_cache(tmp_path / "target").num_passes == 3


def test_a_part_is_not_mistaken_for_a_cache_to_be_written(
    sound_cache: Path, make_cache: Any, tmp_path: Path
) -> None:
    share(sound_cache, tmp_path / "part", logits_only=True)
    with pytest.raises(UsageError, match="a part of a cache"):
        make_cache(tmp_path / "part", passes=3)
    make_cache(tmp_path / "begun", shards=(0, 0))
    with pytest.raises(UsageError, match="contains a whole cache, complete or begun"):
        share(sound_cache, tmp_path / "begun", logits_only=True)


# What is not to be mixed, or is damaged.


def test_files_of_another_cache_are_not_mixed_in(
    sound_cache: Path, make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    make_cache(tmp_path / "other", seed=3, passes=1)
    before = file_contents(tmp_path / "other")
    with pytest.raises(CacheMismatch, match=r"views\.seed"):
        share(sound_cache, tmp_path / "other")
    assert file_contents(tmp_path / "other") == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        share(sound_cache, tmp_path / "home")
    with pytest.raises(DataError, match="no cache"):
        share(tmp_path / "home", tmp_path / "elsewhere")


def test_other_bytes_of_the_same_cache_are_refused(
    sound_cache: Path, cache_copy: Path, tmp_path: Path
) -> None:
    """Two machines that do not compute alike: whoever committed a shard first keeps it."""
    target = tmp_path / "target"
    chunk = cache_copy / "passes/0000/stage4/values/c/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    record = cache_copy / "records/0000/000000.json"
    found = json.loads(record.read_bytes())
    was = found["files"]["passes/0000/stage4/values/c/0/0/0"]["sha256"]
    now = digest(chunk.read_bytes()).sha256
    record.write_text(record.read_text().replace(was, now))
    (cache_copy / "manifest.json").unlink()
    share(cache_copy, target)
    with pytest.raises(CacheMismatch, match="this shard has other bytes"):
        share(sound_cache, target)
    assert not (target / "manifest.json").exists()


def test_damage_at_the_source_is_not_copied(cache_copy: Path, tmp_path: Path) -> None:
    chunk = cache_copy / "passes/0001/logits/values/c/4/0"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(CacheCorrupt, match=r"logits/values/c/4/0"):
        share(cache_copy, tmp_path / "target")
    assert not (tmp_path / "target/manifest.json").exists()
    assert not (tmp_path / "target/records/0001/000001.json").exists()


def test_check_repairs_damage_at_the_target(
    sound_cache: Path, cache_copy: Path, file_contents: Contents
) -> None:
    short, flipped = (cache_copy / f"passes/0000/stage3/values/c/{n}/0/0" for n in (1, 5))
    short.write_bytes(short.read_bytes()[:10])
    content = bytearray(flipped.read_bytes())
    content[9] ^= 1
    flipped.write_bytes(content)
    assert share(sound_cache, cache_copy).num_files == 1  # the size tells
    assert verify(cache_copy).problems != []
    assert share(sound_cache, cache_copy, check=True).num_files == 1
    assert file_contents(cache_copy) == file_contents(sound_cache)


def test_an_interrupted_copy_is_replaced_on_request(sound_cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    chunk = target / "passes/0000/stage3/values/c/1/0/0"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"half")
    shutil.copy(sound_cache / "plan.json", target)
    with pytest.raises(CacheMismatch, match="--check"):
        share(sound_cache, target)
    share(sound_cache, target, check=True)
    assert verify(target).problems == []


# Stores that fail.


@pytest.mark.parametrize(
    "faults",
    [
        [{"kind": "status", "status": 503, "times": 3}],
        [{"kind": "status", "status": 500, "times": 2, "method": "PUT"}],
        [{"kind": "lost", "times": 2, "method": "PUT", "path": "/records/"}],
        [{"kind": "lost", "times": 1, "method": "PUT", "path": "/plan.json"}],
    ],
)
def test_a_push_retries_temporary_faults_of_the_store(
    small: Path, bucket: str, s3: Any, faults: list[dict[str, Any]]
) -> None:
    for fault in faults:
        s3.fail(**fault)
    assert share(small, bucket).complete
    s3.reset()
    assert verify(bucket).problems == []


@pytest.mark.parametrize("kind", ["drop", "flip"])
def test_a_pull_retries_broken_bodies(
    small: Path, bucket: str, s3: Any, kind: str, tmp_path: Path, file_contents: Contents
) -> None:
    share(small, bucket)
    s3.fail(kind, times=1, method="GET", path="/stage4/values/c/")
    share(bucket, tmp_path / "back")
    assert file_contents(tmp_path / "back") == file_contents(small)


def test_a_short_body_is_refused(small: Path, bucket: str, s3: Any, tmp_path: Path) -> None:
    share(small, bucket)
    s3.fail("short", times=None, method="GET", path="/stage4/values/c/")
    with pytest.raises((CacheCorrupt, EnvironmentFault)):
        share(bucket, tmp_path / "back")
    assert not list((tmp_path / "back").glob("passes/*/stage4/values/c/*/*/*"))
    s3.reset()
    assert share(bucket, tmp_path / "back").complete


def test_expired_credentials_are_an_error_without_retries(
    small: Path, bucket: str, s3: Any, servers: Any
) -> None:
    s3.fail("status", status=403, body=servers.EXPIRED, times=None)
    with pytest.raises(EnvironmentFault, match="ExpiredToken"):
        share(small, bucket)
    assert s3.count() <= 4


def test_a_file_that_arrives_with_other_bytes_is_noticed(small: Path, bucket: str, s3: Any) -> None:
    """The store keeps a byte wrong: reading back tells, and no record promises it."""
    s3.fail("flip", times=None, method="GET", path="/passes/0000/stage4/values/c/3/")
    with pytest.raises(CacheCorrupt, match="was damaged in transit"):
        share(small, bucket)
    assert not open_storage(bucket).exists("records/0000/000001.json")
    assert not open_storage(bucket).exists("manifest.json")


def test_an_outdated_listing_costs_only_requests(
    sound_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_contents: Contents
) -> None:
    target = tmp_path / "target"
    share(sound_cache, target)
    (target / "passes/0000/stage4/values/c/0/0/0").unlink()
    real = LocalStorage.list

    def stale(self: LocalStorage, prefix: str = "") -> Iterator[StoredFile]:
        """Shows a record that is gone, and hides files that stand."""
        for number, found in enumerate(real(self, prefix)):
            if number % 3:
                yield found

    (target / "records/0001/000002.json").unlink()
    monkeypatch.setattr(LocalStorage, "list", stale)
    share(sound_cache, target)
    monkeypatch.undo()
    assert file_contents(target) == file_contents(sound_cache)


# Killed in the middle.


@pytest.fixture
def slow_command() -> Callable[..., subprocess.Popen[bytes]]:
    def start(*arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "scalekd", "cache", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_push_can_be_continued(
    sound_cache: Path, bucket: str, s3: Any, slow_command: Any
) -> None:
    s3.latency = 0.05
    process = slow_command("push", sound_cache, bucket, "--jobs", 2)
    wait_for(lambda: s3.count("PUT", "/records/") >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.reset()
    assert not open_storage(bucket).exists("manifest.json")
    result = share(sound_cache, bucket)
    assert result.num_found > 0
    assert verify(bucket).problems == []


@pytest.mark.slow
def test_a_killed_pull_can_be_continued(
    sound_cache: Path,
    bucket: str,
    s3: Any,
    slow_command: Any,
    tmp_path: Path,
    file_contents: Contents,
) -> None:
    share(sound_cache, bucket)
    s3.latency = 0.05
    root = tmp_path / "back"
    process = slow_command("pull", bucket, root, "--jobs", 2)
    wait_for(lambda: len(list(root.glob("records/*/*.json"))) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.reset()
    assert not (root / "manifest.json").exists()
    assert share(bucket, root).num_found > 0
    for path in root.rglob("*.partial"):
        path.unlink()
    assert file_contents(root) == file_contents(sound_cache)


# The WebDataset form.


def test_tars_are_pushed_and_pulled_like_arrays(
    make_cache: Any, tmp_path: Path, file_contents: Contents
) -> None:
    source = tmp_path / "source"
    make_cache(source, passes=2, limit=40, stages=(4,), format="webdataset", embed="view")
    share(source, tmp_path / "whole")
    assert file_contents(tmp_path / "whole") == file_contents(source)
    part = share(source, tmp_path / "part", passes=(1, 1), shards=(1, 1))
    assert (part.part, verify(tmp_path / "part").problems) == ("passes 1, shards 1", [])
    assert [path.name for path in (tmp_path / "part").rglob("*.tar")] == ["000001.tar"]
    with pytest.raises(UsageError, match="packs all targets"):
        share(source, tmp_path / "logits", logits_only=True)


@pytest.mark.parametrize(
    "name",
    [
        *(".git/config", "sitecustomize.py", "passes/x/y", "tables/x", "samples/.git/zarr.json"),
        *("passes/0000/other/zarr.json", "tables/tail-0123456789abcdef.safetensors"),
    ],
)
def test_files_that_the_format_does_not_define_are_not_copied(
    name: str, cache_copy: Path, tmp_path: Path
) -> None:
    """A folder with a ``.git/config`` of a stranger runs the stranger's commands."""
    content = b"[core]"
    path = cache_copy / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    manifest = read_manifest(open_storage(cache_copy))
    edited = manifest.model_copy(update={"files": {**manifest.files, name: digest(content)}})
    (cache_copy / "manifest.json").write_bytes(canonical(edited.sealed()))
    for target, part in (("whole", {}), ("part", {"logits_only": True})):
        with pytest.raises(
            CacheCorrupt, match=rf"{name}'? is not (the path|a file of the cache that its plan)"
        ):
            share(cache_copy, tmp_path / target, **part)
        assert not (tmp_path / target / name).exists()
    try:
        problems = verify(cache_copy).problems
    except CacheCorrupt as error:
        problems = [str(error)]
    assert any(name in problem for problem in problems)


def test_a_table_with_another_digest_than_the_plans_is_refused(
    cache_copy: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(open_storage(cache_copy))
    tail = manifest.plan.identity.tail
    assert tail is not None
    files = {**manifest.files, tail: digest(b"another tail")}
    (cache_copy / tail).write_bytes(b"another tail")
    edited = manifest.model_copy(update={"files": files}).sealed()
    (cache_copy / "manifest.json").write_bytes(canonical(edited))
    with pytest.raises(CacheCorrupt, match="tail"):
        share(cache_copy, tmp_path / "taken")


@pytest.mark.parametrize("stranger", ["README.mdx", "README.md/photo.jpg", "README.md.txt"])
def test_files_with_names_similar_to_a_card_are_unexpected(
    stranger: str, sound_cache: Path, tmp_path: Path
) -> None:
    path = tmp_path / "taken" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    with pytest.raises(UsageError, match="contains files that are not part of a cache"):
        share(sound_cache, tmp_path / "taken")
