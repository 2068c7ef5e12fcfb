"""The transform codec on ordinary, unusual and malicious features."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._codec_files import codec_to_bytes
from scalekd.codecs import (
    CodecRequest,
    TransformOptions,
    _quantiser,
    fit_codec,
    measure_errors,
    parse_codec,
)
from scalekd.errors import DataError, UsageError
from scalekd.shapes import FeatureShape
from scalekd.threads import one_thread
from tests.codecs.packed import unpack

SHAPE = FeatureShape((4, 4), 32)


@pytest.mark.parametrize("metric", ["spatial", "frequency", "raw"])
@pytest.mark.parametrize("target", [0.003, 0.03])
def test_the_target_error_is_met_on_new_views(
    make_features: Callable[..., np.ndarray], metric: str, target: float
) -> None:
    codec = fit_codec(
        f"transform:error={target},metric={metric}", SHAPE, [make_features(SHAPE, 900)]
    )
    views = make_features(SHAPE, 400, seed=5)
    errors = measure_errors(views, codec.decode(codec.encode(views)), SHAPE)
    assert getattr(errors, metric).mean == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize(
    "shape",
    [
        FeatureShape((2, 9), 16),
        FeatureShape((5, 3), 40, 1),
        FeatureShape((1, 1), 12),
        FeatureShape((1, 7), 8, 5),
        FeatureShape((21, 20), 4, 2),  # more tokens than the dense cosine matrix takes
        FeatureShape((6, 6), 2),
    ],
    ids=str,
)
def test_any_grid_with_or_without_prefix_tokens(
    make_features: Callable[..., np.ndarray], shape: FeatureShape
) -> None:
    codec = fit_codec("transform:error=0.02", shape, [make_features(shape, 300)])
    views = make_features(shape, 60, seed=3)
    errors = measure_errors(views, codec.decode(codec.encode(views)), shape)
    assert errors.raw.mean < 0.06
    assert errors.spatial.mean < 0.06


def test_prefix_tokens_are_coded_as_well_as_patch_tokens(
    make_features: Callable[..., np.ndarray],
) -> None:
    shape = FeatureShape((4, 4), 32, 2)
    codec = fit_codec("transform:error=0.01", shape, [make_features(shape, 600)])
    views = make_features(shape, 100, seed=9).astype(np.float32)
    decoded = codec.decode(codec.encode(views))
    error = np.square(decoded - views).sum(axis=2) / np.square(views).sum(axis=2)
    assert error[:, :2].mean() < 0.03


def test_transform_is_much_smaller_than_int8(make_features: Callable[..., np.ndarray]) -> None:
    shape = FeatureShape((6, 6), 64)
    views = make_features(shape, 256, seed=2)
    sizes = {}
    for name in ("int8", "transform:error=0.01"):
        codec = fit_codec(name, shape, [make_features(shape, 800)])
        sizes[name] = sum(map(len, codec.pack(codec.encode(views)).values()))
    assert sizes["transform:error=0.01"] < 0.45 * sizes["int8"]


def test_rate_is_close_to_the_gaussian_bound() -> None:
    """Independent Gaussian tokens of known spectrum: half a log2 of variance over distortion."""
    shape = FeatureShape((4, 4), 64)
    sigma = 2.0 ** np.linspace(3, -1, 64)
    rng = np.random.default_rng(0)

    def draw(views: int) -> np.ndarray:
        return (rng.normal(size=(views, 16, 64)) * sigma).astype(np.float16)

    codec = fit_codec("transform:error=0.01,metric=raw", shape, [draw(1500)])
    views = draw(512)
    planes = codec.encode(views)
    error = measure_errors(views, codec.decode(planes), shape).raw.mean
    bits = 8 * len(codec.pack(planes)["coefficients"]) / views.size
    variance = sigma**2
    low, high = 0.0, variance.max()
    for _ in range(60):
        level = (low + high) / 2
        less = np.minimum(variance, level).sum() < error * variance.sum()
        low, high = (level, high) if less else (low, level)
    bound = np.maximum(0.5 * np.log2(variance / level), 0).mean()
    # Measured 0.17, tables of short pages included. A scalar quantiser with ideal coding: 0.25.
    assert 0 < bits - bound < 0.2


def test_tokens_of_large_norm_do_not_worsen_the_others(
    make_features: Callable[..., np.ndarray],
) -> None:
    def draw(views: int, seed: int) -> np.ndarray:
        features = make_features(SHAPE, views, seed).astype(np.float32)
        rng = np.random.default_rng(seed)
        features[np.arange(views), rng.integers(0, 16, views)] *= 300
        features[:, :, 5] *= 50
        return features

    codec = fit_codec("transform:error=0.01", SHAPE, [draw(900, 0)])
    views = draw(200, 1)
    errors = measure_errors(views, codec.decode(codec.encode(views)), SHAPE)
    assert errors.spatial.mean == pytest.approx(0.01, rel=0.05)
    assert errors.spatial.max < 0.05


def test_dead_channels_stay_dead_and_cost_nothing(make_features: Callable[..., np.ndarray]) -> None:
    calibration = make_features(SHAPE, 600)
    calibration[..., 3:29] = 0
    codec = fit_codec("transform:error=0.01", SHAPE, [calibration])
    views = make_features(SHAPE, 50, seed=4)
    views[..., 3:29] = 0
    decoded = codec.decode(codec.encode(views))
    assert np.abs(decoded[..., 3:29]).max() < 1e-2 * np.abs(views).max()
    assert codec.planes[0].values_per_view <= 16 * 6


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_constant_maps_round_trip(value: float) -> None:
    views = np.full((40, 16, 32), value, np.float32)
    codec = fit_codec("transform", SHAPE, [views])
    decoded = codec.decode(codec.encode(views))
    np.testing.assert_allclose(decoded, views, atol=1e-3)


def test_zero_tokens_and_constant_views_round_trip_among_others(
    make_features: Callable[..., np.ndarray],
) -> None:
    codec = fit_codec("transform:error=0.01", SHAPE, [make_features(SHAPE, 600)])
    views = make_features(SHAPE, 4, seed=1).astype(np.float32)
    views[0] = 0
    views[1, 3] = 0
    views[2] = views[2, :1]
    views[3] *= 1e-12
    decoded = codec.decode(codec.encode(views))
    assert np.isfinite(decoded).all()
    scale = np.abs(views[1]).max()
    assert np.abs(decoded[0]).max() < scale
    error = np.square(decoded[3] - views[3]).sum() / np.square(views[3]).sum()
    assert error < 0.05


def test_views_far_from_the_calibration_do_not_overflow(
    make_features: Callable[..., np.ndarray],
) -> None:
    codec = fit_codec("transform:error=0.00001,metric=raw", SHAPE, [make_features(SHAPE, 600)])
    views = make_features(SHAPE, 3, seed=1).astype(np.float32)
    views[1] *= 1e25
    views[2] = 0
    views[2, 5, 7] = 3e38
    decoded = codec.decode(codec.encode(views))
    assert np.isfinite(decoded).all()
    exact = views.astype(np.float64)
    errors = np.square(decoded - exact).sum(axis=(1, 2))
    energy = np.square(exact).sum(axis=(1, 2))
    assert (errors[1:] < 0.01 * energy[1:]).all()


@pytest.mark.parametrize("num_views", [1, 2, 7, 20])
def test_few_calibration_views_still_give_a_sound_codec(
    make_features: Callable[..., np.ndarray], num_views: int
) -> None:
    codec = fit_codec("transform:error=0.01", SHAPE, [make_features(SHAPE, num_views)])
    views = make_features(SHAPE, 50, seed=8)
    errors = measure_errors(views, codec.decode(codec.encode(views)), SHAPE)
    assert errors.spatial.mean < {1: 1.0, 2: 0.4, 7: 0.2, 20: 0.02}[num_views]


def test_fit_is_deterministic_and_independent_of_block_sizes(
    make_features: Callable[..., np.ndarray],
) -> None:
    calibration = make_features(SHAPE, 300)
    one = fit_codec("transform", SHAPE, [calibration])
    two = fit_codec("transform", SHAPE, iter([calibration]))
    assert codec_to_bytes(one) == codec_to_bytes(two)


def test_fit_is_the_same_with_any_number_of_threads(
    make_features: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[int] = set()
    quantise = _quantiser.quantise

    def noted(*arguments: Any) -> np.ndarray:
        used.add(threading.get_ident())
        return quantise(*arguments)

    monkeypatch.setattr(_quantiser, "quantise", noted)
    blocks = [make_features(SHAPE, 600, seed) for seed in range(3)]  # 360 views held out
    with one_thread():
        one = fit_codec("transform", SHAPE, blocks)
        before, used = used, set()
        four = fit_codec("transform", SHAPE, blocks, num_threads=4)
    assert len(before) < len(used)
    assert codec_to_bytes(one) == codec_to_bytes(four)


def test_bad_calibration_is_refused(make_features: Callable[..., np.ndarray]) -> None:
    calibration = make_features(SHAPE, 30)
    calibration[21, 3, 2] = np.nan
    with pytest.raises(DataError, match=r"view 21 .*token 3"):
        fit_codec("transform", SHAPE, np.array_split(calibration, 3))
    with pytest.raises(UsageError, match="got no view"):
        fit_codec("transform", SHAPE, [])
    with pytest.raises(UsageError, match="got none"):
        fit_codec("transform", SHAPE)
    with pytest.raises(UsageError, match="do not fit"):
        fit_codec("transform", SHAPE, [calibration[:, 1:]])


def test_gains_are_per_token_or_per_view_as_the_features_need(
    make_features: Callable[..., np.ndarray],
) -> None:
    """Even lengths: one gain a view. Lengths that differ by octaves: one a token."""
    even = make_features(SHAPE, 400)
    assert fit_codec("transform", SHAPE, [even]).to_config()["gain"] == "view"
    lengths = 2.0 ** np.random.default_rng(0).uniform(-4, 4, (400, 16, 1))
    uneven = (even * lengths).astype(np.float32)
    assert fit_codec("transform", SHAPE, [uneven]).to_config()["gain"] == "token"
    assert fit_codec("transform:metric=raw", SHAPE, [uneven]).to_config()["gain"] == "view"


def test_options_are_parsed() -> None:
    assert parse_codec("transform") == CodecRequest("transform", TransformOptions(0.01, "spatial"))
    request = parse_codec("transform:error=0.05,metric=frequency")
    assert request.options == TransformOptions(0.05, "frequency")
    assert str(request) == "transform:error=0.05,metric=frequency"
    assert parse_codec(str(request)) == request


@pytest.mark.parametrize(
    "text",
    [
        "transform:error=0",
        "transform:error=nan",
        "transform:error=x",
        "transform:metric=loud",
        "transform:speed=9",
        "transform:error=0.1,error=0.2",
        "int8:error=1",
        "zip",
    ],
)
def test_bad_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_codec(text)


def test_numbers_of_calibration_views_are_as_specified() -> None:
    options = TransformOptions()
    assert options.num_calibration_views(FeatureShape((8, 8), 384)) >= 900  # 150 tokens a channel
    assert options.num_calibration_views(FeatureShape((7, 7), 1536)) >= 4702
    assert (
        options.num_calibration_views(FeatureShape((32, 32), 2048)) * 32 * 32 * 2048 * 4 <= 3 << 30
    )


@settings(deadline=None, max_examples=12)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2), st.integers(1, 30)
)
def test_every_small_shape_round_trips(
    height: int, width: int, channels: int, prefix: int, views: int
) -> None:
    shape = FeatureShape((height, width), channels, prefix)
    rng = np.random.default_rng(views)
    features = rng.normal(size=(views, shape.num_tokens, channels)).astype(np.float32)
    codec = fit_codec("transform:error=0.02,metric=raw", shape, [features])
    planes = codec.encode(features)
    decoded = codec.decode(unpack(codec, codec.pack(planes), views))
    assert decoded.shape == features.shape
    assert np.isfinite(decoded).all()
    assert measure_errors(features, decoded, shape).raw.mean < 0.5


def test_decoder_moves_between_types_and_devices(make_features: Callable[..., np.ndarray]) -> None:
    codec = fit_codec("transform", SHAPE, [make_features(SHAPE, 200)])
    decoder = codec.decoder()
    assert {buffer.device.type for buffer in decoder.to("meta").buffers()} == {"meta"}
    assert not list(codec.decoder().state_dict())  # nothing leaks into checkpoints
    assert all(isinstance(buffer, torch.Tensor) for buffer in codec.decoder().buffers())
