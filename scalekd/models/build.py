"""Building a timm model from a name, with its weights, for teachers and students alike."""

import contextlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.models import architectures as _registered  # noqa: F401  (names for timm)
from scalekd.models.hub import cached_only_when_unreachable
from scalekd.models.names import ModelSource, nearest_names, unreachable_weights
from scalekd.models.weights import describe_mismatch, load_exactly, matches, read_state_dict

# Arguments of timm's factory that have flags of their own here, or that would change what kind of
# object comes back; a model's own constructor takes none of them except the last three.
_RESERVED_KWARGS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"}
    | {"pretrained_model_args", "checkpoint_path", "cache_dir", "features_only", "feature_cfg"}
    | {"feature_cls", "out_indices", "scriptable", "exportable", "no_jit", "pruned", "use_naflex"}
    | {"device", "dtype", "in_chans"}
)
# Far above any published backbone (40 blocks, 4096 channels, 21,841 classes, 1,024 px); they bound
# the Python objects and the time that a hostile configuration can ask for.
_MAX_INTEGER = 1 << 16
_MAX_BLOCKS = 256
_MAX_LIST = 64
_MAX_TEXT = 64


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pixels: mean and std of RGB in 0..1, and the evaluation crop."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that are not plain data or not the model's own.

    Raises:
        ValueError: Says which argument, and what is allowed.
    """
    for name, value in kwargs.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise ValueError(f"{name!r} is not the name of a model argument")
        if name in _RESERVED_KWARGS:
            raise ValueError(f"{name!r} cannot be set through model arguments")
        if not is_plain(value):
            raise ValueError(
                f"model argument {name}={value!r} must be null, a boolean, a finite number, "
                "a string, or a list of these"
            )


def check_bounded(value: object, name: str = "") -> None:
    """Refuse numbers, lists and texts that no backbone has, in arguments from an untrusted file.

    Args:
        value: Arguments by name, or the value of one.
        name: Of the argument, for the message.

    Raises:
        ValueError: A value is beyond the bounds.
    """
    if isinstance(value, Mapping):
        if len(value) > _MAX_LIST:
            raise ValueError(f"{len(value)} arguments are more than {_MAX_LIST}")
        for key, item in value.items():
            check_bounded(item, str(key))
    elif isinstance(value, list | tuple):
        if len(value) > _MAX_LIST:
            raise ValueError(f"{name} has {len(value)} entries, more than {_MAX_LIST}")
        for item in value:
            check_bounded(item, name)
        if "depth" in name and sum(n for n in value if isinstance(n, int)) > _MAX_BLOCKS:
            raise ValueError(f"{name}={value} makes more than {_MAX_BLOCKS} blocks")
    elif isinstance(value, str) and len(value) > _MAX_TEXT:
        raise ValueError(f"{name} is a text of {len(value)} characters, more than {_MAX_TEXT}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_BLOCKS if "depth" in name else _MAX_INTEGER
        if not -limit <= value <= limit:
            raise ValueError(f"{name}={str(value)[:40]} is beyond {limit}")


def is_plain(value: object) -> bool:
    """Whether a value is a JSON scalar or a list of such values."""
    if isinstance(value, list | tuple):
        return all(is_plain(item) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


def build_model(
    source: ModelSource,
    *,
    pretrained: bool,
    checkpoint: str | Path | None,
    model_kwargs: Mapping[str, Any],
    seed: int | None = None,
) -> nn.Module:
    """Create the model on the CPU with the weights asked for.

    A checkpoint with other names or
    shapes than the model's is offered to timm's own conversion of that architecture's released
    files (layouts of the original authors, position tables of another image size), which is
    strict.

    Args:
        source: The model, from :func:`scalekd.models.names.describe_model`.
        pretrained: Read the published weights; ignored when ``checkpoint`` is given.
        checkpoint: A safetensors or PyTorch file with the weights.
        model_kwargs: Arguments of the model's constructor, over those stored with the model.
        seed: For weights that stay random, leaving torch's generator untouched; by default they
            come from that generator.

    Raises:
        UsageError: The constructor refuses an argument, or the weights do not fit.
        DataError: The checkpoint cannot be read.
        EnvironmentFault: Published weights cannot be fetched.
    """
    kwargs = {k: v for k, v in model_kwargs.items() if v is not None}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if checkpoint is None:
            create = _create_pretrained if pretrained else _create_random
            return create(source, kwargs)
        state = read_state_dict(checkpoint)
        model = _create_random(source, kwargs)
        if not matches(model, state):
            return _convert(source, kwargs, model, state, checkpoint)
    load_exactly(model, state)
    return model


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What timm records about the pixels a model was trained on."""
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise UsageError(f"the model wants {len(mean)} colour channels; scalekd feeds it RGB")
    return Preprocessing(mean, std, str(config["interpolation"]), float(config["crop_pct"]))


