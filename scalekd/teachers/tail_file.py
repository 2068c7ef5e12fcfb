"""A tail as one safetensors file: its tensors, and its configuration as JSON in the header.

Tail files travel with caches and are not trusted. Reading one never unpickles and never
downloads; it builds nothing but timm backbones of the known families, from plain arguments, and
takes no memory before names, dtypes and shapes in the file's header are those the configuration
leads to.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models import is_model_in_modules
from torch import Tensor

from scalekd.errors import CacheCorrupt, EnvironmentFault, ScaleKDError
from scalekd.models.build import constructor_arguments
from scalekd.models.weights import describe_mismatch
from scalekd.teachers.families import FAMILIES
from scalekd.teachers.tail import Tail, TailConfig

_METADATA_KEY = "scalekd_tail"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# Far above any published backbone (40 blocks, 4096 channels, 21,841 classes, 1,024 px); they bound
# the Python objects that a hostile configuration can ask for.
_MAX_INTEGER = 1 << 16
_MAX_BLOCKS = 256
_MAX_LIST = 64
_MAX_TEXT = 64
_MAX_TABLE_BYTES = 1 << 30  # computed tables; the largest real one, 37 x 37 tokens, is 15 MB


def save_tail(tail: Tail, path: str | Path) -> None:
    """Write a tail. Tensors that lose nothing in float16 are stored so.

    Raises:
        ValueError: The tail needs constant prefix tokens and has none.
        EnvironmentFault: The file cannot be written.
    """
    if tail.num_prefix_tokens and tail.prefix_tokens is None:
        raise ValueError(
            "the tail's constant prefix tokens were never set: call "
            "teacher.calibrate_prefix(stage-3 features) before teacher.tail()"
        )
    tensors = {name: _smallest(tensor) for name, tensor in tail.state_dict().items()}
    metadata = {_METADATA_KEY: json.dumps(tail.config.model_dump(mode="json"), sort_keys=True)}
    try:  # through bytes, because save_file makes files that only their owner can read
        Path(path).write_bytes(save(tensors, metadata=metadata))
    except OSError as error:
        raise EnvironmentFault(f"cannot write the tail file {path}: {error}") from error


def load_tail(path: str | Path) -> Tail:
    """Read a tail without building the teacher it was cut from. On the CPU, float32 or float64.

    Raises:
        CacheCorrupt: No such file, or it is damaged, or not a tail, or asks for what no tail needs.
    """
    with _reporting(path), safe_open(str(path), framework="pt", device="cpu") as file:
        config = _config_of(file.metadata() or {})
        tail = Tail.on_meta(config)
        shape = tail.stages[3]
        if shape.num_prefix_tokens:
            tail.prefix_tokens = torch.empty(
                shape.num_prefix_tokens, shape.num_channels, device="meta"
            )
        names = list(file.keys())
        _check_header(tail, {name: file.get_slice(name) for name in names})
        _check_tables(tail)
        tail.allocated()
        state = {name: file.get_tensor(name) for name in names}
        if any(tensor.dtype == torch.float64 for tensor in state.values()):
            tail.double()
        tail.load_state_dict(state)
    return tail


def _smallest(tensor: Tensor) -> Tensor:
    """The tensor in float16 where that is exact, as it is for weights published in float16."""
    tensor = tensor.detach().to("cpu").contiguous().clone()
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(torch.float16)
    return half if torch.equal(half.to(torch.float32), tensor) else tensor


def _config_of(metadata: Mapping[str, str]) -> TailConfig:
    if _METADATA_KEY not in metadata:
        raise CacheCorrupt(f"its header has no {_METADATA_KEY!r} entry, so it is not a tail")
    try:
        config = TailConfig.model_validate_json(metadata[_METADATA_KEY])
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise CacheCorrupt(
            f"its configuration is not valid at {where!r}: {fault['msg']}"
        ) from error
    _check_bounds("", config.model_dump())
    family = FAMILIES[config.family]
    if not is_model_in_modules(config.architecture, family.modules):
        raise CacheCorrupt(f"{config.architecture!r} is no timm backbone of family {config.family}")
    known = {name for cls in family.model_classes for name in constructor_arguments(cls)}
    if unknown := sorted(set(config.model_kwargs) - known):
        raise CacheCorrupt(f"{config.architecture} has no argument {unknown[0]!r}")
    return config


def _check_bounds(name: str, value: object) -> None:
    """Refuse numbers, lists and texts that no backbone has."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_bounds(str(key), item)
    elif isinstance(value, list | tuple):
        if len(value) > _MAX_LIST:
            raise CacheCorrupt(f"{name} has {len(value)} entries, more than {_MAX_LIST}")
        for item in value:
            _check_bounds(name, item)
        if "depth" in name and sum(n for n in value if isinstance(n, int)) > _MAX_BLOCKS:
            raise CacheCorrupt(f"{name}={value} makes more than {_MAX_BLOCKS} blocks")
    elif isinstance(value, str) and len(value) > _MAX_TEXT:
        raise CacheCorrupt(f"{name} is a text of {len(value)} characters, more than {_MAX_TEXT}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        limit = _MAX_BLOCKS if "depth" in name else _MAX_INTEGER
        if not -limit <= value <= limit:
            raise CacheCorrupt(f"{name}={value} is beyond {limit}")


def _check_header(tail: Tail, slices: Mapping[str, Any]) -> None:
    """Compare names, shapes and dtypes in the header with those the configuration leads to."""
    expected = tail.state_dict()
    found = {name: torch.empty(entry.get_shape(), device="meta") for name, entry in slices.items()}
    if differences := describe_mismatch(expected, found):
        raise CacheCorrupt(f"its tensors are not those of its configuration: {differences}")
    for name, entry in slices.items():
        if entry.get_dtype() not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise CacheCorrupt(f"{name} is of type {entry.get_dtype()}; a tail holds {known}")


def _check_tables(tail: Tail) -> None:
    stored = set(tail.state_dict())
    tables = {n: b for n, b in tail.named_buffers() if n not in stored}
    num_bytes = sum(b.numel() * b.element_size() for b in tables.values())
    if num_bytes > _MAX_TABLE_BYTES:
        raise CacheCorrupt(
            f"its position tables would take {num_bytes / 2**30:.1f} GiB; the image size "
            f"{tail.config.img_size} is not plausible"
        )


@contextlib.contextmanager
def _reporting(path: str | Path) -> Iterator[None]:
    """Name the file in every complaint, and let no other kind of error out of a hostile one."""
    try:
        yield
    except ScaleKDError as error:
        raise CacheCorrupt(f"tail file {path}: {error}") from error
    except FileNotFoundError as error:
        raise CacheCorrupt(f"tail file {path} is missing") from error
    except SafetensorError as error:
        raise CacheCorrupt(f"tail file {path} is not a sound safetensors file: {error}") from error
    except Exception as error:
        raise CacheCorrupt(
            f"tail file {path} cannot be rebuilt: {type(error).__name__}: {error}"
        ) from error
