"""Small files that would need much memory are refused before it is allocated, with our errors."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import blosc, zstd
from pcodec import ChunkConfig, standalone
from pydantic import ValidationError

from scalekd.cache import read_manifest
from scalekd.cache.cache import Cache
from scalekd.cache.codecs import CacheCodecs, make_layout
from scalekd.cache.documents import canonical, parse
from scalekd.cache.documents.manifest import Identity, Manifest, Plan, Provenance, ShardRecord
from scalekd.cache.forms import ZARR
from scalekd.cache.forms.chunks import check_metadata, decode_chunk
from scalekd.cache.layout import ArraySpec, array_path
from scalekd.codecs._tables import _real
from scalekd.codecs.compression import Compression, zstd_content_size
from scalekd.errors import CacheCorrupt, CacheMismatch

INT16 = np.dtype(np.int16)


def closed(content: bytes) -> bytes:
    """With its crc32c."""
    return content + google_crc32c.value(content).to_bytes(4, "little")


def encoded(coding: Compression, rows: np.ndarray) -> bytes:
    if coding == "blosc":
        return bytes(blosc.Blosc("zstd", clevel=9, shuffle=1).encode(np.ascontiguousarray(rows)))
    if coding == "zstd":
        return closed(bytes(zstd.compress(np.ascontiguousarray(rows), 3)))
    return closed(bytes(standalone.simple_compress(rows.reshape(-1), ChunkConfig())))


@pytest.fixture
def little_memory() -> Iterator[None]:
    """NumPy's and Python's allocations stay below 8 MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("coding", ["blosc", "zstd", "pcodec"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_chunk_decodes_to_what_was_coded(coding: Compression, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 40)))
    dtype = np.dtype(data.draw(st.sampled_from(["int16", "uint16", "float32", "uint64"])))
    raw = data.draw(st.binary(min_size=1, max_size=50))
    rows = np.resize(np.frombuffer(raw, np.uint8), shape).astype(dtype)
    content = encoded(coding, rows)
    found = decode_chunk(content, coding, dtype, shape)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, rows)
    for other in ((shape[0] + 1, shape[1]), (shape[0], shape[1] + 1)):
        with pytest.raises(CacheCorrupt):
            decode_chunk(content, coding, dtype, other)
    with pytest.raises(CacheCorrupt):
        decode_chunk(content, coding, np.dtype(np.uint8), shape)
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    with pytest.raises(CacheCorrupt):
        decode_chunk(cut, coding, dtype, shape)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("coding", ["blosc", "zstd", "pcodec"])
def test_a_bomb_is_refused_by_its_header(coding: Compression) -> None:
    """256 MB of zeros in at most 260 kB, where a chunk has a hundred values."""
    content = encoded(coding, np.zeros(1 << 17, INT16))
    if coding == "blosc":
        content = content[:4] + (1 << 31).to_bytes(4, "little") + content[8:]
    if coding == "pcodec":
        # Every chunk of a standalone file may hold 2**24 values in a few bytes.
        whole = content[:-4]
        start = whole.index(b"\x08\xff\xff\x01")
        chunk, end = whole[start:-1], whole[-1:]
        content = closed(whole[:start] + chunk * 1000 + end)
    with pytest.raises(CacheCorrupt):
        decode_chunk(content, coding, INT16, (100,))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("coding", ["blosc", "zstd", "pcodec"])
def test_a_few_bytes_may_not_decode_to_a_gigabyte(coding: Compression) -> None:
    """Even if the plan has an array of this size."""
    with pytest.raises(CacheCorrupt, match="more than 4096 times as many"):
        decode_chunk(b"\0" * 10_000, coding, INT16, (1 << 29,))


def test_a_chunk_of_equal_values_may_be_small() -> None:
    rows = np.zeros((256, 1 << 16), INT16)
    content = encoded("zstd", rows)
    assert rows.nbytes > 4096 * len(content)
    assert not decode_chunk(content, "zstd", INT16, rows.shape).any()


