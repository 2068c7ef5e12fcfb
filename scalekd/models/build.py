"""Construction of timm models with their weights, for teachers and students."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.models import architectures as _registered  # noqa: F401  (names for timm)
from scalekd.models.arguments import MAX_TEXT, check_model_kwargs, constructor_arguments
from scalekd.models.hub import cached_only_when_unreachable
from scalekd.models.names import ModelSource, nearest_names, unreachable_weights
from scalekd.models.weights import (
    describe_mismatch,
    is_computed,
    load_exactly,
    only_tensors_unpickled,
    read_state_dict,
    weights_in,
)
from scalekd.text import first_line

# Above the size of all timm models (the largest registers about 5,000 modules), and small enough
# that building one on the meta device takes seconds.
_MAX_REGISTERED = 60_000
_MAX_BYTES = 1 << 40
_MAX_COMPUTED_BYTES = 2 << 30
_MAX_FACTOR = 16  # position tables of larger images, half precision in the file
# Raised by constructors; RuntimeError for a tensor of an impossible size.
_UNBUILDABLE = (
    AssertionError,
    AttributeError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a model's input: mean and std of RGB in 0..1, and the evaluation crop."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


def build_model(
    source: ModelSource,
    *,
    pretrained: bool,
    checkpoint: str | Path | None,
    model_kwargs: Mapping[str, Any],
    seed: int | None = None,
    new_head: bool | None = False,
    notes: list[str] | None = None,
) -> nn.Module:
    """Create a model on the CPU with the requested weights.

    A checkpoint whose names or shapes differ from the model's goes through timm's conversion of
    that architecture's released files (layouts of the original authors, position tables of another
    image size), which is strict.

    Args:
        source: The model, from :func:`scalekd.models.names.describe_model`.
        pretrained: Whether to read the published weights; ignored if ``checkpoint`` is given.
        checkpoint: Path of a safetensors or PyTorch file with the weights.
        model_kwargs: Constructor arguments, which override those stored with the model.
        seed: Seed of random weights, which leaves torch's generator unchanged; by default they
            come from that generator.
        new_head: Whether the classifier keeps random weights instead of those of the checkpoint;
            ``None``: if the checkpoint has another number of classes.
        notes: List that receives a sentence if the classifier keeps random weights.

    Raises:
        UsageError: The constructor refuses an argument, or the weights do not fit.
        DataError: The checkpoint cannot be read.
        EnvironmentFault: Published weights cannot be fetched.
    """
    kwargs = {k: v for k, v in model_kwargs.items() if v is not None}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if checkpoint is None and pretrained and source.folder is not None:
            checkpoint = weights_in(source.folder)
            # As in timm: with another number of classes the head is not loaded.
            new_head = None if new_head is False else new_head
        if checkpoint is None:
            return (_create_pretrained if pretrained else _create)(source, kwargs)
        state = read_state_dict(checkpoint)
        if source.folder is not None:
            _check_memory(source, kwargs, state, checkpoint)
        model = _create(source, kwargs)
        if new_head is not False:
            left_out = _leave_head_out(model, state, always=bool(new_head))
            if left_out and notes is not None:
                notes.append(f"{checkpoint}: {left_out}")
        if differences := describe_mismatch(model.state_dict(), state):
            mismatch = f"--checkpoint {checkpoint} does not fit {source.label}: {differences}"
            return _convert(source, kwargs, model, state, mismatch)
    load_exactly(model, state)
    return model


def _leave_head_out(model: nn.Module, state: dict[str, Tensor], *, always: bool) -> str:
    """Replace the classifier in ``state`` by the model's, if it is of other classes or missing.

    Returns:
        A clause that says why, and which tensors are new; empty if nothing is replaced.
    """
    own = model.state_dict()
    reason = ""
    new: list[str] = []
    names = classifier_names(model)
    heads = {tensor for tensor in own if tensor.rpartition(".")[0] in names}
    if heads and {n for n in own if not is_computed(n)} - heads == state.keys():
        state.update({tensor: own[tensor] for tensor in heads})
        listed = ", ".join(sorted(heads))
        return f"it has no classifier; the student's starts from random values ({listed})"
    for name in names:
        tensors = weight, _ = f"{name}.weight", f"{name}.bias"
        has_classes = bool(getattr(model, "num_classes", 0))
        if weight not in state or (weight not in own and has_classes):
            continue
        if weight in own:
            was, now = len(state[weight]), len(own[weight])
            if was == now and not always:
                continue
            reason = f"{was:,} classes in the file, {now:,} in the model"
        for tensor in tensors:
            state.pop(tensor, None)
            if tensor in own:
                state[tensor] = own[tensor]
                new.append(tensor)
    if not reason:
        return ""
    return (
        f"its classifier was trained on other classes and is left out ({reason}); the student's"
        f" starts from random values ({', '.join(new)})"
    )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of a timm model that are its classifier.

    The configuration of a model folder need not name them.
    """
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    if not names and hasattr(model, "get_classifier"):
        heads: Any = model.get_classifier()  # type: ignore[operator]  # Identity without classes
        heads = heads if isinstance(heads, tuple | list) else (heads,)
        names = [name for name, module in model.named_modules() if any(module is h for h in heads)]
    return (names,) if isinstance(names, str) else tuple(names)


