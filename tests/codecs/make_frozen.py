"""Write the frozen files of the present codec versions: python -m tests.codecs.make_frozen

Run it once when a codec or a version is new. Existing files are never rewritten: caches with such
bytes are out in the world.
"""

from pathlib import Path

import numpy as np

from benchmarks._codec_files import codec_to_bytes
from scalekd.codecs import create_logit_codec, fit_codec
from scalekd.shapes import FeatureShape

FOLDER = Path(__file__).parent / "frozen"
SHAPE = FeatureShape((4, 4), 16, 1)
FEATURE_CODECS = {
    "float16-v1": "float16",
    "int8-v1": "int8",
    "transform-token-v1": "transform:error=0.02",
    "transform-view-v1": "transform:error=0.01,metric=raw",
}
LOGIT_CODECS = {"full-v1": "full", "topk-v1": "topk:3"}


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def main() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(16, 16)) * (1 + np.arange(16)) ** -0.5
    lengths = 2.0 ** rng.uniform(-3, 3, (400, 17, 1))
    features = ((1 + rng.normal(size=(400, 17, 16)) @ mixing.T) * lengths).astype(np.float16)
    views = features[:5]
    for name, request in FEATURE_CODECS.items():
        codec = fit_codec(request, SHAPE, [features[5:]])
        planes = codec.encode(views)
        arrays = {f"packed_{key}": _bytes(value) for key, value in codec.pack(planes).items()}
        _save(name, codec=_bytes(codec_to_bytes(codec)), decoded=codec.decode(planes), **arrays)
    logits = (rng.normal(size=(5, 12)) * 3).astype(np.float32)
    for name, request in LOGIT_CODECS.items():
        logit_codec = create_logit_codec(request, 12)
        planes = logit_codec.encode(logits)
        arrays = {f"packed_{key}": _bytes(value) for key, value in logit_codec.pack(planes).items()}
        decoded = {f"decoded_{k}": value for k, value in logit_codec.decode(planes).items()}
        _save(name, **arrays, **decoded)


def _save(name: str, **arrays: np.ndarray) -> None:
    path = FOLDER / f"{name}.npz"
    if path.exists():
        print(f"{path} exists and stays")
        return
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main()
