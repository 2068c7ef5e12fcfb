"""An optimiser step that is skipped, on the device, after a gradient that is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class GuardedStep:
    """Steps an optimiser unless a gradient's norm was not finite, now or before.

    The host does not wait: fused optimisers of torch take the decision as a tensor, and for others
    the parameters are restored after the step. The optimiser's own state is then
    invalid, which does no harm: no step follows, and the run ends at the next check. With a
    gradient scaler, the scaler decides and the run goes on.

    Args:
        optimizer: As prepared by Accelerate.
        parameters: All parameters that it trains.
        scaled: Whether a gradient scaler is in use.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter], *, scaled: bool) -> None:
        self._optimizer = optimizer
        self._parameters: list[Tensor] = list(parameters)
        self._scaled = scaled
        self._sound: Tensor | None = None
        inner = getattr(optimizer, "optimizer", optimizer)
        self._fused = inner if _takes_found_inf(inner) else None
        self._before: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, norm: Tensor) -> None:
        """Step, if every norm so far was finite.

        Args:
            norm: Norm of all gradients, the same on every process.
        """
        if self._scaled:
            self._optimizer.step()
            return
        sound = torch.isfinite(norm)
        self._sound = sound if self._sound is None else self._sound & sound
        if self._fused is not None:
            self._fused.found_inf = (~self._sound).float()
            self._optimizer.step()
            return
        if not self._before:
            self._before = [torch.empty_like(parameter) for parameter in self._parameters]
        torch._foreach_copy_(self._before, self._parameters)
        self._optimizer.step()
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parameter.copy_(torch.where(self._sound, parameter, before))


def _takes_found_inf(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )
