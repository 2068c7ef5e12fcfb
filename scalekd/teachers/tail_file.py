"""A tail as one safetensors file: its tensors, and its configuration as JSON in the header.

Tail files are part of caches and are not trusted. Reading one does not unpickle and does not
download; it only builds timm backbones of the known families, from plain arguments, and allocates
no tail before names, dtypes and shapes in the file's header match its configuration.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.torch import load, save
from timm.models import is_model_in_modules
from torch import Tensor

from scalekd.errors import CacheCorrupt, EnvironmentFault, ScaleKDError
from scalekd.models.arguments import check_bounded, constructor_arguments
from scalekd.models.weights import describe_mismatch
from scalekd.teachers.families import FAMILIES
from scalekd.teachers.tail import NO_PREFIX, Tail, TailConfig

_METADATA_KEY = "scalekd_tail"
_TYPES = ("F16", "BF16", "F32", "F64")
_MAX_HEADER_BYTES = 1 << 20  # the header of Swin-L's tail has 5 kB
_MAX_TABLE_BYTES = 1 << 30  # computed tables; the largest real one, 37 x 37 tokens, is 15 MB


def save_tail(tail: Tail, path: str | Path) -> None:
    """Write a tail file. Tensors that float16 represents exactly are stored in float16.

    Raises:
        ValueError: The tail needs constant prefix tokens and has none.
        EnvironmentFault: The file cannot be written.
    """
    if tail.num_prefix_tokens and tail.prefix_tokens is None:
        raise ValueError(NO_PREFIX)
    tensors = {name: _smallest(tensor) for name, tensor in tail.state_dict().items()}
    metadata = {_METADATA_KEY: json.dumps(tail.config.model_dump(mode="json"), sort_keys=True)}
    try:  # not save_file, whose files only their owner can read
        Path(path).write_bytes(save(tensors, metadata=metadata))
    except OSError as error:
        raise EnvironmentFault(f"cannot write the tail file {path}: {error}") from error


def load_tail(path: str | Path) -> Tail:
    """Read a tail file into a tail on the CPU, in float32 or float64, without building the teacher.

    Raises:
        CacheCorrupt: The file is missing, damaged, not a tail, or has implausible values.
    """
    with _reporting(path):
        content = Path(path).read_bytes()
    return load_tail_bytes(content, str(path))


def load_tail_bytes(content: bytes, path: str) -> Tail:
    """Read a tail from the content of its file; ``path`` is its name, for messages.

    Raises:
        CacheCorrupt: The content is invalid; see :func:`load_tail`.
    """
    tail = inspect_tail(content, path)
    with _reporting(path):
        state = load(content)
        tail = tail.allocated()
        if any(tensor.dtype == torch.float64 for tensor in state.values()):
            tail.double()
        tail.load_state_dict(state)
    return tail


def inspect_tail(content: bytes, path: str) -> Tail:
    """Check the content of a tail file without allocating the tail.

    Args:
        content: The whole content of the file.
        path: Name of the file, for messages.

    Returns:
        The tail on torch's meta device, with its configuration and its shapes.

    Raises:
        CacheCorrupt: The content is invalid; see :func:`load_tail`.
    """
    with _reporting(path):
        length = int.from_bytes(content[:8], "little")
        if length > _MAX_HEADER_BYTES:
            raise CacheCorrupt("it is not a safetensors file")
        # Checks types, shapes and offsets.
        stored = dict(deserialize(content))  # type: ignore[no-untyped-call]
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        tail = Tail.on_meta(_config_of(metadata))
        shape = tail.stages[3]
        if shape.num_prefix_tokens:
            tail.prefix_tokens = torch.empty(
                shape.num_prefix_tokens, shape.num_channels, device="meta"
            )
        _check_header(tail, {name: (t["dtype"], t["shape"]) for name, t in stored.items()})
        _check_tables(tail)
        return tail


def _smallest(tensor: Tensor) -> Tensor:
    """Convert a tensor to float16 if that is exact, as for weights published in float16."""
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
    try:
        check_bounded(config.model_dump())
    except ValueError as error:
        raise CacheCorrupt(str(error)) from None
    family = FAMILIES[config.family]
    if not is_model_in_modules(config.architecture, family.modules):
        raise CacheCorrupt(
            f"{config.architecture!r} is not a timm backbone of family {config.family}"
        )
    known = {name for cls in family.model_classes for name in constructor_arguments(cls)}
    if unknown := sorted(set(config.model_kwargs) - known):
        raise CacheCorrupt(f"{config.architecture} has no argument {unknown[0]!r}")
    return config


def _check_header(tail: Tail, header: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Compare names, shapes and dtypes in the header with those of the configuration."""
    expected = tail.state_dict()
    stored = {name: torch.empty(shape, device="meta") for name, (_, shape) in header.items()}
    if differences := describe_mismatch(expected, stored):
        raise CacheCorrupt(f"its tensors are not those of its configuration: {differences}")
    for name, (dtype, _) in header.items():
        if dtype not in _TYPES:
            raise CacheCorrupt(f"{name} is of type {dtype}; a tail may contain {', '.join(_TYPES)}")


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
    """Turn every error into a CacheCorrupt that names the file."""
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
