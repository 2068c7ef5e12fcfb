"""Reading of weights from a file, without running code that the file contains.

A checkpoint is a safetensors file, or a PyTorch file read with ``weights_only=True``. Its names and
shapes must be those of the model; an error lists the differences.
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from scalekd.errors import DataError, UsageError
from scalekd.text import first_line

# Tables that models compute from their own configuration; old checkpoints stored them.
_COMPUTED_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_MAX_LISTED = 6
# File names in timm's order of preference.
_WEIGHTS_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)


class _Ignored:
    """Placeholder of a harmless object beside the tensors; has no behaviour and no content."""

    def __init__(self, *arguments: object) -> None:
        del arguments

    def __setstate__(self, state: object) -> None:
        del state


# What training scripts (timm's train.py, torchvision's references, plain loops) save beside the
# tensors: settings, dates and NumPy numbers. None of the real classes is ever called.
_IGNORED_NAMES = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors; an averaged (EMA) set is preferred if the file has one.

    Prefixes left by ``torch.compile`` and DDP are removed.

    Raises:
        UsageError: The file does not exist.
        DataError: The file is damaged, needs unpickling, or contains no named tensors.
    """
    from timm.models import clean_state_dict

    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--checkpoint {path}: there is no such file")
    try:
        if file.suffix == ".safetensors" or _has_safetensors_header(file):
            state: Any = load_file(file)
        else:
            state = _named_tensors(load_plain_tensors(file))
        state = clean_state_dict(state)
    except Exception as error:
        raise DataError(
            f"--checkpoint {path} is damaged, or contains pickled objects besides tensors that are "
            "never loaded; timm's clean_checkpoint.py, or save_file of safetensors, writes the "
            f"tensors alone ({first_line(error, limit=160)})"
        ) from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DataError(f"--checkpoint {path} contains no named tensors")
    return {name: value for name, value in tensors.items() if not is_computed(name)}


def _has_safetensors_header(file: Path) -> bool:
    """Whether a file of any name begins like safetensors: a JSON object after its length."""
    with file.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size


def weights_in(folder: Path) -> Path:
    """Return the path of the weights in a folder that timm exported.

    Raises:
        DataError: The folder has no file of weights.
    """
    for name in _WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    for ending in (".safetensors", ".pth", ".pth.tar", ".bin"):
        for path in sorted(folder.glob(f"*{ending}")):
            return path
    raise DataError(f"{folder}: has no file of weights, such as {_WEIGHTS_NAMES[0]}")


@contextlib.contextmanager
def only_tensors_unpickled() -> Iterator[None]:
    """Make every ``torch.load`` inside the block read only tensors, in any library."""
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a safetensors file, without tensors.

    Raises:
        SafetensorError: The file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_plain_tensors(path: Path) -> Any:
    """Read a file of ``torch.save`` without running code that it contains.

    Tensors, numbers, text and containers are returned; settings, dates and NumPy values become
    empty objects; other content is refused.

    Raises:
        ValueError: The content would need more memory than the file has bytes.
        Exception: Any error of torch for a damaged file or a pickled object.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("its parts are larger than the file (compressed or overlapping)")
    ignored = [(_Ignored, name) for name in _IGNORED_NAMES]
    with torch.serialization.safe_globals([_Ignored, *ignored]):
        content = torch.load(path, map_location="cpu", weights_only=True)
    for tensor in _tensors_in(content):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError("it contains a sparse or quantised tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError("it contains a tensor that is larger than its bytes")
    return content


def _tensors_in(content: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)


def _named_tensors(content: Any) -> Any:
    """Return the state dict in a training script's file, preferably the averaged one."""
    if not isinstance(content, Mapping):
        raise ValueError(f"a {type(content).__name__} instead of named tensors")
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            return content[key]
    return content


def describe_mismatch(expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """List the names and shapes in which two state dicts differ, a few of each kind."""
    want, have = _shapes(expected), _shapes(stored)
    missing = [f"{name} {want[name]}" for name in want if name not in have]
    extra = [f"{name} {have[name]}" for name in have if name not in want]
    other = [
        f"{name} {have[name]} in the file, {want[name]} in the model"
        for name in want
        if name in have and want[name] != have[name]
    ]
    kinds = [("only in the model", missing), ("only in the file", extra), ("shapes differ", other)]
    return "; ".join(f"{kind}: {_listed(names)}" for kind, names in kinds if names)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``; names and shapes must have been checked."""
    with torch.no_grad():
        model.load_state_dict(
            {**{n: b for n, b in model.state_dict().items() if is_computed(n)}, **state}
        )


def is_computed(name: str) -> bool:
    """Return whether a buffer is computed by the model, and not part of its weights."""
    return name.rpartition(".")[2] in _COMPUTED_BUFFERS


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in state.items() if not is_computed(name)}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names, dtypes, shapes and little-endian bytes, sorted by name.

    It depends on the values of the weights, not on their file.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
