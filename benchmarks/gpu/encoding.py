"""The device encoder: its integers against the codec's own, and its speed."""

import numpy as np
import torch

from benchmarks.gpu._setting import Setting, made_up_features, milliseconds, ready_codec
from scalekd.codecs import _viterbi
from scalekd.codecs._trellis import STEPS
from scalekd.codecs.encoder import settled
from scalekd.pipelines._arithmetic import strict_float32


def run(setting: Setting) -> None:
    with strict_float32(), torch.inference_mode():
        setting.part("encoding", "trellis", lambda: _trellis(setting))
        for stage in (4, 3):
            setting.part("encoding", f"stage {stage}", lambda stage=stage: _stage(setting, stage))  # type: ignore[misc]


def _trellis(setting: Setting) -> None:
    """Measure the search alone, with Triton if it is available, and with torch operations."""
    lanes, views = (4, 8) if setting.tiny else (1100, setting.batch_size)
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(STEPS * lanes, views, generator=generator)
    weights = 1 + torch.rand(STEPS, generator=generator)
    on_device, weights_there = values.to(setting.device), weights.to(setting.device)
    few = slice(0, 4)
    reference = _viterbi.search_stepwise(values[:, few].contiguous(), weights)
    searched = _viterbi.search(on_device[:, few].contiguous(), weights_there).cpu()
    stepwise = _viterbi.search_stepwise(on_device[:, few].contiguous(), weights_there).cpu()
    arms = {"search": _viterbi.search, "stepwise": _viterbi.search_stepwise}
    setting.report(
        "encoding",
        part="trellis",
        paths=lanes * views,
        different={
            "search": int((searched != reference).sum()),
            "stepwise": int((stepwise != reference).sum()),
        },
        milliseconds={
            name: round(
                milliseconds(
                    lambda arm=arm: arm(on_device, weights_there),  # type: ignore[misc]
                    tiny=setting.tiny,
                    seconds=0.5,
                ),
                3,
            )
            for name, arm in arms.items()
        },
    )


def _stage(setting: Setting, stage: int) -> None:
    codec, shape = ready_codec(setting, stage), setting.shapes[stage]
    encoder = codec.encoder(setting.batch_size)
    if encoder is None:
        raise RuntimeError("the default codec has no device encoder")
    encoder.to(setting.device)
    few = made_up_features(stage, shape, min(16, setting.batch_size), seed=6)
    there = torch.from_numpy(few).to(setting.device)
    planes = {name: p.cpu().numpy() for name, p in settled(encoder, there).planes.items()}
    own = codec.encode(few)

    def error(coded: dict[str, np.ndarray]) -> float:
        contiguous = {name: np.ascontiguousarray(plane) for name, plane in coded.items()}
        return float(np.square(codec.decode(contiguous) - few).sum() / np.square(few).sum())

    many = there.repeat(-(-setting.batch_size // len(few)), 1, 1)[: setting.batch_size]
    again = encoder(many)
    shuffled = encoder(torch.cat([many[:1], many[1:].flip(0)]))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cost = milliseconds(lambda: encoder(many), tiny=setting.tiny, seconds=0.5)
    half = many.bfloat16()
    setting.report(
        "encoding",
        part=f"stage {stage}",
        batch=len(many),
        different={name: float((planes[name] != own[name]).mean()) for name in own},
        error_of_the_device=error(planes),
        error_of_the_codec=error(own),
        first_view_keeps_its_code=all(
            bool(torch.equal(again.planes[name][:, 0], shuffled.planes[name][:, 0]))
            for name in again.planes
        ),
        milliseconds=round(cost, 2),
        milliseconds_from_bf16=round(
            milliseconds(lambda: encoder(half), tiny=setting.tiny, seconds=0.5), 2
        ),
        views_per_second=round(len(many) / cost * 1e3),
        peak_gigabytes=round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if torch.cuda.is_available()
        else None,
    )