@pytest.mark.parametrize(
    "values", [np.arange(9, dtype=np.uint8), np.zeros(300, np.uint8), np.zeros(1 << 18, np.uint8)]
)
def test_the_size_in_a_zstd_header_is_read(values: np.ndarray) -> None:
    assert zstd_content_size(zstd.compress(values, 3)) == values.size


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd\x00\x58",  # no size
        b"\x28\xb5\x2f\xfd\x23\x01\0\0\0\x05",  # a dictionary
        b"\x28\xb5\x2f\xfd\x28\x05",  # the reserved bit
        b"\x50\x2a\x4d\x18\x04\0\0\0abcd",  # a frame to be skipped
        b"\x28\xb5\x2f\xfd\xe0\x01",  # cut short
    ],
)
def test_a_zstd_header_without_a_plain_size_gives_none(header: bytes) -> None:
    assert zstd_content_size(header) is None


def test_other_blosc_compressors_are_not_run() -> None:
    rows = np.arange(1000, dtype=np.int16)
    for name, shuffle in (("lz4", 1), ("zlib", 1), ("zstd", 2), ("blosclz", 0)):
        content = bytes(blosc.Blosc(name, 5, shuffle).encode(rows))
        with pytest.raises(CacheCorrupt, match="not of format 1"):
            decode_chunk(content, "blosc", INT16, rows.shape)


# Documents


@pytest.fixture(scope="module")
def manifest(sound_cache: Path) -> Manifest:
    return read_manifest(sound_cache)


@pytest.fixture(scope="module")
def array(sound_cache: Path, manifest: Manifest) -> ArraySpec:
    layout = Cache(sound_cache, manifest.plan).layout
    return layout.find("pixel_hash")


def _change_shape(document: dict[str, Any]) -> None:
    document["shape"][0] += 1


def _change_chunks(document: dict[str, Any]) -> None:
    document["chunk_grid"]["configuration"]["chunk_shape"][0] = 1 << 40


def _change_type(document: dict[str, Any]) -> None:
    document["data_type"] = "uint32"


def _shard(document: dict[str, Any]) -> None:
    document["codecs"] = [{"name": "sharding_indexed", "configuration": {}}]


def _repeat_codec(document: dict[str, Any]) -> None:
    document["codecs"].append(document["codecs"][-1])


def _big_endian(document: dict[str, Any]) -> None:
    document["codecs"][0]["configuration"] = {"endian": "big"}


def _other_keys(document: dict[str, Any]) -> None:
    document["chunk_key_encoding"]["configuration"]["separator"] = "."


def _no_codecs(document: dict[str, Any]) -> None:
    document["codecs"] = []


def _odd(document: dict[str, Any]) -> None:
    document["chunk_grid"] = ["regular"]


@pytest.mark.parametrize(
    "change",
    [
        _change_shape,
        _change_chunks,
        _change_type,
        _shard,
        _repeat_codec,
        _big_endian,
        _other_keys,
        _no_codecs,
        _odd,
    ],
)
def test_metadata_are_those_of_the_plan(
    change: Callable[[dict[str, Any]], None],
    sound_cache: Path,
    manifest: Manifest,
    array: ArraySpec,
) -> None:
    path = sound_cache / array_path(0, array) / "zarr.json"
    identity = manifest.plan.identity
    check_metadata(path.read_bytes(), identity, array, path)
    document = json.loads(path.read_bytes())
    change(document)
    with pytest.raises(CacheCorrupt, match=r"zarr\.json"):
        check_metadata(json.dumps(document).encode(), identity, array, path)


