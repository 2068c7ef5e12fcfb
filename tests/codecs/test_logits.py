import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.codecs import create_logit_codec, logit_codec_from_config
from scalekd.errors import CacheCorrupt, CacheMismatch, DataError, UsageError
from tests.codecs.packed import unpack


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 1000)).astype(np.float32) * 4


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values.astype(np.float64) - values.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def test_full_keeps_every_class_to_half_precision(logits: np.ndarray) -> None:
    codec = create_logit_codec("full", 1000)
    decoded = codec.decode(codec.encode(logits))["logits"]
    assert (np.abs(decoded - logits) <= np.abs(logits) * 2**-11 + 2**-25).all()


def test_topk_keeps_the_likeliest_classes_and_all_mass(logits: np.ndarray) -> None:
    codec = create_logit_codec("topk:10", 1000)
    decoded = codec.decode(codec.encode(logits))
    truth = softmax(logits)
    np.testing.assert_array_equal(decoded["indices"], np.argsort(-logits, axis=1)[:, :10])
    kept = np.take_along_axis(truth, decoded["indices"], axis=1)
    np.testing.assert_allclose(np.exp(decoded["log_probs"]), kept, rtol=0.01)
    np.testing.assert_allclose(decoded["tail_mass"], 1 - kept.sum(axis=1), rtol=1e-4)
    relative = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    np.testing.assert_allclose(decoded["log_sum_exp"], relative, rtol=1e-5)


def test_temperature_can_change_later(logits: np.ndarray) -> None:
    """log_probs + log_sum_exp are logits with maximum 0, so any temperature follows from them."""
    codec = create_logit_codec("topk:1000", 1000)
    decoded = codec.decode(codec.encode(logits))
    scores = decoded["log_probs"] + decoded["log_sum_exp"][:, None]
    at_four = np.take_along_axis(softmax(logits / 4), decoded["indices"], axis=1)
    np.testing.assert_allclose(softmax(scores / 4), at_four, rtol=0.01)
    assert decoded["tail_mass"].max() == 0


def test_topk_of_ten_classes_takes_few_bytes(logits: np.ndarray) -> None:
    codec = create_logit_codec("topk:10", 1000)
    many = np.tile(logits, (6, 1))[:256]
    assert sum(map(len, codec.pack(codec.encode(many)).values())) / 256 <= 44


def test_topk_takes_any_offset_and_extreme_scores() -> None:
    codec = create_logit_codec("topk:2", 3)
    decoded = codec.decode(codec.encode(np.array([[1e30, -1e30, 0.0], [7e4, 7e4, -7e4]], "f4")))
    np.testing.assert_array_equal(decoded["indices"], [[0, 2], [0, 1]])
    np.testing.assert_allclose(np.exp(decoded["log_probs"]), [[1, 0], [0.5, 0.5]], atol=1e-6)
    assert np.isfinite(decoded["log_probs"]).all()


def test_many_classes_take_wide_indices() -> None:
    codec = create_logit_codec("topk:1", 70_000)
    scores = np.zeros((2, 70_000), np.float32)
    scores[:, 69_999] = 1
    assert codec.decode(codec.encode(scores))["indices"].tolist() == [[69_999], [69_999]]


@pytest.mark.parametrize("text", ["full", "topk:5"])
def test_configuration_round_trip(text: str, logits: np.ndarray) -> None:
    codec = create_logit_codec(text, 1000)
    again = logit_codec_from_config(json.loads(json.dumps(codec.to_config())))
    for name, plane in again.encode(logits).items():
        np.testing.assert_array_equal(plane, codec.encode(logits)[name])
    packed = codec.pack(codec.encode(logits))
    with pytest.raises(CacheCorrupt):
        unpack(codec, packed, 51)
    with pytest.raises(CacheMismatch):
        logit_codec_from_config({**codec.to_config(), "version": 9})
    with pytest.raises(CacheCorrupt):
        logit_codec_from_config({**codec.to_config(), "num_classes": -1})


@pytest.mark.parametrize("text", ["full", "topk:5"])
def test_bad_logits_are_refused(text: str, logits: np.ndarray) -> None:
    codec = create_logit_codec(text, 1000)
    bad = logits.copy()
    bad[3, 17] = np.nan
    with pytest.raises(DataError, match=r"view 3 .*class 17"):
        codec.encode(bad)
    with pytest.raises(UsageError):
        codec.encode(logits[:, 1:])


def test_half_precision_overflow_is_refused_with_advice(logits: np.ndarray) -> None:
    bad = logits.copy()
    bad[2, 5] = 1e5
    with pytest.raises(DataError, match=r"view 2 .*topk"):
        create_logit_codec("full", 1000).encode(bad)


@pytest.mark.parametrize("text", ["topk", "topk:0", "topk:1001", "top:3", "full:2", "", "topk:-1"])
def test_unknown_requests_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        create_logit_codec(text, 1000)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.data())
def test_topk_mass_always_sums_to_one(classes: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, classes))
    row = st.lists(st.floats(-1e4, 1e4, width=32), min_size=classes, max_size=classes)
    scores = np.array(data.draw(st.lists(row, min_size=1, max_size=3)), np.float32)
    codec = create_logit_codec(f"topk:{kept}", classes)
    decoded = codec.decode(codec.encode(scores))
    total = np.exp(decoded["log_probs"]).sum(axis=1) + decoded["tail_mass"]
    np.testing.assert_allclose(total, 1, atol=0.01)
