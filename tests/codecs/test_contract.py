"""The contract of scalekd.codecs.base, tested with every codec."""

import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from benchmarks._codec_files import codec_to_bytes, load_codec, save_codec
from scalekd.codecs import (
    FeatureCodec,
    codec_from_config,
    fit_codec,
    quiet_zarr,
)
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from scalekd.shapes import FeatureShape
from tests.codecs.packed import unpack

SHAPE = FeatureShape((3, 4), 24, 1)
NAMES = ["float16", "int8", "transform:error=0.02", "transform:error=0.05,metric=raw"]


@pytest.fixture(scope="module")
def codecs(make_features: Callable[..., np.ndarray]) -> dict[str, FeatureCodec]:
    calibration = make_features(SHAPE, 300)
    return {name: fit_codec(name, SHAPE, [calibration]) for name in NAMES}


@pytest.fixture(scope="module")
def views(make_features: Callable[..., np.ndarray]) -> np.ndarray:
    return make_features(SHAPE, 40, seed=7)


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest, codecs: dict[str, FeatureCodec]) -> FeatureCodec:
    return codecs[request.param]


def bound(codec: FeatureCodec, views: np.ndarray) -> np.ndarray:
    """What a value may be off by."""
    values = views.astype(np.float32)
    if codec.name == "float16":
        return np.zeros_like(values)  # the views are half precision already
    if codec.name == "int8":
        scale = np.abs(values).max(axis=-1, keepdims=True) / 127
        return np.broadcast_to(scale / 2 * 1.0001, values.shape)
    # Mean squared error: the target; a single value: generously, ten times its root.
    target = codec.to_config()["error"]
    energy = np.square(values).mean(axis=(1, 2), keepdims=True)
    return np.broadcast_to(10 * np.sqrt(target * energy * 4), values.shape)


def test_round_trip_stays_within_the_stated_bound(codec: FeatureCodec, views: np.ndarray) -> None:
    decoded = codec.decode(codec.encode(views))
    assert decoded.dtype == np.float32
    assert decoded.shape == views.shape
    assert (np.abs(decoded - views.astype(np.float32)) <= bound(codec, views)).all()


def test_planes_are_as_declared(codec: FeatureCodec, views: np.ndarray) -> None:
    planes = codec.encode(views)
    assert list(planes) == [spec.name for spec in codec.planes]
    for spec in codec.planes:
        assert planes[spec.name].dtype == spec.dtype
        assert planes[spec.name].shape == spec.stored_shape(40)
        assert planes[spec.name].flags.c_contiguous
    assert codec.check_planes(planes) == 40


def test_a_view_does_not_depend_on_its_neighbours(codec: FeatureCodec, views: np.ndarray) -> None:
    together = codec.encode(views)
    alone = codec.encode(views[17:18])
    for spec in codec.planes:
        np.testing.assert_array_equal(
            spec.views_first(together[spec.name])[17], spec.views_first(alone[spec.name])[0]
        )