def _edited(manifest: Manifest, changes: dict[str, Any], **of_data: Any) -> bytes:
    """A plan with other values, its id made to agree."""
    document = json.loads(canonical(manifest.plan))
    document["identity"].update(changes)
    document["identity"]["data"].update(of_data)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("change", "of_data", "message"),
    [
        ({}, {"num_samples": 1 << 40}, "shards are more than"),
        ({"shard_size": 1 << 24, "block_size": 1}, {}, "more than 65,536 blocks"),
        ({}, {"max_key_bytes": 5000}, "max_key_bytes"),
        ({"tail": "tables/\x1b[2J"}, {}, "tail"),
        ({"tail_digest": {"num_bytes": 1 << 40, "sha256": "0" * 64}}, {}, "tail_digest"),
    ],
)
def test_a_plan_with_excessive_sizes_is_refused(
    change: dict[str, Any], of_data: dict[str, Any], message: str, manifest: Manifest
) -> None:
    with pytest.raises(CacheCorrupt, match=message):
        parse(Plan, _edited(manifest, change, **of_data), where="here")


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"stages": [4], "logits": None, "codec": "int8"},
        {"stages": [5], "logits": "full", "codec": "int8"},
        {"stages": "4", "logits": "full", "codec": "int8"},
        {"stages": [4], "logits": "full", "codec": "int8", "more": 1},
    ],
)
def test_a_malformed_request_is_refused(request_: dict[str, Any], manifest: Manifest) -> None:
    with pytest.raises(CacheCorrupt, match="request"):
        parse(Plan, _edited(manifest, {"request": request_}), where="here")


def _errors(**changes: Any) -> dict[str, Any]:
    summary = {"mean": 0.1, "p95": 0.2, "max": 1}
    return {"num_views": 2, "raw": summary, "spatial": summary, "frequency": summary, **changes}


@pytest.mark.parametrize(
    "measured",
    [
        {"4": 3},
        {"4": {}},
        {"5": _errors()},
        {"4": _errors(spatial=[])},
        {"4": _errors(spatial={"mean": "0.1", "p95": 0.2, "max": 1})},
        {"4": _errors(raw={"mean": 10**400, "p95": 0.2, "max": 1})},
    ],
)
def test_measured_errors_must_be_numbers(measured: dict[str, Any], manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))
    document["provenance"]["measured"] = {"4": _errors()}
    assert parse(Plan, json.dumps(document).encode(), where="here").provenance.measured
    document["provenance"]["measured"] = measured
    with pytest.raises(CacheCorrupt, match="measured"):
        parse(Plan, json.dumps(document).encode(), where="here")


def test_a_manifest_names_as_many_records_as_there_are_shards(manifest: Manifest) -> None:
    document = json.loads(canonical(manifest))
    document["digest"] = ""
    document["records"].popitem()
    with pytest.raises(CacheCorrupt, match="names 8 records where there are 9"):
        parse(Manifest, json.dumps(document).encode(), where="here")


def test_json_is_bounded_in_depth_and_number_of_values() -> None:
    with pytest.raises(CacheCorrupt, match="nests deeper than 32"):
        parse(Plan, b"[" * 40 + b"]" * 40, where="here")
    with pytest.raises(CacheCorrupt, match="more than 4,194,304 values"):
        parse(Plan, b"[" + b"[]," * (2 << 20) + b"[]]", where="here")


def test_depth_is_counted_in_every_part_of_a_document(manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))
    document["identity"]["request"] = {"a": [0, json.loads("[" * 40 + "]" * 40)]}
    with pytest.raises(CacheCorrupt, match="nests deeper"):
        parse(Plan, json.dumps(document).encode(), where="here")


def test_blocks_of_the_largest_teachers_fit_and_larger_ones_do_not(manifest: Manifest) -> None:
    """DINOv2-g at 518 px has 1,374 tokens of 1,536 channels."""
    document = json.loads(canonical(manifest.plan))["identity"]
    shape = {"grid": [37, 37], "num_channels": 1536, "num_prefix_tokens": 5}
    document["stages"]["4"].update(shape)
    document["teacher"]["stages"]["4"] = shape
    document.update(block_size=256, shard_size=4096)
    assert Identity.model_validate(document).stages["4"].shape.num_tokens == 1374
    document["stages"]["4"].update(num_channels=4096)
    with pytest.raises(ValidationError, match="in half precision"):
        Identity.model_validate(document)


