"""ScaleKD-light with one target more: the teacher's stage-3 tokens, before its tail.

The published losses compare with the final stage alone. Here what enters the tail is compared as
well, by the same two losses and weights, with the cache's stage-3 features. An experiment: the
library has no such objective, because the results did not ask for one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from scalekd.distillation import Targets, frequency_loss, spatial_loss
from scalekd.distillation.decoding import TargetCodecs, TargetDecoder
from scalekd.distillation.feature_terms import FeatureTerms


@contextmanager
def extra_target() -> Iterator[None]:
    """Within, the feature terms and the target decoders of the process have the extra target."""
    build, forward = TargetDecoder.__init__, TargetDecoder.forward
    groups = TargetDecoder.groups.fget
    through_tail, losses = FeatureTerms._through_tail, FeatureTerms.losses
    projected: list[Tensor] = []
    tokens: list[Tensor] = []

    def with_decoder(decoder: TargetDecoder, codecs: TargetCodecs, **settings: Any) -> None:
        build(decoder, codecs, **settings)
        if not settings["features"]:
            return
        dtype = settings.get("compute_dtype", torch.float32)
        decoder.stage3 = codecs.stages[3].decoder(compute_dtype=dtype)
        decoder.stage3_prefix = codecs.stages[3].shape.num_prefix_tokens  # type: ignore[assignment]

    def decode(decoder: TargetDecoder, batch: Mapping[str, Tensor]) -> Targets:
        if hasattr(decoder, "stage3"):
            start = "stage3."
            planes = {
                name.removeprefix(start): batch[name] for name in batch if name.startswith(start)
            }
            tokens[:] = [decoder.stage3(planes)[:, decoder.stage3_prefix :]]
        return forward(decoder, batch)

    def with_group(decoder: TargetDecoder) -> tuple[str, ...]:
        return (*groups(decoder), *(["stage3"] if hasattr(decoder, "stage3") else []))

    def remember(terms: FeatureTerms, predicted: list[Tensor]) -> Sequence[Tensor]:
        projected[:] = predicted
        return through_tail(terms, predicted)

    def with_stage3(terms: FeatureTerms, *arguments: Any) -> dict[str, Tensor]:
        computed = losses(terms, *arguments)
        (target,) = tokens
        return computed | {
            "extra_spatial_loss": terms._weight(3, "spatial") * spatial_loss(projected[0], target),
            "extra_frequency_loss": terms._weight(3, "frequency")
            * frequency_loss(projected[-1], target),
        }

    with (
        mock.patch.object(TargetDecoder, "__init__", with_decoder),
        mock.patch.object(TargetDecoder, "groups", property(with_group)),
        mock.patch.object(TargetDecoder, "forward", decode),
        mock.patch.object(FeatureTerms, "_through_tail", remember),
        mock.patch.object(FeatureTerms, "losses", with_stage3),
    ):
        yield
