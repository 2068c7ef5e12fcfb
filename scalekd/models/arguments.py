"""Checks of constructor arguments of timm models: plain data of bounded size."""

import inspect
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator

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
# Far above any published backbone (40 blocks, 4,096 channels, 21,841 classes, 1,024 px); they limit
# the Python objects and the time that a malicious configuration can require.
_MAX_NUMBER = 1 << 16
_MAX_BLOCKS = 256
_MAX_ENTRIES = 64
MAX_TEXT = 200


def check_model_kwargs(kwargs: Mapping[str, Any]) -> None:
    """Check that arguments are plain data of bounded size and may be set by the user.

    Raises:
        ValueError: An argument is not allowed; the message names it and the allowed values.
    """
    for name in kwargs:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            raise ValueError(f"{name[:80]!r} is not the name of a model argument")
        if name in _RESERVED_KWARGS:
            raise ValueError(f"{name!r} cannot be set through model arguments")
        if isinstance(kwargs[name], Mapping):
            _check_value(name, kwargs[name])
    check_bounded(kwargs)


def _checked(kwargs: dict[str, Any]) -> dict[str, Any]:
    check_model_kwargs(kwargs)
    return kwargs


ModelKwargs = Annotated[dict[str, Any], AfterValidator(_checked)]
"""Constructor arguments in a record, checked by :func:`check_model_kwargs`."""


def check_bounded(values: Mapping[Any, Any]) -> None:
    """Check that values by name are plain data within the bounds of real backbones.

    Args:
        values: Configuration from a file of unknown origin; a value may be such a mapping.

    Raises:
        ValueError: A value is beyond the bounds; the message names it and the allowed values.
    """
    if len(values) > _MAX_ENTRIES:
        raise ValueError(f"{len(values)} arguments are more than {_MAX_ENTRIES}")
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_bounded(value)
        else:
            _check_value(str(name), value)


def _check_value(name: str, value: object) -> None:
    if not is_plain(value):
        raise ValueError(
            f"model argument {name[:80]}={repr(value)[:80]} must be null, a boolean, a finite "
            f"number of at most {_MAX_NUMBER:,}, a string of at most {MAX_TEXT} characters, "
            f"or a list of at most {_MAX_ENTRIES} of these"
        )
    if "depth" in name:
        counts = value if isinstance(value, list | tuple) else [value]
        if sum(abs(count) for count in counts if isinstance(count, int | float)) > _MAX_BLOCKS:
            raise ValueError(f"{name[:80]}={repr(value)[:80]} makes more than {_MAX_BLOCKS} blocks")


def is_plain(value: object, *, depth: int = 3) -> bool:
    """Return whether a value is a JSON scalar or a short list of such values."""
    if isinstance(value, list | tuple):
        return (
            depth > 0
            and len(value) <= _MAX_ENTRIES
            and all(is_plain(item, depth=depth - 1) for item in value)
        )
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) <= _MAX_NUMBER
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
