"""Export of trained students to folders and files that open without ``scalekd``.

An export is read back before it gets its final name, and its outputs must equal those of the
student.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.export.backbone import any_size_arguments
from scalekd.export.card import write_model_card
from scalekd.export.onnx import Graph, num_feature_maps, require_onnx, write_onnx
from scalekd.models.architectures import import_for
from scalekd.models.arguments import constructor_arguments
from scalekd.storage.files import temporary_path
from scalekd.text import first_line
from scalekd.training.state import plain_names
from scalekd.training.trained import TrainedStudent
from scalekd.views import pillow_name

ExportFormat = Literal["timm", "hf", "safetensors", "onnx"]

_PARITY_BATCH = 2
_WEIGHTS_FILE = "model.safetensors"
_ONNX_FILE = "model.onnx"
# Arguments of training, not of the model.
_TRAINING_ARGUMENTS = frozenset({"drop_rate", "drop_path_rate", "proj_drop_rate", "attn_drop_rate"})
# Fields in which timm describes the pretrained weights, which have changed.
_FOREIGN = (
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "state_dict",
    "architecture",
    "tag",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
    "license",
    "label_offset",
    "label_names",
    "label_descriptions",
    "test_input_size",
    "test_crop_pct",
    "pool_size",
    "custom_load",
)


@dataclass(frozen=True)
class Exported:
    """Description of an export and of its check.

    Attributes:
        output: Path of the folder or file.
        format: What was written.
        architecture: Name of the student's architecture in timm.
        num_classes: Number of classes of the student.
        num_parameters: Number of parameters of the student.
        feature_channels: Channels of the maps of ``features_only=True``, coarsest last; ``None`` if
            timm has no such mode for the architecture, and for an ONNX file.
        difference: Largest difference between outputs of the export and of the student, as a share
            of the largest value; 0 for all formats but ONNX.
        notes: Lines about properties of the student that the format cannot express.
    """

    output: str
    format: ExportFormat
    architecture: str
    num_classes: int
    num_parameters: int
    feature_channels: tuple[int, ...] | None
    difference: float = 0.0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the lines to print."""
        check = "outputs identical when opened with timm"
        if self.format == "onnx":
            check = f"outputs within {self.difference:.1g} of the largest when run by onnxruntime"
        classes = f"{self.num_classes} classes" if self.num_classes else "no classifier"
        lines = [
            f"{self.output}: {self.architecture}, {self.num_parameters:,} parameters, "
            f"{classes}; {check}"
        ]
        if self.feature_channels is not None:
            widths = ", ".join(map(str, self.feature_channels))
            lines.append(f"as a backbone (features_only=True): maps of {widths} channels")
        needed = import_for(self.architecture)
        if needed is not None and self.format in ("timm", "hf"):
            lines.append(f"timm has no {self.architecture}: `{needed}` before opening it")
        return [*lines, *self.notes]


def export_student(
    student: TrainedStudent,
    output: Path,
    *,
    export_format: ExportFormat = "timm",
    img_size: tuple[int, int] | Literal["any"] | None = None,
    features: bool = False,
) -> Exported:
    """Write a student in a format, check the export, and then rename it to its final name.

    Args:
        student: Student from `load_trained_student`.
        output: Folder for ``timm`` and ``hf``, file for the others; it must not exist.
        export_format: ``"timm"``: ``config.json`` and ``model.safetensors``, which
            ``timm.create_model("local-dir:DIR", pretrained=True)`` opens; ``"hf"``: the same with
            a model card; ``"safetensors"``: the bare weights under timm's names; ``"onnx"``: see
            `scalekd.export.onnx`.
        img_size: Height and width of an ONNX file's images, ``"any"`` for a file that accepts all
            sizes, or ``None`` for the student's size.
        features: Whether an ONNX file also returns feature maps.

    Raises:
        UsageError: ``output`` exists, an option does not fit the format or the architecture, or
            ONNX is not installed or cannot express the student.
        EnvironmentFault: The export cannot be written, or differs when it is read back.
    """
    if output.exists():
        raise UsageError(f"{output}: exists already; choose another --output")
    if export_format == "onnx":
        require_onnx()
    elif img_size is not None or features:
        raise UsageError(
            f"{'--features' if img_size is None else '--img-size'}: is for --format onnx; folders "
            "of the other formats open at other sizes and with features_only=True"
        )
    channels, difference = None, 0.0
    try:
        with temporary_path(output.absolute()) as temporary:
            temporary.mkdir(parents=True)
            if export_format == "onnx":
                graph = _graph(student, temporary, img_size, features=features)
                difference = write_onnx(student, temporary / _ONNX_FILE, graph)
            else:
                channels = _write_timm(student, temporary)
            if export_format == "hf":
                write_model_card(student, temporary)
            single = {"onnx": _ONNX_FILE, "safetensors": _WEIGHTS_FILE}.get(export_format, "")
            (temporary / single).rename(output)
    except OSError as error:
        raise EnvironmentFault(f"{output}: cannot be written: {error}") from error
    return Exported(
        output=str(output),
        format=export_format,
        architecture=student.spec.architecture,
        num_classes=student.spec.num_classes,
        num_parameters=sum(parameter.numel() for parameter in student.model.parameters()),
        feature_channels=channels,
        difference=difference,
        notes=_notes(student) if export_format in ("timm", "hf") else (),
    )