@pytest.mark.parametrize("codec", [["float16"], {"a": 1}, None, 3, "pickle"])
def test_an_unknown_codec_name_is_refused(
    codec: Any, sound_cache: Path, manifest: Manifest
) -> None:
    document = json.loads(canonical(manifest.plan))["identity"]
    document["stages"]["4"]["codec"]["config"]["codec"] = codec
    with pytest.raises(CacheMismatch, match="unknown codec"):
        CacheCodecs.load(sound_cache, Identity.model_validate(document))
    document["stages"], document["request"]["stages"] = {}, []
    document["logits"]["config"]["codec"] = codec
    with pytest.raises(CacheMismatch, match="unknown logit codec"):
        CacheCodecs.load(sound_cache, Identity.model_validate(document))


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), True, "1", None])
def test_a_number_of_a_codec_must_be_finite(value: Any) -> None:
    assert _real({"step": 1}, "step") == 1.0
    with pytest.raises(CacheCorrupt, match=r"step=.* is not a number"):
        _real({"step": value}, "step")


def _plan_of(document: dict[str, Any]) -> Plan:
    return Plan.of(Identity.model_validate(document), Provenance(software={}))


@pytest.mark.parametrize("num_classes", [1 << 30, 1 << 40, 1 << 63, 1 << 70])
def test_no_number_of_classes_overflows_a_size(num_classes: int, manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))["identity"]
    document["logits"]["config"]["num_classes"] = num_classes
    document["teacher"]["num_classes"] = num_classes
    with pytest.raises(ValidationError, match=f"the teacher has {num_classes} classes"):
        _plan_of(document)


def test_an_array_of_logits_has_a_largest_size(sound_cache: Path, manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))["identity"]
    document["logits"]["config"]["num_classes"] = 1 << 18
    document["teacher"]["num_classes"] = 1 << 18
    document.update(block_size=1 << 14, shard_size=1 << 14)
    document["stages"], document["request"]["stages"] = {}, []
    identity = _plan_of(document).identity
    with pytest.raises(CacheCorrupt, match="one file would have"):
        make_layout(identity, CacheCodecs.load(sound_cache, identity).planes, ZARR)


