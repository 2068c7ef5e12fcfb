"""Export of a student to one ONNX file, for runtimes without timm and torch.

The graph takes a batch of any number of normalised images of one size. The normalisation is in the
file's metadata and not in the graph, so that it can be done where images are decoded.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from scalekd import __version__
from scalekd.errors import EnvironmentFault, UsageError
from scalekd.training.trained import TrainedStudent

TOLERANCE = 1e-4
"""Largest accepted difference of a logit, as a share of the largest one; the order of float32 sums
differs. Five architectures of the paper's students stayed below 3e-6 (docs/LOG.md)."""

_OPSET = 20
_INPUT, _OUTPUT, _BATCH = "images", "logits", "batch"
_CHECKED_BATCHES = (1, 3)  # one was not traced, to check that the batch axis is dynamic
_TRACED_BATCH = 2
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


def write_onnx(student: TrainedStudent, path: Path) -> float:
    """Write a student, run the file with onnxruntime, and compare the logits.

    Args:
        student: The student; the graph is for its image size.
        path: Path of the file to write.

    Returns:
        The largest difference of a logit from torch's, as a share of the largest logit.

    Raises:
        UsageError: torch cannot express the architecture in ONNX.
        EnvironmentFault: The logits of the file differ, so it must not be used.
    """
    import onnx

    model = student.model.eval()
    images = _images(student, _TRACED_BATCH)
    try:
        program: Any = torch.onnx.export(
            model,
            (images,),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            opset_version=_OPSET,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim(_BATCH)},),
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--format onnx: torch {torch.__version__} cannot express {student.spec.architecture} "
            f"in ONNX: {reason[:300]}"
        ) from error
    proto = program.model_proto
    onnx.helper.set_model_props(proto, metadata(student))
    onnx.save(proto, path)
    difference = max(_difference(student, path, batch) for batch in _CHECKED_BATCHES)
    if not difference <= TOLERANCE:
        raise EnvironmentFault(
            f"{path}: onnxruntime's logits differ from torch's by {difference:.2g} of the largest, "
            f"more than {TOLERANCE:g}; nothing was kept. Please report this with the versions of "
            "torch, onnx and onnxruntime"
        )
    return difference


def metadata(student: TrainedStudent) -> dict[str, str]:
    """Return the metadata that describes inputs and outputs of the graph, as text."""
    spec = student.spec
    facts: dict[str, Any] = {
        "architecture": spec.architecture,
        "producer": f"scalekd {__version__}",
        "input": "RGB, NCHW float32: (pixels / 255 - mean) / std",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "img_size": list(spec.img_size),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "class_names": None if student.class_names is None else list(student.class_names),
    }
    return {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in facts.items()
        if value is not None
    }


def _images(student: TrainedStudent, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, *student.spec.img_size, generator=generator)


@torch.inference_mode()
def _difference(student: TrainedStudent, path: Path, batch: int) -> float:
    import onnxruntime

    images = _images(student, batch)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    actual = torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])
    expected = student.model(images)
    largest = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return float((actual - expected).abs().max()) / largest
