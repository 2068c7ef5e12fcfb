"""ScaleKD-light with one target more: the teacher's stage-3 tokens, before its tail.

The published losses compare with the final stage alone. Here what enters the tail is compared as
well, by the same two losses and weights, with the stage-3 features of a float16 cache. An
experiment: the library has no such objective unless the results ask for one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

from torch import Tensor

from scalekd.cache.targets import JoinedTargets
from scalekd.distillation import ScaleKDObjective, Targets, frequency_loss, spatial_loss


@dataclass(frozen=True)
class _Targets(Targets):
    stage3: Tensor | None = None


@contextmanager
def extra_target() -> Iterator[None]:
    """Within, every ScaleKD objective and cache has the extra target."""
    groups, decode = JoinedTargets.groups.fget, JoinedTargets.forward
    through_tail, losses = ScaleKDObjective._through_tail, ScaleKDObjective._losses
    terms = ScaleKDObjective._terms
    projected: list[Tensor] = []

    def with_stage3(joined: JoinedTargets, batch: Mapping[str, Tensor]) -> Targets:
        targets = decode(joined, batch)
        said = {field.name: getattr(targets, field.name) for field in fields(targets)}
        return _Targets(**said, stage3=batch["stage3.values"][:, 1:].float())  # no class token

    def remember(objective: ScaleKDObjective, tokens: list[Tensor]) -> Sequence[Tensor]:
        projected[:] = tokens
        return through_tail(objective, tokens)

    def with_loss(
        objective: ScaleKDObjective,
        levels: Sequence[Tensor],
        logits: Tensor,
        labels: Tensor,
        targets: Any,
    ) -> dict[str, Tensor]:
        terms = losses(objective, levels, logits, labels, targets)
        settings = objective.config.stage3
        spatial = spatial_loss(projected[0], targets.stage3)
        frequency = frequency_loss(projected[-1], targets.stage3)
        return terms | {
            "extra_spatial_loss": settings.spatial_weight * spatial,
            "extra_frequency_loss": settings.frequency_weight * frequency,
        }

    with (
        mock.patch.object(JoinedTargets, "groups", property(lambda j: (*groups(j), "stage3"))),
        mock.patch.object(JoinedTargets, "forward", with_stage3),
        mock.patch.object(ScaleKDObjective, "_through_tail", remember),
        mock.patch.object(ScaleKDObjective, "_losses", with_loss),
        mock.patch.object(
            ScaleKDObjective,
            "_terms",
            lambda o: (*terms(o), "extra_spatial_loss", "extra_frequency_loss"),
        ),
    ):
        yield
