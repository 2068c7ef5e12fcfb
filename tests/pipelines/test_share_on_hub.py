"""Push to and pull from a Hugging Face dataset repository, against a small Hub on loopback."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalekd.cache.care.verify import verify
from scalekd.cache.reading.reader import open_cache, read_manifest
from scalekd.cache.sharing.card import (
    MAX_FILES,
    MAX_FILES_PER_FOLDER,
    check_hub_limits,
    dataset_card,
)
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.pipelines.list_caches import list_caches
from scalekd.pipelines.share_cache import ShareConfig, ShareResult, share_cache
from scalekd.storage import NotStored, hub, open_storage

PLACE = "hf://datasets/lab/swin-cache"


def share(source: object, target: object, **options: Any) -> ShareResult:
    return share_cache(ShareConfig(source=str(source), target=str(target), **options))


@pytest.fixture(scope="module")
def small(make_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small") / "cache"
    note = "for the seminar | of 2026 <b>"
    made = make_cache(root, passes=1, limit=40, stages=(4,), licence="cc-by-nc-4.0", note=note)
    assert made.complete
    return root


@pytest.fixture
def fake(servers: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``fake.hub`` is the Hub, ``fake`` the server in front of it."""
    path = Path(__file__).parents[1] / "storage" / "hub.py"
    spec = importlib.util.spec_from_file_location("loopback_hub", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    backend = module.FakeHub()
    with servers.Faulty(backend).serving() as faulty:
        backend.url = faulty.url
        faulty.hub = backend
        monkeypatch.setenv("HF_ENDPOINT", faulty.url)
        monkeypatch.setenv("HF_TOKEN", "hf_token_of_the_tests")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._runtime.is_xet_available", lambda: False)
        hub._api.cache_clear()
        yield faulty
    hub._api.cache_clear()


def test_a_round_trip_through_a_repository(
    small: Path, fake: Any, tmp_path: Path, file_contents: Callable[[Path], dict[str, bytes]]
) -> None:
    pushed = share(small, PLACE)
    assert pushed.complete
    assert fake.hub.private == {"lab/swin-cache"}
    assert fake.hub.largest_commit <= 50
    assert len(fake.hub.repos["lab/swin-cache"]) < 12  # far fewer commits than files
    stored = fake.hub.repos["lab/swin-cache"][-1]
    card = stored.pop("README.md").decode()
    assert stored == file_contents(small)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "cc-by-nc-4.0"
    assert PLACE in text
    share(PLACE, tmp_path / "back")
    assert file_contents(tmp_path / "back") == file_contents(small)
    assert verify(PLACE).problems == []
    assert open_cache(PLACE).num_passes == 1
    assert [cache.state for cache in list_caches(PLACE)] == ["complete"]
    again = share(small, PLACE)
    assert (again.num_files, fake.hub.repos["lab/swin-cache"][-1] is None) == (0, False)


def test_a_shard_appears_with_its_record(small: Path, fake: Any) -> None:
    """At every commit, whatever a record names is there."""
    share(small, PLACE)
    reader = open_cache(small)
    for files in fake.hub.repos["lab/swin-cache"]:
        for shard in range(2):
            if f"records/0000/{shard:06d}.json" in files:
                assert reader.record(0, shard).files.keys() <= files.keys()
        assert "manifest.json" not in files or len(files) >= 20


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
def test_large_files_are_uploaded_with_lfs(small: Path, fake: Any, tmp_path: Path) -> None:
    fake.hub.lfs_from = 2000
    share(small, PLACE)
    assert fake.count("PUT", "/upload/") > 0
    share(PLACE, tmp_path / "back")
    assert verify(tmp_path / "back").problems == []


def test_a_part_is_pulled_from_a_repository(small: Path, fake: Any, tmp_path: Path) -> None:
    share(small, PLACE)
    part = share(PLACE, tmp_path / "part", logits_only=True, shards=(1, 1))
    assert part.part == "shards 1, targets logits"
    assert verify(tmp_path / "part").problems == []


def test_an_existing_card_is_not_replaced(small: Path, fake: Any) -> None:
    storage = open_storage(PLACE)
    storage.commit("README.md", b"---\nlicense: mit\n---\nMine.\n")
    share(small, PLACE)
    assert storage.read("README.md", max_bytes=99).endswith(b"Mine.\n")


def test_two_concurrent_commits_both_succeed(fake: Any) -> None:
    storage = open_storage(PLACE)
    assert storage.commit("first", b"1")
    commits = fake.hub.repos["lab/swin-cache"]
    real, raced = fake.hub._commit, []

    def overtaken(repo: str, lines: list[Any]) -> Any:
        if not raced:
            raced.append(True)
            commits.append({**commits[-1], "theirs": b"2"})
        return real(repo, lines)

    fake.hub._commit = overtaken
    assert storage.commit("ours", b"3", exclusive=True)
    assert commits[-1] == {"first": b"1", "theirs": b"2", "ours": b"3"}
    assert not storage.commit("theirs", b"4", exclusive=True)


def test_files_of_a_repository_are_listed_and_read(fake: Any) -> None:
    storage = open_storage(f"{PLACE}/inner")
    assert [*storage.list()] == []
    assert storage.folders() == []
    assert not storage.exists("a/file")
    storage.commit_all({"a/file": b"0123456789", "b": b""})
    assert storage.read("a/file", max_bytes=10) == b"0123456789"
    assert storage.read_range("a/file", 2, 3) == b"234"
    assert b"".join(storage.stream("a/file")) == b"0123456789"
    assert {found.path: found.size for found in storage.list()} == {"a/file": 10, "b": 0}
    assert storage.folders() == ["a"]
    with pytest.raises(NotStored):
        storage.read("missing", max_bytes=1)
    storage.delete("b")
    storage.delete("b")
    assert not storage.exists("b")


def test_refusals_are_one_line(small: Path, fake: Any) -> None:
    fake.fail("status", status=403, times=None, method="POST")
    with pytest.raises(EnvironmentFault, match=r"answers 403; set HF_TOKEN"):
        share(small, PLACE)
    with pytest.raises(UsageError, match="not of the form"):
        open_storage("hf://models/lab/name")


def test_more_files_than_the_hub_accepts_are_refused_before_the_first() -> None:
    check_hub_limits((f"a/{n}" for n in range(MAX_FILES_PER_FOLDER)), PLACE)
    with pytest.raises(UsageError, match=r"10,001 files in a/.*webdataset"):
        check_hub_limits((f"a/{n}" for n in range(MAX_FILES_PER_FOLDER + 1)), PLACE)
    with pytest.raises(UsageError, match=r"100,001 files in all"):
        check_hub_limits((f"{n % 50}/{n}" for n in range(MAX_FILES + 1)), PLACE)


def test_the_card_describes_the_cache(small: Path) -> None:
    manifest = read_manifest(small)
    card = dataset_card(manifest.plan, manifest, PLACE)
    identity = manifest.plan.identity
    for told in (
        identity.teacher["weights_sha256"],
        identity.data.fingerprint,
        "cc-by-nc-4.0",
        "float16",
        "for the seminar \\| of 2026 &lt;b&gt;",
        f"scalekd cache pull {PLACE}",
    ):
        assert told in card
    other = manifest.plan.model_copy(
        update={"provenance": manifest.plan.provenance.model_copy(update={"licence": "ours: ask"})}
    )
    header = yaml.safe_load(dataset_card(other, None, PLACE).split("---\n")[1])
    assert (header["license"], header["license_name"]) == ("other", "ours: ask")