def _notes(student: TrainedStudent) -> tuple[str, ...]:
    here = student.spec.interpolation
    there = pillow_name(here)
    if here == there:
        return ()
    return (
        f"timm has no {here} filter: config.json names {there}, with antialiasing, so scores of the"
        " folder differ a little from those of the run",
    )


def _graph(
    student: TrainedStudent,
    folder: Path,
    img_size: tuple[int, int] | Literal["any"] | None,
    *,
    features: bool,
) -> Graph:
    """Return what to write to ONNX; at another size, timm opens the student again in ``folder``."""
    model, size = student.model, student.spec.img_size
    if img_size is not None and img_size != size:
        _write_timm(student, folder)
        known = constructor_arguments(type(model))
        arguments = any_size_arguments(student.spec.architecture)
        if img_size != "any":
            size = img_size
            # Position tables are then resampled once, and not in every run of the graph.
            if "strict_img_size" not in arguments:
                arguments = {"img_size": size} if "img_size" in known else {}
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).eval()
            with torch.inference_mode():
                model(torch.zeros(1, 3, *size))
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise UsageError(
                f"--img-size: {student.spec.architecture} does not accept images of {size[0]} x "
                f"{size[1]} pixels: {first_line(error)}"
            ) from error
    num_maps = num_feature_maps(model) if features else 0
    return Graph(model, size, any_size=img_size == "any", num_maps=num_maps)


def _write_timm(student: TrainedStudent, folder: Path) -> tuple[int, ...] | None:
    """Write and check weights and configuration; return the result of `check_parity`."""
    state = {
        name: tensor.contiguous()
        for name, tensor in plain_names(student.model.state_dict()).items()
    }
    save_file(state, folder / _WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / _WEIGHTS_FILE).chmod(0o644)
    config = json.dumps(timm_config(student), indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    return check_parity(student, folder)


def timm_config(student: TrainedStudent) -> dict[str, Any]:
    """Return the ``config.json`` of timm's Hugging Face layout for a student."""
    model, spec = student.model, student.spec
    arguments = {k: v for k, v in spec.model_kwargs.items() if k not in _TRAINING_ARGUMENTS}
    inherited: Mapping[str, Any] = getattr(model, "pretrained_cfg", {}) or {}
    pretrained_cfg = {
        name: value
        for name, value in inherited.items()
        if name not in _FOREIGN and value is not None
    }
    pretrained_cfg |= {
        "custom_load": False,
        "input_size": [3, *spec.img_size],
        "interpolation": pillow_name(spec.interpolation),
        "crop_pct": spec.crop_pct,
        "crop_mode": "center",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": spec.num_classes,
        "pool_size": None,
    }
    config: dict[str, Any] = {
        "architecture": spec.architecture,
        "num_classes": spec.num_classes,
        "num_features": getattr(model, "num_features", None),
        "model_args": arguments,  # transformers passes num_classes itself, and refuses it twice
        "pretrained_cfg": pretrained_cfg,
    }
    if student.class_names is not None and len(student.class_names) == spec.num_classes:
        config["label_names"] = list(student.class_names)
    return config


@torch.inference_mode()
def check_parity(student: TrainedStudent, folder: Path) -> tuple[int, ...] | None:
    """Open a timm folder with timm, and check that logits and feature maps are identical.

    Returns:
        Channels of the ``features_only`` maps, or ``None`` if timm has none for the architecture.

    Raises:
        EnvironmentFault: The outputs differ.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_PARITY_BATCH, 3, *student.spec.img_size, generator=generator)
    name = f"local-dir:{folder.absolute()}"
    reopened = timm.create_model(name, pretrained=True).eval()
    model = student.model.eval()
    _require_equal(reopened(images), model(images), f"{folder}: logits")
    try:
        backbone: Any = timm.create_model(name, pretrained=True, features_only=True).eval()
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError):
        return None  # a limit of the architecture, also for timm's published weights
    maps = backbone(images)
    channels = tuple(int(number) for number in backbone.feature_info.channels())
    expected = model.forward_intermediates(  # type: ignore[operator]
        images, indices=len(channels), intermediates_only=True
    )
    for actual, want in zip(maps, expected, strict=True):
        channels_first = actual.permute(0, 3, 1, 2)  # some architectures give NHWC maps
        same = channels_first.shape == want.shape and torch.equal(channels_first, want)
        _require_equal(channels_first if same else actual, want, f"{folder}: feature maps")
    return channels


def _require_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.shape != expected.shape or not torch.equal(actual, expected):
        raise EnvironmentFault(
            f"{what} of the exported student differ from the trained one's (shapes "
            f"{tuple(actual.shape)} and {tuple(expected.shape)}); nothing was kept. Please report "
            "this with the versions of timm and torch"
        )
