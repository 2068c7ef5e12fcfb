"""Opening of exported students as backbones, with a check of their weights.

timm and libraries that use it have several ways to open a folder that give random weights without
an error. The backbone opened here is compared with the folder's file, tensor by tensor.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scalekd.errors import DataError, UsageError
from scalekd.models.arguments import constructor_arguments
from scalekd.models.build import create_on_meta
from scalekd.models.names import describe_model
from scalekd.models.weights import is_computed

_WEIGHTS_FILE = "model.safetensors"
# Parts of the names of position tables, which timm resamples to other image sizes.
_RESIZED = ("pos_embed", "relative_position")
# Arguments with which timm's transformers accept images of any size; convolutions need none.
_ANY_SIZE: Mapping[str, Any] = {
    "dynamic_img_size": True,
    "dynamic_img_pad": True,
    "strict_img_size": False,
}


def any_size_arguments(architecture: str) -> dict[str, Any]:
    """Return the arguments with which timm builds an architecture for images of any size.

    The result is empty for models that always accept any size, and for those that cannot (Mixers).
    """
    known = constructor_arguments(type(create_on_meta(architecture, {})))
    return {name: value for name, value in _ANY_SIZE.items() if name in known}


def backbone_arguments(architecture: str) -> dict[str, Any]:
    """Return timm's arguments for a backbone with channels-first maps of images of any size."""
    arguments = any_size_arguments(architecture)
    model = create_on_meta(architecture, {})
    if str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):  # Swin
        arguments["feature_cls"] = "getter"
    return arguments


def load_backbone(
    folder: str | Path, *, out_indices: Sequence[int] | None = None, **arguments: Any
) -> nn.Module:
    """Open an exported student as a backbone that returns feature maps.

    Args:
        folder: Folder made by ``scalekd export --format timm`` or ``hf``.
        out_indices: Levels to return, coarsest last; ``None`` for all.
        arguments: Arguments of ``timm.create_model``, which override :func:`backbone_arguments`.

    Returns:
        A timm model that returns a list of maps ``(batch, channel, row, column)``, with
        ``feature_info``. (timm itself gives Swin's maps as ``(batch, row, column, channel)``.)

    Raises:
        UsageError: timm has no such mode for the architecture, or refuses an argument.
        DataError: The folder cannot be read, or the backbone does not have its weights.
    """
    path = Path(folder).expanduser().absolute()
    try:
        stored = load_file(path / _WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: is not the folder of an exported student: {error}") from error
    architecture = describe_model(f"local-dir:{path}").architecture
    chosen = {**backbone_arguments(architecture), **arguments}
    if out_indices is not None:
        if not out_indices or not all(type(index) is int for index in out_indices):
            raise UsageError(
                f"{path}: out_indices={out_indices!r} are no levels; give numbers such as (2, 3, 4)"
            )
        chosen["out_indices"] = tuple(out_indices)
    try:
        backbone: nn.Module = timm.create_model(
            f"local-dir:{path}", pretrained=True, features_only=True, **chosen
        )
    except IndexError as error:
        raise UsageError(
            f"{path}: {architecture} does not have all of the levels {chosen['out_indices']}; leave"
            " out out_indices for all that it has"
        ) from error
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: {architecture} does not open as a backbone: {error}") from error
    state = {name: t for name, t in backbone.state_dict().items() if not is_computed(name)}
    _compare(state, stored, where=str(path))  # with the statistics of batch norms
    return backbone


def check_weights(backbone: nn.Module, stored: Mapping[str, Tensor], *, where: str) -> None:
    """Compare the parameters of a backbone, which may be wrapped, with those of an export.

    Names may have prefixes (``backbone.model.``) and ``_`` instead of ``.``. Position tables that
    were resampled to another size are not compared.

    Args:
        backbone: The opened backbone.
        stored: The tensors of the export's ``model.safetensors``.
        where: Name of the export, for messages.

    Raises:
        DataError: A parameter differs, or is missing in the export.
    """
    _compare(dict(backbone.named_parameters()), stored, where=where)


def _compare(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor], *, where: str) -> None:
    by_name = {_plain(name): tensor for name, tensor in stored.items()}
    num_compared = 0
    for name, parameter in tensors.items():
        weights = next((by_name[n] for n in _endings(_plain(name)) if n in by_name), None)
        if weights is None:
            raise DataError(f"{where}: has no weights for {name} of the backbone")
        if weights.shape != parameter.shape:
            if any(part in name for part in _RESIZED):
                continue
            raise DataError(
                f"{where}: {name} of the backbone has shape {tuple(parameter.shape)}, the "
                f"student's {tuple(weights.shape)}; the weights were not loaded"
            )
        if not torch.equal(weights.to(parameter.dtype), parameter.detach().cpu()):
            raise DataError(
                f"{where}: {name} of the backbone is not the student's; the weights were not loaded"
            )
        num_compared += 1
    if not num_compared:
        raise DataError(f"{where}: no parameter of the backbone could be compared")


def _plain(name: str) -> str:
    return re.sub(r"[._]", ".", name)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
