"""Plan, commit records and manifest survive their files, and every edit is noticed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scalekd.cache import read_manifest
from scalekd.cache.cache import Cache
from scalekd.cache.documents import canonical, parse, parse_committed
from scalekd.cache.documents.manifest import Identity, Manifest, Plan, ShardRecord
from scalekd.cache.documents.records import record_hash, samples_hash, write_record
from scalekd.cache.files import digest
from scalekd.cache.forms import ZARR
from scalekd.cache.layout import ArraySpec, Layout, ShardId, chunk_path
from scalekd.errors import CacheCorrupt, CacheMismatch
from scalekd.storage import LocalStorage

_HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
_NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
_PATHS = st.from_regex(
    r"\A(samples|passes/[0-9]{4})(/[a-z][a-z0-9_]{0,8}){1,3}/c(/[0-9]{1,5}){1,3}\Z"
    r"|\Apasses/[0-9]{4}/[0-9]{6}\.(tar|index\.safetensors)\Z"
)
_RECORDS = st.builds(
    ShardRecord,
    cache_id=_HASH,
    unit=st.one_of(st.just("samples"), st.integers(0, 9999)),
    shard=st.integers(0, 10**6),
    num_rows=st.integers(0, 1 << 24),
    samples_sha256=_HASH,
    files=st.dictionaries(_PATHS, st.binary(max_size=8).map(digest), max_size=5),
    skipped=st.lists(_NAMES, max_size=3).map(tuple),
)


@pytest.fixture
def manifest(sound_cache: Path) -> Manifest:
    return read_manifest(sound_cache)


@given(_RECORDS)
@settings(max_examples=60, deadline=None)
def test_a_record_round_trips_through_json(record: ShardRecord) -> None:
    assert parse_committed(ShardRecord, canonical(record), where="here") == record


@given(_RECORDS, st.data())
@settings(max_examples=100, deadline=None)
def test_no_flipped_bit_of_a_record_goes_unnoticed(
    record: ShardRecord, data: st.DataObject
) -> None:
    content = canonical(record)
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        found = parse_committed(ShardRecord, bytes(flipped), where="here")
    except CacheCorrupt:
        return
    assert record_hash(found) != record_hash(record)  # the manifest knows the true one


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_parsed_or_refused_with_a_cache_error(content: bytes) -> None:
    for model in (Plan, ShardRecord, Manifest):
        with pytest.raises(CacheCorrupt, match="here"):
            parse(model, content, where="here")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["plan", "identity", "format", "format_version", "files", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@given(_JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_is_refused_with_a_cache_error(document: Any) -> None:
    for model in (Plan, ShardRecord, Manifest):
        with pytest.raises((CacheCorrupt, CacheMismatch), match="here"):
            parse(model, json.dumps(document).encode(), where="here")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"plan":' * 100_000,
        b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"shard": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
        b'"\\ud800"',
        b"",
    ],
    ids=["lists", "objects", "closed", "long-number", "not-utf8", "surrogate", "empty"],
)
def test_hostile_json_is_refused(content: bytes) -> None:
    for model in (Plan, ShardRecord, Manifest):
        with pytest.raises(CacheCorrupt, match="here"):
            parse(model, content, where="here")


def test_plan_and_manifest_round_trip_through_json(sound_cache: Path, manifest: Manifest) -> None:
    assert canonical(manifest) == (sound_cache / "manifest.json").read_bytes()
    assert canonical(manifest.plan) == (sound_cache / "plan.json").read_bytes()
    assert parse(Manifest, canonical(manifest), where="here") == manifest


def test_every_edited_value_of_a_manifest_is_noticed(manifest: Manifest) -> None:
    """Each leaf in turn: numbers one more, texts one letter longer, truths reversed."""
    document = json.loads(canonical(manifest))
    edited = 0

    def edit(parent: Any, key: Any) -> None:
        nonlocal edited
        value = parent[key]
        if isinstance(value, (dict, list)):
            for inner in list(value) if isinstance(value, dict) else range(len(value)):
                edit(value, inner)
            return
        if isinstance(value, bool):
            parent[key] = not value
        elif isinstance(value, (int, float)):
            parent[key] = value + 1
        else:
            parent[key] = (value or "") + "0"
        with pytest.raises((CacheCorrupt, CacheMismatch)):
            parse(Manifest, json.dumps(document).encode(), where="here")
        parent[key] = value
        edited += 1

    for key in ("num_passes", "num_views", "skipped", "total_bytes", "digest"):
        edit(document, key)
    for name in ("cache_id", "provenance"):
        edit(document["plan"], name)
    for name in ("views", "data", "batch_size", "precision", "request", "stages"):
        edit(document["plan"]["identity"], name)
    some = sorted(document["records"])[:2]
    for name in some:
        edit(document["records"], name)
    assert edited > 60


def test_an_edited_plan_does_not_match_its_cache_id(manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))
    document["identity"]["views"]["seed"] += 1
    with pytest.raises(CacheCorrupt, match="the plan was edited"):
        parse(Plan, json.dumps(document).encode(), where="here")


@pytest.mark.parametrize(
    ("version", "advice"), [(2, "update scalekd"), (0, "write the cache again")]
)
@pytest.mark.parametrize("model", [Plan, Manifest])
def test_another_format_version_is_a_mismatch_and_not_damage(
    model: type[Plan] | type[Manifest], version: int, advice: str, manifest: Manifest
) -> None:
    document = json.loads(canonical(manifest if model is Manifest else manifest.plan))
    plan = document["plan"] if model is Manifest else document
    plan["identity"]["format_version"] = version
    plan["identity"]["unknown to this release"] = {}
    with pytest.raises(CacheMismatch, match=f"cache format {version}.*{advice}"):
        parse(model, json.dumps(document).encode(), where="here")


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 7},
        {"block_size": 0},
        {"shard_size": 1 << 25},
        {"batch_size": 0},
        {"stages": {"5": {}}},
        {"precision": "fp64"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_sizes_in_an_identity_are_bounded(change: dict[str, Any], manifest: Manifest) -> None:
    with pytest.raises(ValidationError):
        Identity(**{**manifest.plan.identity.model_dump(), **change})


def test_shards_cover_every_sample_once(manifest: Manifest) -> None:
    identity = manifest.plan.identity
    assert identity.num_shards == 3
    assert [identity.rows_of(shard) for shard in range(3)] == [24, 24, 22]


def test_each_file_of_a_shard_contains_rows_of_that_shard_only(manifest: Manifest) -> None:
    """70 samples in shards of 24 and blocks of 8: shard 1 has blocks 3 to 5 of 0 to 8."""
    array = ArraySpec("stage4/codes", np.dtype(np.int16), (5,), (2,), "pcodec")
    paths = list(array.chunk_files(manifest.plan.identity, 1, 1, 24))
    assert paths == [f"passes/0001/stage4/codes/c/0/{block}/0" for block in (3, 4, 5)]
    small = ArraySpec("label", np.dtype(np.int32))
    assert list(small.chunk_files(manifest.plan.identity, "samples", 2, 22)) == [
        "samples/label/c/2"
    ]
    assert list(array.chunk_files(manifest.plan.identity, 0, 2, 0)) == []
    assert chunk_path(12, small, 0) == "passes/0012/label/c/0"


def test_an_array_too_large_for_a_file_is_refused(manifest: Manifest) -> None:
    huge = ArraySpec(
        "stage4/values", np.dtype(np.float32), shape_after=(1 << 28,), compression="zstd"
    )
    with pytest.raises(CacheCorrupt, match="one file would have"):
        Layout(manifest.plan.identity, samples=(), views=(huge,), form=ZARR)
    twin = ArraySpec("label", np.dtype(np.int32))
    with pytest.raises(CacheCorrupt, match="share a name"):
        Layout(manifest.plan.identity, samples=(twin,), views=(twin,), form=ZARR)


# Records on disk


@pytest.fixture
def read(cache_copy: Path, manifest: Manifest) -> Callable[..., ShardRecord]:
    cache = Cache(cache_copy, manifest.plan)

    def read(unit: str | int, shard: int) -> ShardRecord:
        return cache.record(ShardId(unit, shard))

    return read


def _change(root: Path, unit: str | int, shard: int, **changes: Any) -> None:
    path = root / ShardId(unit, shard).record_path
    record = ShardRecord.model_validate_json(path.read_bytes()).model_copy(update=changes)
    path.write_bytes(canonical(record))


def test_records_are_written_once(cache_copy: Path, read: Callable[..., ShardRecord]) -> None:
    record = read(0, 1)
    write_record(LocalStorage(cache_copy), record)  # the same bytes again are no harm
    with pytest.raises(CacheMismatch, match="another process committed"):
        write_record(
            LocalStorage(cache_copy), record.model_copy(update={"samples_sha256": "0" * 64})
        )
    assert read(0, 1) == record


def test_a_record_of_another_shard_or_cache_is_refused(
    cache_copy: Path, read: Callable[..., ShardRecord]
) -> None:
    first, second = (cache_copy / ShardId(1, shard).record_path for shard in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CacheCorrupt, match="files were swapped"):
        read(1, 1)
    _change(cache_copy, 0, 0, cache_id="0" * 64)
    with pytest.raises(CacheMismatch, match="belongs to cache 000000000000"):
        read(0, 0)


def test_a_record_must_name_all_files_and_all_rows(
    cache_copy: Path, read: Callable[..., ShardRecord]
) -> None:
    files = dict(read(0, 0).files)
    files.pop("passes/0000/pixel_hash/c/0")
    _change(cache_copy, 0, 0, files=files)
    with pytest.raises(CacheCorrupt, match="pixel_hash/c/0"):
        read(0, 0)
    another = {**read(0, 1).files, "passes/0001/pixel_hash/c/0": digest(b"")}
    _change(cache_copy, 0, 1, files=another)
    with pytest.raises(CacheCorrupt, match="names other files"):
        read(0, 1)
    _change(cache_copy, 0, 2, num_rows=21)
    with pytest.raises(CacheCorrupt, match="21 rows and 0 skipped samples do not make"):
        read(0, 2)


def test_the_hash_of_samples_sees_order_labels_and_images() -> None:
    labels, hashes = np.array([1, 2]), np.array([7, 8], np.uint64)
    variants = [
        samples_hash(["a", "b"], labels, hashes),
        samples_hash(["b", "a"], labels, hashes),
        samples_hash(["a", "b"], labels[::-1], hashes),
        samples_hash(["a", "b"], labels, hashes[::-1]),
        samples_hash(["ab"], labels, hashes),
    ]
    assert len(set(variants)) == len(variants)
    assert variants[0] == samples_hash(iter(["a", "b"]), labels.astype(np.int32), hashes)