def constructor_arguments(model_class: type[nn.Module]) -> list[str]:
    """Names of the arguments a model class takes, its bases' included when it passes them on."""
    names: dict[str, None] = {}
    for base in model_class.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        names.update(
            {
                p.name: None
                for p in parameters
                if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            }
        )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "self" and name not in _RESERVED_KWARGS]


def _create_random(source: ModelSource, kwargs: dict[str, Any]) -> nn.Module:
    return _create(source, kwargs, pretrained=False)


def _create_pretrained(source: ModelSource, kwargs: dict[str, Any]) -> nn.Module:
    on_disk = source.name.startswith("local-dir:")
    try:
        with contextlib.nullcontext() if on_disk else cached_only_when_unreachable():
            return _create(source, kwargs, pretrained=True)
    except (UsageError, EnvironmentFault):
        raise
    except RuntimeError as error:  # from timm or torch: no weights published, or they do not fit
        raise UsageError(
            f"the published weights of {source.label} do not load: {_first_line(error)}; pass "
            "weights on disk with --checkpoint FILE, or --no-pretrained for random ones"
        ) from error
    except Exception as error:  # each hub, HTTP and socket library has its own
        raise unreachable_weights(source.label, error) from error


def _create(source: ModelSource, kwargs: dict[str, Any], **factory: Any) -> nn.Module:
    """``timm.create_model``, with the constructor's refusals turned into usage errors."""
    try:
        model: nn.Module = timm.create_model(source.name, **factory, **kwargs)
    except TypeError as error:
        raise UsageError(_unexpected_argument(source, kwargs, error)) from error
    except (AssertionError, ValueError, KeyError, IndexError, ZeroDivisionError) as error:
        raise UsageError(
            f"{source.label} cannot be built with {_shown(kwargs)}: "
            f"{_first_line(error) or type(error).__name__}"
        ) from error
    return model


def _convert(
    source: ModelSource,
    kwargs: dict[str, Any],
    model: nn.Module,
    state: dict[str, Tensor],
    checkpoint: str | Path,
) -> nn.Module:
    overlay = {
        "state_dict": dict(state),
        "num_classes": getattr(model, "num_classes", 0),  # else timm drops the head it finds
        "source": "",
        "file": None,
        "custom_load": False,
        "label_offset": 0,
    }
    found = {name: tensor.to("meta") for name, tensor in state.items()}
    try:
        converted = _create(source, kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        differences = describe_mismatch(model.state_dict(), found)
        raise UsageError(
            f"--checkpoint {checkpoint} does not fit {source.label}: {differences}. Classes, image "
            "size and widths are set with --model-kwargs and --img-size"
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
        return f"{source.label} cannot be built with {_shown(kwargs)}: {_first_line(error)}"
    known = constructor_arguments(type(bare))
    unknown = [name for name in kwargs if name not in known]
    if not unknown:
        return f"{source.label} cannot be built with {_shown(kwargs)}: {_first_line(error)}"
    near = nearest_names(unknown[0], known)
    hint = f"did you mean {', '.join(near)}? It takes" if near else "it takes"
    return f"{source.label} has no argument {unknown[0]!r}; {hint}: {', '.join(known)}"


def _shown(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "its own arguments"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def create_on_meta(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a model without memory, from plain data alone and never with weights.

    Raises:
        UsageError: timm does not know the architecture, or it refuses the arguments.
    """
    check_model_kwargs(kwargs)
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {architecture!r}")
    source = ModelSource(architecture, architecture, architecture)
    return _create(source, dict(kwargs), pretrained=False, device="meta")