def test_decoder_takes_views_first_and_any_batch(codec: FeatureCodec, views: np.ndarray) -> None:
    planes = codec.tensors(codec.encode(views))
    decoder = codec.decoder()
    whole = decoder(planes)
    some = decoder({name: plane[[5, 31]] for name, plane in planes.items()})
    torch.testing.assert_close(some, whole[[5, 31]], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_bfloat16_decoding_is_close(codec: FeatureCodec, views: np.ndarray) -> None:
    planes = codec.tensors(codec.encode(views))
    exact = codec.decoder()(planes)
    rough = codec.decoder(compute_dtype=torch.bfloat16)(planes)
    assert rough.dtype == torch.float32
    assert float((rough - exact).square().sum() / exact.square().sum()) < 1e-3


def test_configuration_and_tables_round_trip_through_files(
    codec: FeatureCodec, views: np.ndarray, tmp_path: Path
) -> None:
    config = json.loads(json.dumps(codec.to_config(), allow_nan=False))
    again = codec_from_config(config, codec.tables(), SHAPE)
    save_codec(tmp_path / "codec.safetensors", codec)
    loaded = load_codec(tmp_path / "codec.safetensors", SHAPE)
    expected = codec.encode(views)
    for other in (again, loaded):
        assert other.to_config() == codec.to_config()
        for name, plane in other.encode(views).items():
            np.testing.assert_array_equal(plane, expected[name])
        np.testing.assert_array_equal(other.decode(expected), codec.decode(expected))
    assert codec_to_bytes(loaded) == codec_to_bytes(codec)


def test_a_thread_that_leaves_first_keeps_the_warning_filter_of_another() -> None:
    notice = "Numcodecs codecs are not in the Zarr version 3 specification"
    first, second = quiet_zarr(), quiet_zarr()
    filters = list(warnings.filters)
    with warnings.catch_warnings(action="error"):
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            one.submit(first.__enter__).result()
            other.submit(second.__enter__).result()
            one.submit(first.__exit__, None, None, None).result()
            warnings.warn(notice, stacklevel=1)
            other.submit(second.__exit__, None, None, None).result()
        with pytest.raises(UserWarning, match="Numcodecs"):
            warnings.warn(notice, stacklevel=1)
    assert warnings.filters == filters


def test_zarr_alone_reads_the_stored_integers(
    codec: FeatureCodec, views: np.ndarray, tmp_path: Path
) -> None:
    planes = codec.encode(views)
    for spec in codec.planes:
        path = tmp_path / spec.name
        with quiet_zarr():
            array = zarr.create_array(
                path,
                shape=spec.stored_shape(40),
                chunks=spec.stored_shape(16),
                dtype=spec.dtype,
                fill_value=0,
                **spec.zarr_kwargs(),
            )
            array[...] = planes[spec.name]
            read = zarr.open_array(path, mode="r")[...]
        np.testing.assert_array_equal(read, planes[spec.name])


def test_a_flipped_bit_in_a_zarr_chunk_is_noticed(
    codec: FeatureCodec, views: np.ndarray, tmp_path: Path
) -> None:
    spec = codec.planes[0]
    planes = codec.encode(views)
    with quiet_zarr():
        array = zarr.create_array(
            tmp_path / "plane",
            shape=spec.stored_shape(40),
            chunks=spec.stored_shape(40),
            dtype=spec.dtype,
            fill_value=0,
            **spec.zarr_kwargs(),
        )
        array[...] = planes[spec.name]
        chunk = next(path for path in (tmp_path / "plane" / "c").rglob("*") if path.is_file())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 4
        chunk.write_bytes(data)
        with pytest.raises(Exception, match="checksum"):
            zarr.open_array(tmp_path / "plane", mode="r")[...]


@pytest.mark.parametrize("num_views", [1, 2, 40])
def test_packed_bytes_round_trip(codec: FeatureCodec, views: np.ndarray, num_views: int) -> None:
    planes = codec.encode(views[:num_views])
    packed = codec.pack(planes)
    for name, plane in unpack(codec, packed, num_views).items():
        np.testing.assert_array_equal(plane, planes[name])


def test_damaged_bytes_raise_cache_errors(codec: FeatureCodec, views: np.ndarray) -> None:
    packed = codec.pack(codec.encode(views))
    for spec in codec.planes:
        good = packed[spec.name]
        for bad in (b"", good[:-3], good[: len(good) // 2], b"\xff" * len(good)):
            with pytest.raises(CacheCorrupt):
                unpack(codec, {**packed, spec.name: bad}, 40)
    for num_views in (39, 41):
        with pytest.raises(CacheCorrupt):
            unpack(codec, packed, num_views)


def test_planes_of_another_codec_raise_cache_errors(codec: FeatureCodec, views: np.ndarray) -> None:
    planes = codec.encode(views)
    name = codec.planes[0].name
    with pytest.raises(CacheCorrupt, match=rf"{name}|disagree on views"):
        codec.decode({**planes, name: planes[name][..., :-1]})
    with pytest.raises(CacheCorrupt, match=name):
        codec.decode({**planes, name: planes[name].astype(np.float64)})
    with pytest.raises(CacheCorrupt, match="missing"):
        codec.decode({})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_name_view_and_token(
    codec: FeatureCodec, views: np.ndarray, value: float
) -> None:
    bad = views.copy()
    bad[23, 4, 11] = value
    with pytest.raises(DataError, match=r"view 23 .*token 4, channel 11"):
        codec.encode(bad)


def test_features_of_another_shape_are_refused(codec: FeatureCodec, views: np.ndarray) -> None:
    for bad in (views[:, 1:], views[..., :-1], views[0], views[:0], views.astype(np.float64)):
        with pytest.raises(UsageError):
            codec.encode(bad)


def test_versions_names_and_keys_are_checked(codec: FeatureCodec) -> None:
    config, tables = codec.to_config(), codec.tables()
    with pytest.raises(CacheMismatch, match="version 2"):
        codec_from_config({**config, "version": 2}, tables, SHAPE)
    with pytest.raises(CacheMismatch, match="float16"):
        codec_from_config({**config, "codec": "float61"}, tables, SHAPE)
    with pytest.raises(CacheCorrupt, match="surprise"):
        codec_from_config({**config, "surprise": 1}, tables, SHAPE)
    with pytest.raises(CacheCorrupt, match="extra"):
        codec_from_config(config, {**tables, "extra": np.zeros(3, np.float32)}, SHAPE)


def test_damaged_tables_raise_cache_errors(codecs: dict[str, FeatureCodec]) -> None:
    codec = codecs["transform:error=0.02"]
    config, tables = codec.to_config(), codec.tables()
    for name, table in tables.items():
        changed = table.copy()
        if changed.dtype.kind == "f":
            changed.reshape(-1)[0] = np.nan
        else:
            changed.reshape(-1)[0] = 10**6
        for bad in (table[:-1], table.astype(np.float64), changed):
            if name not in ("mean", "groups") and len(bad) < len(table):
                continue  # a shorter basis or order is another sound codec: planes then differ
            with pytest.raises(CacheCorrupt):
                codec_from_config(config, {**tables, name: bad}, SHAPE)
        rest = {key: value for key, value in tables.items() if key != name}
        with pytest.raises(CacheCorrupt):
            codec_from_config(config, rest, SHAPE)
    for key, value in [
        ("step", 0.0),
        ("step", float("nan")),
        ("step", "x"),
        ("num_trellis", 5),
        ("num_trellis", 10**9),
        ("num_bands", True),
        ("metric", "loudness"),
        ("gain", 3),
        ("error", 7.0),
        ("reference", 1e9),
    ]:
        with pytest.raises(CacheCorrupt):
            codec_from_config({**config, key: value}, tables, SHAPE)
    with pytest.raises(CacheCorrupt):
        codec_from_config(config, tables, FeatureShape((4, 4), 24, 1))
