"""The trellis: its decoder equals the definition, and it is better than a scalar quantiser."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalekd.codecs import _trellis


def choices_by_definition(indices: np.ndarray) -> np.ndarray:
    """z[n] = z[n-1] ^ z[n-3] ^ p[n-2] along one path."""
    parity, result = indices & 1, []
    for n in range(len(indices)):
        past = [result[n - 1] if n >= 1 else 0, result[n - 3] if n >= 3 else 0]
        result.append(past[0] ^ past[1] ^ (parity[n - 2] if n >= 2 else 0))
    return np.array(result)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_decoder_follows_the_recurrence(lanes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    indices = rng.integers(-300, 300, (2, _trellis.STEPS * lanes)).astype(np.int16)
    found = _trellis.quantiser_choices(torch.from_numpy(indices)).numpy()
    for view in range(2):
        for lane in range(lanes):
            path = indices[view, lane::lanes].astype(int)
            np.testing.assert_array_equal(found[view, lane::lanes], choices_by_definition(path))


def test_encoder_and_decoder_agree_and_beat_a_scalar_quantiser() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(_trellis.STEPS * 6, 40)).astype(np.float32) * 3
    indices = _trellis.encode(values, np.ones(_trellis.STEPS, np.float32))
    views_first = torch.from_numpy(np.ascontiguousarray(indices.T.astype(np.int16)))
    sign = 1 - 2 * _trellis.quantiser_choices(views_first).numpy().T.astype(np.float32)
    points = sign * (2 * indices + 0.5)
    # The machine allows two of four cosets at a time: nothing is ever further than 2 + 1/2 away.
    assert np.abs(points - values).max() < 2.5
    # A scalar quantiser of step 2 has 4/12 = 0.333; 0.333 / 0.263 is 1.03 dB. The granular gain
    # published for eight states is 1.1 dB.
    assert np.square(points - values).mean() < 0.268


def test_indices_are_equally_likely_under_both_quantisers() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(_trellis.STEPS * 8, 200)).astype(np.float32) * 1.5
    indices = _trellis.encode(values, np.ones(_trellis.STEPS, np.float32))
    views_first = torch.from_numpy(np.ascontiguousarray(indices.T.astype(np.int16)))
    choices = _trellis.quantiser_choices(views_first).numpy().T.astype(bool)
    assert abs(choices.mean() - 0.5) < 0.02
    for index in (-1, 0, 1):
        zero, one = (indices[~choices] == index).mean(), (indices[choices] == index).mean()
        assert abs(zero - one) < 0.01


def test_best_path_is_found() -> None:
    """Against exhaustive search over the first steps of one path, the rest being free."""
    rng = np.random.default_rng(2)
    values = np.zeros((_trellis.STEPS, 1), np.float32)
    values[:6, 0] = rng.normal(size=6) * 2
    weights = np.zeros(_trellis.STEPS, np.float32)
    weights[:6] = 1
    indices = _trellis.encode(values, weights)[:, 0]
    sign = 1 - 2 * choices_by_definition(indices)
    found = np.square(sign[:6] * (2 * indices[:6] + 0.5) - values[:6, 0]).sum()
    best = np.inf
    for parities in np.ndindex(*([2] * 6)):
        signs = 1 - 2 * choices_by_definition(np.array(parities))
        target = signs * values[:6, 0]
        nearest = 2 * np.rint(((target - 0.5) / 2 - np.array(parities)) / 2) + np.array(parities)
        best = min(best, float(np.square(2 * nearest + 0.5 - target).sum()))
    assert found <= best + 1e-4
