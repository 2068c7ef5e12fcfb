"""float16, int8 and full logits keep their error bounds on any values, or refuse them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from scalekd.codecs import codec_from_config, create_logit_codec, fit_codec
from scalekd.errors import DataError
from scalekd.shapes import FeatureShape
from tests.codecs.packed import unpack

_floats = st.floats(width=32)


@st.composite
def features(draw: st.DrawFn) -> tuple[FeatureShape, np.ndarray]:
    grid = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    shape = FeatureShape(grid, draw(st.integers(1, 6)), draw(st.integers(0, 2)))
    size = (draw(st.integers(1, 3)), shape.num_tokens, shape.num_channels)
    magnitude = draw(st.sampled_from([1e-40, 1e-6, 1.0, 6e4, 3e38]))
    units = draw(arrays.arrays(np.float32, size, elements=st.floats(-1, 1, width=32)))
    return shape, units * np.float32(magnitude)


@given(features())
@settings(max_examples=100, deadline=None)
def test_int8_is_within_half_a_scale(given_: tuple[FeatureShape, np.ndarray]) -> None:
    shape, values = given_
    codec = codec_from_config(fit_codec("int8", shape).to_config(), {}, shape)
    planes = codec.encode(values)
    unpacked = unpack(codec, codec.pack(planes), len(values))
    error = np.abs(codec.decode(unpacked).astype(np.float64) - values)
    scale = np.abs(values).max(axis=-1, keepdims=True).astype(np.float64) / 127
    assert (error <= scale * 0.5001 + 127 * np.finfo(np.float32).tiny).all()


@given(features())
@settings(max_examples=100, deadline=None)
def test_float16_is_numpys_rounding_or_a_refusal(
    given_: tuple[FeatureShape, np.ndarray],
) -> None:
    shape, values = given_
    codec = fit_codec("float16", shape)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    try:
        planes = codec.encode(values)
    except DataError:
        assert not np.isfinite(rounded).all()
        return
    unpacked = unpack(codec, codec.pack(planes), len(values))
    np.testing.assert_array_equal(codec.decode(unpacked), rounded.astype(np.float32))


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=_floats))
@settings(max_examples=100, deadline=None)
def test_full_logits_are_numpys_rounding_or_a_refusal(logits: np.ndarray) -> None:
    codec = create_logit_codec("full", logits.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = logits.astype(np.float16)
    try:
        planes = codec.encode(logits)
    except DataError:
        assert not np.isfinite(rounded).all()
        return
    unpacked = unpack(codec, codec.pack(planes), len(logits))
    np.testing.assert_array_equal(codec.decode(unpacked)["logits"], rounded.astype(np.float32))
