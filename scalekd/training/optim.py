"""The optimiser and schedule of a run, from timm's factories, over student and projectors together.

timm groups parameters by two methods of the *student* (``no_weight_decay``,
``group_matcher``), which the projectors around it do not have. So the groups are made here:
layer decay reaches the student only, and the projectors train at the full rate.
"""

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from scalekd.errors import UsageError
from scalekd.training.config import TrainConfig

# The published DeiT-B recipe decays no position embedding, the projectors' included, and no
# class token; it does decay the projectors' learned queries.
_UNDECAYED_NAMES = ("*pos_embed*", "*cls_token*", "*dist_token*", "*reg_token*")


def parameter_groups(
    student: nn.Module,
    others: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    wd_exclude: str = "timm",
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Group every trainable parameter by its weight decay and learning-rate scale.

    Args:
        student: Bare timm model; its ``no_weight_decay`` and ``group_matcher`` are used.
        others: Modules trained beside it, such as an objective with its projectors, whose
            ``no_weight_decay`` is used too.
        lr: Learning rate before layer decay.
        weight_decay: Decay of the parameters that are decayed.
        wd_exclude: ``"timm"`` leaves out vectors, biases, position embeddings, tokens and what both
            list; ``"none"`` decays everything.
        layer_decay: Factor on the rate from each layer to the one before it, or None.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and, with layer decay, ``lr_scale``, which
        timm's schedules multiply into the rate.

    Raises:
        UsageError: Nothing is trainable, or the student cannot be split into layers.
    """
    scales = _layer_scales(student, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}

    def add(module: nn.Module, is_student: bool) -> None:
        listed: set[str] = getattr(module, "no_weight_decay", set)()  # by timm's convention
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            excluded = wd_exclude == "timm" and (
                parameter.ndim <= 1
                or name.endswith(".bias")
                or name in listed
                or any(fnmatch.fnmatch(name, pattern) for pattern in _UNDECAYED_NAMES)
            )
            scale = scales.get(name, 1.0) if is_student else 1.0
            groups.setdefault((0.0 if excluded else weight_decay, scale), []).append(parameter)

    add(student, True)
    add(others, False)
    if not groups:
        raise UsageError("no parameter is trainable: --freeze leaves nothing to train")
    made = []
    for (decay, scale), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": decay, "lr": lr * scale}
        if layer_decay is not None:
            # timm's schedules start from `initial_lr`, the unscaled rate, and apply the scale.
            group |= {"lr_scale": scale, "initial_lr": lr}
        made.append(group)
    return made


def _layer_scales(student: nn.Module, layer_decay: float | None) -> dict[str, float]:
    if layer_decay is None:
        return {}
    matcher = getattr(student, "group_matcher", None)
    if matcher is None:
        raise UsageError(
            f"--layer-decay: {type(student).__name__} does not say which layer its parameters "
            "belong to (timm's group_matcher); leave the option out"
        )
    layers: dict[str, int] = group_parameters(student, matcher(coarse=False), reverse=True)
    deepest = max(layers.values())
    return {name: layer_decay ** (deepest - layer) for name, layer in layers.items()}


def build_optimizer(config: TrainConfig, student: nn.Module, others: nn.Module) -> Optimizer:
    """Build the optimiser of the student and of the modules trained beside it.

    Raises:
        UsageError: timm has no such optimiser, it refuses an argument, or it is of second order.
    """
    groups = parameter_groups(
        student,
        others,
        lr=config.lr,
        weight_decay=config.weight_decay,
        wd_exclude=config.wd_exclude,
        layer_decay=config.layer_decay,
    )
    arguments: dict[str, Any] = {**config.opt_args}
    if config.opt_eps is not None:
        arguments["eps"] = config.opt_eps
    if config.opt_betas is not None:
        arguments["betas"] = config.opt_betas
    on_cuda = any(parameter.is_cuda for parameter in student.parameters())
    if on_cuda and not {"fused", "foreach"} & arguments.keys():
        # One kernel instead of many, and it skips a step when `GuardedStep` asks for it.
        with contextlib.suppress(ValueError, TypeError, RuntimeError):  # few optimisers have it
            return _create_optimizer(config, groups, {**arguments, "fused": True})
    try:
        optimizer = _create_optimizer(config, groups, arguments)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"--opt {config.opt}: timm cannot build this optimiser: {error}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(
            f"--opt {config.opt}: needs second derivatives, and training computes first ones only; "
            "choose an optimiser of first order, such as adamw"
        )
    return optimizer


def _create_optimizer(
    config: TrainConfig, groups: list[dict[str, Any]], arguments: Mapping[str, Any]
) -> Optimizer:
    optimizer: Optimizer = timm.optim.create_optimizer_v2(  # type: ignore[attr-defined]
        [dict(group) for group in groups],
        opt=config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **arguments,
    )
    return optimizer


def planned_epochs(config: TrainConfig) -> int:
    """Return the number of epochs of a run, with warm-up prefix and cool-down.

    Raises:
        UsageError: The schedule does not fit into the number of epochs.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    return build_scheduler(config, optimizer, updates_per_epoch=1)[1]


def build_scheduler(
    config: TrainConfig, optimizer: Optimizer, *, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """Build the schedule; return it and the number of epochs, with warm-up prefix and cool-down.

    Raises:
        UsageError: The schedule does not fit into the number of epochs.
    """
    within = config.sched != "none" and not config.warmup_prefix
    if within and config.warmup_epochs and config.warmup_epochs >= config.epochs:
        raise UsageError(
            f"--warmup-epochs {config.warmup_epochs:g}: the warm-up would not end within "
            f"--epochs {config.epochs}, and the rate would never reach --lr; give fewer, or "
            "train them beforehand with --warmup-prefix"
        )
    arguments = scheduler_kwargs(config)
    try:
        scheduler, num_epochs = create_scheduler_v2(
            optimizer, **arguments, updates_per_epoch=updates_per_epoch
        )
    except ValueError as error:
        raise UsageError(f"--sched {config.sched}: {error}") from error
    return scheduler, int(num_epochs)


def clip_gradients(
    parameters: Sequence[nn.Parameter], config: TrainConfig, student: nn.Module
) -> Tensor:
    """Clip gradients as configured.

    Args:
        parameters: All trained parameters; their gradients must be unscaled.
        config: Gives the limit and the mode.
        student: Bare timm model, whose classifier adaptive clipping leaves out, as timm does: its
            rows are meant to grow and shrink freely.

    Returns:
        Norm of all gradients together before clipping, on their device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients).float()
    limit = config.clip_grad
    if limit is None:
        return norm
    if config.clip_mode == "norm":
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    elif config.clip_mode == "value":
        nn.utils.clip_grad_value_(parameters, limit)
    else:
        classifier = student.get_classifier()  # type: ignore[operator]
        heads = classifier if isinstance(classifier, tuple) else (classifier,)  # DeiT has two
        head = {id(parameter) for part in heads for parameter in part.parameters()}
        body = [parameter for parameter in parameters if id(parameter) not in head]
        adaptive_clip_grad(body, limit)  # type: ignore[no-untyped-call]
    return norm


def current_rate(optimizer: Optimizer) -> float:
    """Return the configured learning rate: the largest one if layer decay gives several."""
    return max(float(group["lr"]) for group in optimizer.param_groups)
