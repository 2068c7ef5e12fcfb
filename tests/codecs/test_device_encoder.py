"""Device encoders, compared with the encoding on the host."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scalekd.codecs import FeatureCodec, TransformCodec, fit_codec
from scalekd.codecs._trellis import STEPS, encode
from scalekd.codecs._viterbi import search_stepwise
from scalekd.codecs.encoder import FeatureEncoder, settled
from scalekd.shapes import FeatureShape

# Products are summed in another order, so a value at the edge between two integers may fall on
# either side. Measured: 0 to 5e-5 of the coefficients.
_MOST_DIFFERENT = 2e-4
_CASES = [
    ("transform:error=0.01", FeatureShape((7, 7), 64)),
    ("transform:error=0.02", FeatureShape((4, 6), 48, 2)),
    ("transform:error=0.02,metric=frequency", FeatureShape((5, 5), 32, 1)),
    ("transform:error=0.05,metric=raw", FeatureShape((3, 5), 40, 1)),
    ("transform:error=0.05", FeatureShape((24, 20), 16, 5)),  # two products, not a dense one
]
MakeFeatures = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=_CASES, ids=[f"{name}-{s.grid}" for name, s in _CASES])
def codec(request: pytest.FixtureRequest, make_features: MakeFeatures) -> FeatureCodec:
    name, shape = request.param
    return fit_codec(name, shape, [make_features(shape, 120)])


def _encoder(codec: FeatureCodec, num_views: int) -> FeatureEncoder:
    encoder = codec.encoder(num_views)
    assert encoder is not None
    return encoder


def _compare(codec: FeatureCodec, features: np.ndarray, planes: dict[str, torch.Tensor]) -> None:
    expected = codec.encode(features)
    assert planes.keys() == expected.keys()
    for name, plane in planes.items():
        found = plane.numpy()
        assert found.dtype == expected[name].dtype
        assert found.shape == expected[name].shape
        assert found.flags.c_contiguous
        assert (found != expected[name]).mean() <= _MOST_DIFFERENT, name


@pytest.mark.parametrize("num_views", [1, 11, 24])
def test_the_device_encoder_gives_the_integers_of_the_codec(
    codec: FeatureCodec, make_features: MakeFeatures, num_views: int
) -> None:
    features = make_features(codec.shape, num_views, seed=5).astype(np.float32)
    features[0] = 0
    features[num_views // 2, -1] = 0
    features[-1] *= 1e3
    encoding = _encoder(codec, 24)(torch.from_numpy(features))
    assert not encoding.octaves.any()
    assert encoding.finite.all()
    _compare(codec, features, encoding.planes)


def test_features_may_be_in_half_precision(
    codec: FeatureCodec, make_features: MakeFeatures
) -> None:
    features = torch.from_numpy(make_features(codec.shape, 6, seed=6)).bfloat16()
    encoding = _encoder(codec, 6)(features)
    _compare(codec, features.float().numpy(), encoding.planes)


def test_a_view_depends_neither_on_its_neighbours_nor_on_their_number(
    codec: FeatureCodec, make_features: MakeFeatures
) -> None:
    features = torch.from_numpy(make_features(codec.shape, 20, seed=8))
    encoder = _encoder(codec, 20)
    together = encoder(features).planes
    fewer = encoder(features[:3]).planes
    others = features.clone()
    others[3:] = 7 * others[3:].flip(0)
    besides = encoder(others).planes
    for name, plane in together.items():
        assert torch.equal(plane[:, :3], fewer[name])
        assert torch.equal(plane[:, :3], besides[name][:, :3])


def test_large_batches_are_encoded_in_chunks(
    codec: FeatureCodec, make_features: MakeFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scalekd.codecs import _device_encoder

    values = codec.shape.num_tokens * codec.shape.num_channels
    monkeypatch.setattr(_device_encoder, "_MOST_VALUES", 5 * values)
    features = make_features(codec.shape, 13, seed=9)
    encoding = _encoder(codec, 13)(torch.from_numpy(features))
    assert encoding.finite.shape == (13, codec.shape.num_tokens)
    _compare(codec, features, encoding.planes)


def test_values_that_are_not_finite_are_reported_with_view_and_token(
    codec: FeatureCodec, make_features: MakeFeatures
) -> None:
    features = torch.from_numpy(make_features(codec.shape, 4, seed=10)).float()
    features[1, 2, 3] = torch.nan
    features[3, -1, 0] = -torch.inf
    finite = _encoder(codec, 4)(features).finite
    expected = torch.ones_like(finite)
    expected[1, 2] = expected[3, -1] = False
    assert torch.equal(finite, expected)


def test_views_that_outgrow_the_planes_get_larger_gains(make_features: MakeFeatures) -> None:
    """A step so fine that indices of some views need more than 16 bits."""
    shape = FeatureShape((4, 4), 24)
    fitted = fit_codec("transform:error=0.01", shape, [make_features(shape, 120)])
    assert isinstance(fitted, TransformCodec)
    tables = fitted.transform_tables
    tables = replace(tables, mean=np.zeros_like(tables.mean), step=tables.step * 8e-4)
    codec = TransformCodec(shape, tables)
    features = make_features(shape, 12, seed=11).astype(np.float32)
    encoder = _encoder(codec, 12)
    octaves = encoder(torch.from_numpy(features)).octaves
    assert 0 < (octaves > 0).sum() < 12
    encoding = settled(encoder, torch.from_numpy(features))
    expected = codec.encode(features)
    assert not encoding.octaves.any()
    assert np.array_equal(encoding.planes["gains"].numpy(), expected["gains"])
    found = encoding.planes["coefficients"].numpy().astype(int)
    assert np.abs(found - expected["coefficients"]).max() <= 8  # of up to 64,000: float32's digits


def test_codecs_without_tables_are_encoded_on_the_host() -> None:
    for name in ("float16", "int8"):
        assert fit_codec(name, FeatureShape((2, 2), 8)).encoder(16) is None


@pytest.mark.parametrize(("lanes", "views", "scale"), [(1, 1, 3000.0), (3, 5, 3.0), (2, 9, 40.0)])
def test_the_trellis_search_finds_the_paths_of_the_codec(
    lanes: int, views: int, scale: float
) -> None:
    values, weights = _search_inputs(lanes, views, scale)
    expected = encode(values.copy(), weights)
    found = search_stepwise(torch.from_numpy(values), torch.from_numpy(weights))
    assert np.array_equal(found.numpy(), expected)


def _search_inputs(lanes: int, views: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(lanes)
    values = (random.standard_normal((STEPS * lanes, views)) * scale).astype(np.float32)
    values[::7] = np.round(values[::7] * 2) / 2  # ties between points
    return values, (1 + random.random(STEPS)).astype(np.float32)


_FUSED = """
import numpy as np, sys, torch
from scalekd.codecs._viterbi_triton import search_fused
saved = np.load(sys.argv[1])
found = search_fused(torch.from_numpy(saved["values"]), torch.from_numpy(saved["weights"]))
assert np.array_equal(found.numpy(), saved["expected"])
"""


def test_the_fused_search_finds_the_same_paths(tmp_path: Path) -> None:
    """Triton's interpreter runs the kernel on a CPU."""
    pytest.importorskip("triton")
    values, weights = _search_inputs(3, 50, 5.0)  # more lanes than one program has
    path = tmp_path / "search.npz"
    np.savez(path, values=values, weights=weights, expected=encode(values.copy(), weights))
    subprocess.run(
        [sys.executable, "-c", _FUSED, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )


def test_the_fused_search_rounds_every_product(tmp_path: Path) -> None:
    """Compiled for a GPU that this machine need not have, without fused multiply-add."""
    pytest.importorskip("triton")
    code = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from scalekd.codecs._viterbi_triton import OPTIONS, _search
pointers = {"values": "*fp32", "weights": "*fp32", "decisions": "*u8", "indices": "*i16"}
source = ASTSource(_search, {**pointers, "width": "i32", "lanes": "constexpr"}, {"lanes": 128})
text = compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS).asm["ptx"]
assert "mul.f32" in text or "mul.rn.f32" in text, text
assert "fma." not in text, text
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_without_a_compiler_the_search_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a launcher with the system's C compiler, which may be missing."""
    pytest.importorskip("triton")
    from scalekd.codecs import _viterbi, _viterbi_triton

    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    monkeypatch.setattr(_viterbi_triton, "search_fused", fail)
    _viterbi._can_fuse.cache_clear()
    with pytest.warns(UserWarning, match="encoding is slower: Failed to find C compiler.$"):
        assert not _viterbi._can_fuse("cpu")
    _viterbi._can_fuse.cache_clear()


@pytest.mark.parametrize("off", [0, 1])
def test_a_kernel_that_finds_other_paths_is_not_used(
    monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    pytest.importorskip("triton")
    from scalekd.codecs import _viterbi, _viterbi_triton

    def search(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        indices = _viterbi.search_stepwise(values, weights)
        indices[-1, -1] += off
        return indices

    monkeypatch.setattr(_viterbi_triton, "search_fused", search)
    _viterbi._can_fuse.cache_clear()
    with pytest.warns(UserWarning, match="1 of 32768 of its indices") if off else nullcontext():
        assert _viterbi._can_fuse("cpu") == (not off)
    _viterbi._can_fuse.cache_clear()
