"""Export of a student to one ONNX file, for runtimes without timm and torch.

The graph takes a batch of any number of normalised images, of one size or of any size. The
normalisation is in the file's metadata and not in the graph, so that it can be done where images
are decoded.
"""

import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalekd import __version__
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.text import first_line, printable
from scalekd.training.trained import TrainedStudent

TOLERANCE = 1e-4
"""Largest accepted difference of an output, as a share of its largest value; the order of float32
sums differs. Five architectures of the paper's students stayed below 3e-6 (docs/LOG.md)."""

_OPSET = 20
_INPUT, _BATCH, _SIDES = "images", "batch", ("height", "width")
_CHECKED_BATCHES = (1, 3)  # one was not traced, to check that the batch axis is dynamic
_TRACED_BATCH = 2
# Pixels added to the sides for the check of a graph for any size: multiples of all strides.
_CHECKED_GROWTH = ((0, 0), (32, 64), (96, 32))
_NUM_MAPS_OF_ONE_STRIDE = 3  # timm's features_only gives as many of a ViT
_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Check that the packages that write and check ONNX files are installed.

    Raises:
        UsageError: A package is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx: {', '.join(missing)} not installed; `pip install 'scalekd[onnx]'`"
        )


@dataclass(frozen=True)
class Graph:
    """A student as it is written to ONNX.

    Attributes:
        model: The student's model, which accepts ``img_size``.
        img_size: Height and width of the images in pixels.
        any_size: Whether the graph accepts images of other sizes as well.
        num_maps: Number of feature maps that the graph returns after the first output.
    """

    model: nn.Module
    img_size: tuple[int, int]
    any_size: bool = False
    num_maps: int = 0

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: logits, or the pooled features of a headless student; then maps."""
        first = "logits" if getattr(self.model, "num_classes", 1) else "pooled"
        return [first, *(f"features_{index}" for index in range(self.num_maps))]

    def expected(self, images: Tensor) -> list[Tensor]:
        """Return the outputs that the file must reproduce, computed by the student's own model."""
        maps: Sequence[Tensor] = ()
        if self.num_maps:
            maps = self.model.forward_intermediates(  # type: ignore[operator]
                images, indices=self.num_maps, intermediates_only=True
            )
        return [self.model(images), *maps]


class _WithMaps(nn.Module):
    """A model that returns logits and its last maps from one pass, maps channels first."""

    def __init__(self, model: nn.Module, num_maps: int) -> None:
        super().__init__()
        self.model = model
        self.num_maps = num_maps

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        last, maps = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=self.num_maps
        )
        return (self.model.forward_head(last), *maps)  # type: ignore[operator]


def num_feature_maps(model: nn.Module) -> int:
    """Return the number of maps of an architecture: one per stride, or three of a ViT.

    Raises:
        UsageError: timm gives no feature maps of the architecture.
    """
    described: Any = getattr(model, "feature_info", None)
    if not described or not hasattr(model, "forward_intermediates"):
        raise UsageError(f"--features: timm gives no feature maps of a {type(model).__name__}")
    strides = {level["reduction"] for level in described}
    return len(strides) if len(strides) > 1 else min(_NUM_MAPS_OF_ONE_STRIDE, len(described))


def write_onnx(student: TrainedStudent, path: Path, graph: Graph | None = None) -> float:
    """Write a student, run the file with onnxruntime, and compare the outputs.

    Args:
        student: The student.
        path: Path of the file to write.
        graph: What to write; by default, the student's logits at its own image size.

    Returns:
        The largest difference of an output from torch's, as a share of the output's largest value.

    Raises:
        UsageError: torch cannot express the architecture in ONNX.
        EnvironmentFault: The outputs of the file differ, so it must not be used.
    """
    import onnx

    graph = graph or Graph(student.model, student.spec.img_size)
    model = graph.model.eval()
    axes: dict[int, Any] = {0: torch.export.Dim(_BATCH)}
    if graph.any_size:
        axes = dict(enumerate((_BATCH, None, *_SIDES)))
        del axes[1]
    try:
        # Below this level it reports what it leaves as it is.
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        program: Any = torch.onnx.export(
            _WithMaps(model, graph.num_maps).eval() if graph.num_maps else model,
            (_images(graph.img_size, _TRACED_BATCH),),
            input_names=[_INPUT],
            output_names=graph.outputs,
            opset_version=_OPSET,
            dynamo=True,
            dynamic_shapes=(axes,),
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, AssertionError) as error:
        raise _inexpressible(student, graph, error) from error
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata(student, graph))
    onnx.save(proto, path)
    growths = _CHECKED_GROWTH if graph.any_size else _CHECKED_GROWTH[:1]
    difference = max(
        _difference(graph, path, _images((graph.img_size[0] + down, graph.img_size[1] + right), n))
        for n in _CHECKED_BATCHES
        for down, right in growths
    )
    if not difference <= TOLERANCE:
        raise EnvironmentFault(
            f"{path}: onnxruntime's outputs differ from torch's by {difference:.2g} of the largest "
            f"value, more than {TOLERANCE:g}; nothing was kept. Please report this with the "
            "versions of torch, onnx and onnxruntime"
        )
    return difference


def _inexpressible(student: TrainedStudent, graph: Graph, error: Exception) -> UsageError:
    cause = error.__cause__ or error  # torch's own text only says at which step it failed
    sizes = " for images of any size; give --img-size HEIGHTxWIDTH" if graph.any_size else ""
    return UsageError(
        f"--format onnx: torch {torch.__version__} cannot express {student.spec.architecture} "
        f"in ONNX{sizes}: {printable(first_line(cause))}"
    )


def metadata(student: TrainedStudent, graph: Graph | None = None) -> dict[str, str]:
    """Return the metadata that describes inputs and outputs of the graph, as text."""
    spec = student.spec
    graph = graph or Graph(student.model, spec.img_size)
    facts: dict[str, Any] = {
        "architecture": spec.architecture,
        "producer": f"scalekd {__version__}",
        "input": "RGB, NCHW float32: (pixels / 255 - mean) / std",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "img_size": list(graph.img_size),
        "any_size": "yes" if graph.any_size else None,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "class_names": None if student.class_names is None else list(student.class_names),
        "features": _map_facts(graph) if graph.num_maps else None,
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
        if value is not None
    }


@torch.inference_mode()
def _map_facts(graph: Graph) -> list[dict[str, Any]]:
    maps = graph.expected(_images(graph.img_size, 1))[1:]
    return [
        {"name": name, "channels": m.shape[1], "stride": round(graph.img_size[0] / m.shape[2])}
        for name, m in zip(graph.outputs[1:], maps, strict=True)
    ]


def _images(img_size: tuple[int, int], batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *img_size, generator=generator)


@torch.inference_mode()
def _difference(graph: Graph, path: Path, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(graph.outputs, {_INPUT: images.numpy()})
    return max(
        _relative(torch.from_numpy(actual), expected)
        for actual, expected in zip(outputs, graph.expected(images), strict=True)
    )


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((actual - expected).abs().max()) / largest
