"""Checks of constructor arguments of timm models: plain data of bounded size."""

import inspect
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Arguments of timm's factory that have their own options here, or that would change the type of the
# result; the constructor of a model takes none of them except the last three.
_RESERVED_KWARGS = frozenset(
    {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"}
    | {"pretrained_model_args", "checkpoint_path", "cache_dir", "features_only", "feature_cfg"}
    | {"feature_cls", "out_indices", "scriptable", "exportable", "no_jit", "pruned", "use_naflex"}
    | {"device", "dtype", "in_chans", "model_cfg", "kwargs_filter", "pretrained_filter_fn"}
)
# Above the needs of all timm models.
_MAX_ARGUMENTS = 64
_MAX_INTEGER = 1 << 20
MAX_TEXT = 200
_MAX_ITEMS = 256
# Far above any published backbone (40 blocks, 4096 channels, 21,841 classes, 1,024 px); they limit
# the Python objects and the time that a malicious configuration can require.
_MAX_SIZE = 1 << 16
_MAX_BLOCKS = 256
_MAX_ENTRIES = 64
_MAX_NAME = 64


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Check that arguments are plain data of bounded size and may be set by the user.

    Raises:
        ValueError: An argument is not allowed; the message names it and the allowed values.
    """
    if len(kwargs) > _MAX_ARGUMENTS:
        raise ValueError(f"{len(kwargs)} model arguments are more than any model has")
    for name, value in kwargs.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise ValueError(f"{name[:80]!r} is not the name of a model argument")
        if name in _RESERVED_KWARGS:
            raise ValueError(f"{name!r} cannot be set through model arguments")
        if not is_plain(value):
            raise ValueError(
                f"model argument {name}={repr(value)[:80]} must be null, a boolean, a finite "
                f"number of at most {_MAX_INTEGER:,}, a string of at most {MAX_TEXT} characters, "
                f"or a list of at most {_MAX_ITEMS} of these"
            )


def check_bounded(value: object, name: str = "") -> None:
    """Check that arguments from an untrusted file are within the bounds of real backbones.

    Args:
        value: Arguments by name, or the value of one argument.
        name: Name of the argument, for the message.

    Raises:
        ValueError: A value is beyond the bounds.
    """
    if isinstance(value, Mapping):
        if len(value) > _MAX_ENTRIES:
            raise ValueError(f"{len(value)} arguments are more than {_MAX_ENTRIES}")
        for key, item in value.items():
            check_bounded(item, str(key))
    elif isinstance(value, list | tuple):
        if len(value) > _MAX_ENTRIES:
            raise ValueError(f"{name} has {len(value)} entries, more than {_MAX_ENTRIES}")
        for item in value:
            check_bounded(item, name)
        if "depth" in name and sum(n for n in value if isinstance(n, int)) > _MAX_BLOCKS:
            raise ValueError(f"{name}={value} makes more than {_MAX_BLOCKS} blocks")
    elif isinstance(value, str) and len(value) > _MAX_NAME:
        raise ValueError(f"{name} is a text of {len(value)} characters, more than {_MAX_NAME}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_BLOCKS if "depth" in name else _MAX_SIZE
        if not -limit <= value <= limit:
            raise ValueError(f"{name}={str(value)[:40]} is beyond {limit}")


def is_plain(value: object, *, depth: int = 3) -> bool:
    """Return whether a value is a JSON scalar or a short list of such values."""
    if isinstance(value, list | tuple):
        return (
            depth > 0
            and len(value) <= _MAX_ITEMS
            and all(is_plain(item, depth=depth - 1) for item in value)
        )
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _MAX_INTEGER
    return isinstance(value, str) and len(value) <= MAX_TEXT


def constructor_arguments(model_class: "type[nn.Module]") -> list[str]:
    """Return the argument names of a model class, with those it passes on to its bases."""
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
