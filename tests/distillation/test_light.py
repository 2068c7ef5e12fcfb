"""The light form: the same losses from fewer and smaller projectors.

What it costs is tested beside the benchmark that counts it.
"""

from typing import Any

import torch

from scalekd.distillation import LIGHT, PUBLISHED


def test_the_light_form_keeps_losses_and_targets(toys: Any) -> None:
    light, published = (toys.objective(form=form) for form in (LIGHT, PUBLISHED))
    levels, logits, labels, targets = toys.batch()
    losses = light(levels, logits, labels, targets)
    assert light.loss_names == published.loss_names
    assert losses["task_loss"] == published(*toys.batch())["task_loss"]
    for term in ("stage3_spatial_loss", "stage3_frequency_loss", "stage4_frequency_loss"):
        gradients = torch.autograd.grad(losses[term], levels, retain_graph=True, allow_unused=True)
        reached = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
        assert reached == [True, term.startswith("stage4")]


def test_a_light_projector_is_small(toys: Any) -> None:
    shared = toys.objective(form=LIGHT).projectors["stage4_shared"]
    assert shared.stem.conv.weight.shape == (7, 1, 3, 3)  # 7 channels, each by itself
    assert shared.fc1.weight.shape == (16, 16)