_SHAPE = {"grid": [2, 2], "num_channels": 64, "num_prefix_tokens": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 12}, "12 classes"),
        ({"num_classes": None}, "classes"),
        ({"num_classes": 10**10}, "10000000000 classes"),
        ({"num_classes": -1}, "-1 classes"),
        ({"img_size": [32, 24]}, "32 x 24 pixels"),
        ({"stages": {"3": _SHAPE, "4": {**_SHAPE, "grid": [100_000, 100_000]}}}, "the limits"),
        ({"stages": {"3": {**_SHAPE, "num_channels": 10**7}, "4": _SHAPE}}, "the limits"),
        ({"stages": {"3": {**_SHAPE, "num_prefix_tokens": 10**7}, "4": _SHAPE}}, "the limits"),
        ({"stages": {"3": {**_SHAPE, "grid": [512, 512]}, "4": _SHAPE}}, "and the cache stores"),
        ({"stages": {"3": _SHAPE, "4": {**_SHAPE, "grid": [4, 4]}}}, "and the cache stores"),
        ({"stages": {"4": _SHAPE}}, "not 3 and 4"),
        ({"stages": {"3": _SHAPE, "4": _SHAPE, "5": _SHAPE}}, "not 3 and 4"),
        ({"tail_blocks": 10**9}, "blocks"),
        ({"std": [0.2, 0.0, 0.2]}, "positive"),
        ({"mean": [1e9, 0.0, 0.0]}, "beyond 1,000"),
        ({"crop_pct": 1e300}, "beyond 1,000"),
        ({"model_kwargs": {"embed_dim": 10**9}}, "embed_dim=1000000000"),
        ({"model_kwargs": {"depths": [10**6]}}, "depths"),
        ({"model_kwargs": {"depths": [200, 200]}}, "more than 256 blocks"),
        ({"model_kwargs": {"depth": 10**6}}, "depth"),
        ({"model_kwargs": {"num_heads": 10**6}}, "num_heads"),
        ({"model_kwargs": {"window_size": 10**6}}, "window_size"),
        ({"model_kwargs": {"a": list(range(100))}}, "a list of at most 64"),
        ({"model_kwargs": {f"a{n}": 1 for n in range(100)}}, "100 arguments|more than"),
        ({"model_kwargs": {"norm_layer": "x" * 1000}}, "1000 characters|at most 200 characters"),
        ({"model": "x" * 10_000}, "characters"),
    ],
)
def test_a_teacher_that_disagrees_with_the_stored_shapes_is_refused(
    change: dict[str, Any], message: str, manifest: Manifest
) -> None:
    document = json.loads(canonical(manifest.plan))["identity"]
    document["teacher"].update(change)
    with pytest.raises(ValidationError, match=message):
        _plan_of(document)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tail", ".git/config"),
        ("tail", "tables/.tail-0123456789abcdef.safetensors"),
        ("tail", "tables/../tail-0123456789abcdef.safetensors"),
        ("tail", "tables//tail-0123456789abcdef.safetensors"),
        ("tail", "/tables/tail-0123456789abcdef.safetensors"),
        ("tail", "c:/tables/tail-0123456789abcdef.safetensors"),
        ("tail", "tables\\tail-0123456789abcdef.safetensors"),
        ("tail", "tables/tail-0123456789ABCDEF.safetensors"),
        ("tail", "tables/tail-\uff10123456789abcdef.safetensors"),
        ("tail", "tables/tail-\u0660123456789abcdef.safetensors"),
        ("tail", "tables/tail-0123456789abcdef.safetensors\n"),
        ("tail", "tables/tail-0123456789abcdef.safetensors/x"),
        ("tail", "tables/witnesses-0123456789abcdef.safetensors"),
        ("tail", "tables/sitecustomize.py"),
        ("witnesses", "tables/tail-0123456789abcdef.safetensors"),
        ("witnesses", "samples/key/c/0/0"),
        ("codec", "tables/stage3-0123456789abcdef.safetensors"),
        ("codec", "tables/stage5-0123456789abcdef.safetensors"),
        ("codec", "plan.json"),
        ("logits", "tables/stage4-0123456789abcdef.safetensors"),
    ],
)
def test_a_table_must_have_the_name_of_its_kind(field: str, value: str, manifest: Manifest) -> None:
    document = json.loads(canonical(manifest.plan))["identity"]
    digest = document["tail_digest"]
    if field == "tail":
        document["tail"] = value
    elif field == "witnesses":
        document["views"]["witnesses"] = value
    else:
        part = document["stages"]["4"]["codec"] if field == "codec" else document["logits"]
        part.update(tables=value, tables_digest=digest)
    with pytest.raises(ValidationError, match=r"is not the path of|are not|no codec tables"):
        _plan_of(document)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        "samples/.git/config",
        "passes/0000/.git/HEAD",
        "extensions/a/plan.json",
        "tables/tail-0123456789abcdef.pt",
        "records/samples/000000.json",
        "README.md",
        "passes/0000/stage4/zarr.json/..",
        "passes/0000/stage4/\u202ezarr.json",
    ],
)
def test_a_manifest_may_name_documents_of_a_cache_only(path: str, manifest: Manifest) -> None:
    document = json.loads(canonical(manifest))
    document["digest"] = ""
    document["files"][path] = document["files"]["plan.json"]
    with pytest.raises(CacheCorrupt, match="is not the path of"):
        parse(Manifest, json.dumps(document).encode(), where="here")


@pytest.mark.parametrize("path", ["../../home", "passes/0000/.git/c/0", "passes/0000/000000.zip"])
def test_a_record_may_name_files_of_shards_only(path: str, sound_cache: Path) -> None:
    document = json.loads((sound_cache / "records/0000/000000.json").read_text())
    document["files"][path] = next(iter(document["files"].values()))
    with pytest.raises(CacheCorrupt, match="is not the path of"):
        parse(ShardRecord, json.dumps(document).encode(), where="here")
