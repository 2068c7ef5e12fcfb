"""Bytes written by version 1 always decode to the values of the day they were written."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks._codec_files import load_codec
from scalekd.codecs import create_logit_codec
from scalekd.shapes import FeatureShape
from tests.codecs.packed import unpack

FOLDER = Path(__file__).parent / "frozen"
SHAPE = FeatureShape((4, 4), 16, 1)


@pytest.mark.parametrize(
    "name", ["float16-v1", "int8-v1", "transform-token-v1", "transform-view-v1"]
)
def test_features_always_decode_to_the_same_values(name: str, tmp_path: Path) -> None:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as frozen:
        (tmp_path / "codec").write_bytes(frozen["codec"].tobytes())
        codec = load_codec(tmp_path / "codec", SHAPE)
        packed = {spec.name: frozen[f"packed_{spec.name}"].tobytes() for spec in codec.planes}
        decoded = codec.decode(unpack(codec, packed, 5))
        # Matrix products may differ in their last bits between machines.
        np.testing.assert_allclose(decoded, frozen["decoded"], rtol=1e-4, atol=1e-4)
    assert codec.to_config().get("gain", "") in name


@pytest.mark.parametrize(("name", "request_text"), [("full-v1", "full"), ("topk-v1", "topk:3")])
def test_logits_always_decode_to_the_same_values(name: str, request_text: str) -> None:
    codec = create_logit_codec(request_text, 12)
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as frozen:
        packed = {spec.name: frozen[f"packed_{spec.name}"].tobytes() for spec in codec.planes}
        for key, value in codec.decode(unpack(codec, packed, 5)).items():
            np.testing.assert_allclose(value, frozen[f"decoded_{key}"], rtol=1e-6)


def test_every_frozen_file_is_tested() -> None:
    names = {path.stem for path in FOLDER.glob("*.npz")}
    assert names == {
        "float16-v1",
        "int8-v1",
        "transform-token-v1",
        "transform-view-v1",
        "full-v1",
        "topk-v1",
    }