def _check_memory(
    source: ModelSource,
    kwargs: Mapping[str, Any],
    state: Mapping[str, Tensor],
    checkpoint: str | Path,
) -> None:
    """Refuse a folder whose configuration describes a much larger model than its weights."""
    empty = create_on_meta(source.architecture, kwargs)
    needed = sum(t.numel() * t.element_size() for t in (*empty.parameters(), *empty.buffers()))
    stored = sum(t.numel() * t.element_size() for t in state.values())
    if needed > _MAX_FACTOR * stored + _MAX_COMPUTED_BYTES:
        raise UsageError(
            f"{source.label}: its configuration describes a model of {needed:,} bytes, but "
            f"{checkpoint} has {stored:,}"
        )


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Return the preprocessing that timm records for a model."""
    try:
        config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
        crop_pct = float(config["crop_pct"])
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"the model's configuration describes no usable preprocessing: {first_line(error)}"
        ) from error
    if len(mean) != 3 or len(std) != 3:
        raise UsageError(f"the model takes {len(mean)} colour channels, but scalekd has RGB images")
    return Preprocessing(mean, std, str(config["interpolation"]), crop_pct)


def _create_pretrained(source: ModelSource, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with cached_only_when_unreachable():
            return _create(source, kwargs, pretrained=True)
    except (UsageError, EnvironmentFault):
        raise
    except RuntimeError as error:  # from timm or torch: no weights published, or they do not fit
        raise UsageError(
            f"the published weights of {source.label} do not load: {first_line(error)}; pass "
            "weights on disk with --checkpoint FILE, or --no-pretrained for random ones"
        ) from error
    except Exception as error:  # hub, HTTP and socket libraries have different exceptions
        raise unreachable_weights(source.label, error) from error


def _create(
    source: ModelSource, kwargs: dict[str, Any], *, pretrained: bool = False, **factory: Any
) -> nn.Module:
    """Call ``timm.create_model``; turn errors of the constructor into usage errors."""
    try:
        with only_tensors_unpickled():
            model: nn.Module = timm.create_model(
                source.name, pretrained=pretrained, **factory, **kwargs
            )
    except TypeError as error:
        raise UsageError(_unexpected_argument(source, kwargs, error)) from error
    except _UNBUILDABLE as error:
        if pretrained and type(error) is RuntimeError:  # from the weights
            raise
        raise UsageError(
            f"{source.label} cannot be built with {_shown(kwargs)}: {first_line(error)}"
        ) from error
    return model


def _convert(
    source: ModelSource,
    kwargs: dict[str, Any],
    model: nn.Module,
    state: Mapping[str, Tensor],
    mismatch: str,
) -> nn.Module:
    """Build the model through timm's conversion of released files; ``mismatch`` is its error."""
    overlay = {
        "state_dict": dict(state),
        "num_classes": getattr(model, "num_classes", 0),  # otherwise timm drops the head
        "source": "",
        "file": None,
        "custom_load": False,
        "label_offset": 0,
    }
    try:
        converted = _create(source, kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        raise UsageError(
            f"{mismatch}. Classes, image size and widths are set with --model-kwargs and --img-size"
        ) from error
    converted.pretrained_cfg = converted.default_cfg = model.pretrained_cfg  # without the tensors
    return converted


def _unexpected_argument(source: ModelSource, kwargs: dict[str, Any], error: TypeError) -> str:
    fixed = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
    if fixed:
        return f"{source.label} fixes {fixed[1]!r} itself; it cannot be set"
    try:
        bare = timm.create_model(source.architecture, pretrained=False, device="meta")
    except Exception:
        return f"{source.label} cannot be built with {_shown(kwargs)}: {first_line(error)}"
    known = constructor_arguments(type(bare))
    unknown = [name for name in kwargs if name not in known]
    if not unknown:
        return f"{source.label} cannot be built with {_shown(kwargs)}: {first_line(error)}"
    near = nearest_names(unknown[0], known)
    hint = f"did you mean {', '.join(near)}? It takes" if near else "it takes"
    return f"{source.label} has no argument {unknown[0]!r}; {hint}: {', '.join(known)}"


def _shown(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "its own arguments"


def create_on_meta(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a model on torch's meta device from plain data, without memory and weights.

    Raises:
        UsageError: The architecture is unknown to timm, refuses the arguments, or would be larger
            than all real models.
    """
    try:
        check_model_kwargs(kwargs)
    except ValueError as error:
        raise UsageError(f"{architecture[:MAX_TEXT]}: {error}") from error
    if not re.fullmatch(r"[A-Za-z0-9_]{1,100}", architecture) or not timm.is_model(architecture):
        raise UsageError(f"timm has no model {architecture[:MAX_TEXT]!r}")
    source = ModelSource(architecture, architecture, architecture)
    with torch.device("meta"), _bounded_construction():
        return _create(source, dict(kwargs), device="meta")


def build_described(
    architecture: str, kwargs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> nn.Module:
    """Build a model with random weights from the description in a document; see `check_described`.

    Raises:
        UsageError: This timm cannot build the description, or it does not fit the weights.
    """
    check_described(architecture, kwargs, shapes)
    return _create(ModelSource(architecture, architecture, architecture), dict(kwargs))


def check_described(
    architecture: str, kwargs: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Compare the description of a model in a document with the weights beside it.

    The document is not trusted: before memory is allocated, the arguments must be arguments of the
    constructor, and the model's tensors must have the names and shapes of the weights.

    Args:
        architecture: Name of the model in timm, without tag.
        kwargs: Arguments of the constructor.
        shapes: Name and shape of each tensor of the weights.

    Raises:
        UsageError: This timm cannot build the description, or it does not fit the weights.
    """
    empty = create_on_meta(architecture, kwargs)
    known = constructor_arguments(type(empty))
    for name in kwargs:
        if name not in known:
            raise UsageError(f"{architecture} has no argument {name!r}")
    weights = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    differences = describe_mismatch(empty.state_dict(), weights)
    if differences:
        raise UsageError(f"the weights are not those of {architecture}: {differences}")
    stored = empty.state_dict()
    computed = sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in empty.named_buffers()
        if name not in stored
    )
    if computed > _MAX_COMPUTED_BYTES:
        raise UsageError(f"{architecture} would compute tables of {computed:,} bytes")


@contextlib.contextmanager
def _bounded_construction() -> Iterator[None]:
    """Raise ValueError when more modules or values are registered than any real model has."""
    registered = 0
    num_bytes = 0

    def count(module: nn.Module, name: str, value: Any) -> None:
        nonlocal registered, num_bytes
        del module, name
        registered += 1
        if isinstance(value, Tensor):
            num_bytes += value.numel() * value.element_size()
        if registered > _MAX_REGISTERED or num_bytes > _MAX_BYTES:
            raise ValueError("the arguments ask for more layers or values than any model has")

    hooks = torch.nn.modules.module
    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
