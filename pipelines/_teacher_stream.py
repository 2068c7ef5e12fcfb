"""Run the teacher on batches, with asynchronous copies on an accelerator.

On an accelerator, pixels are copied from pinned memory, features are encoded on the device, and the
encoded integers are copied back on a separate stream while the next batch is computed. The caller
takes a batch's result after starting the next batch (:attr:`TeacherStream.num_behind`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scalekd.cache.codecs import CacheCodecs
from scalekd.codecs.encoder import Encoding, FeatureEncoder, settled
from scalekd.errors import DataError
from scalekd.teachers import Teacher, TeacherOutput

Planes = dict[str, np.ndarray[Any, Any]]
EncoderName = Literal["numpy", "torch"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherArrays:
    """A teacher's output on the host, float32."""

    features: dict[int, np.ndarray[Any, Any]]
    logits: np.ndarray[Any, Any] | None


@dataclass(frozen=True)
class HostBatch:
    """A batch's targets on the host.

    Attributes:
        features: Features by stage, ``(view, token, channel)``: float32 arrays, or tensors in the
            model's output type.
        logits: Logits, ``(view, class)``: a float32 array, or a tensor in the model's output type.
        planes: For each stage encoded on the device, a function that returns its planes or raises
            ``DataError``.
    """

    features: Mapping[int, np.ndarray[Any, Any] | Tensor] = field(default_factory=dict)
    logits: np.ndarray[Any, Any] | Tensor | None = None
    planes: Mapping[int, Callable[[], Planes]] = field(default_factory=dict)


def default_encoder(device: torch.device) -> EncoderName:
    """Return ``torch`` for GPUs, which encode faster than all cores; ``numpy`` otherwise.

    NumPy's encoder takes a half to three quarters of torch's time on a CPU.
    """
    return "torch" if device.type == "cuda" else "numpy"


def teacher_outputs(teacher: Teacher, pixels: Tensor, precision: str) -> TeacherOutput:
    """Run one forward pass in ``precision``; ``pixels`` are on the teacher's device."""
    device = teacher.device
    autocast = torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    with torch.inference_mode(), autocast:
        output: TeacherOutput = teacher(pixels)
    return output


def as_array(values: np.ndarray[Any, Any] | Tensor) -> np.ndarray[Any, Any]:
    """Convert to a float32 array on the host."""
    return values.float().numpy() if isinstance(values, Tensor) else values


class TeacherStream:
    """Runs the teacher and the device encoders.

    Args:
        teacher: Teacher; batches are processed asynchronously if it is on a GPU.
        codecs: Codecs of the cache.
        precision: Arithmetic precision of the teacher.
        batch_size: Maximum number of views in a batch.
        encoder: Implementation that encodes features.
        run: Returns a batch's output on the host; used if the teacher is on a CPU.
    """

    def __init__(
        self,
        teacher: Teacher,
        codecs: CacheCodecs,
        precision: str,
        batch_size: int,
        encoder: EncoderName,
        run: Callable[[Tensor], TeacherArrays],
    ) -> None:
        self._teacher = teacher
        self._precision = precision
        self._run = run
        self._device = teacher.device
        self._stages = tuple(codecs.stages)
        self._keeps_logits = codecs.logits is not None
        self._encoders: dict[int, FeatureEncoder] = {}
        if encoder == "torch":
            made = {stage: codec.encoder(batch_size) for stage, codec in codecs.stages.items()}
            self._encoders = {s: e.to(self._device) for s, e in made.items() if e is not None}
        self._is_asynchronous = self._device.type == "cuda"
        if self._is_asynchronous:
            self._copying_in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._copying_out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def num_behind(self) -> int:
        """Number of further batches to start before taking the result of the first."""
        return int(self._is_asynchronous)

    def start(self, pixels: Tensor) -> Callable[[], HostBatch]:
        """Start a batch.

        Args:
            pixels: uint8 ``(view, 3, height, width)`` on the host. The caller may reuse the
                buffer at once.

        Returns:
            A function that waits for the batch and returns its output.
        """
        if not self._stages and not self._keeps_logits:  # only the views are kept
            return HostBatch
        if self._is_asynchronous:
            return self._start_on_device(pixels)
        output = self._run(pixels)
        if not self._encoders:
            return partial(HostBatch, output.features, output.logits)
        return partial(self._encoded_on_host, output)

    def _encoded_on_host(self, output: TeacherArrays) -> HostBatch:
        features = dict(output.features)
        planes = {}
        for stage, encoder in self._encoders.items():
            if stage in features:
                values = features.pop(stage)
                tensor = torch.as_tensor(values)
                with torch.inference_mode():
                    encoding = settled(encoder, tensor)
                host = {name: plane.numpy() for name, plane in encoding.planes.items()}
                planes[stage] = partial(_checked, host, encoding.finite)
        return HostBatch(features, output.logits, planes)

    def _start_on_device(self, pixels: Tensor) -> Callable[[], HostBatch]:
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copying_in):
            on_device = _pinned_copy(pixels).to(self._device, non_blocking=True)
        computing.wait_stream(self._copying_in)
        on_device.record_stream(computing)
        output = teacher_outputs(self._teacher, on_device, self._precision)
        features = {stage: output.features[stage] for stage in self._stages}
        with torch.inference_mode():
            encodings = {s: encoder(features[s]) for s, encoder in self._encoders.items()}
        plain = {s: values for s, values in features.items() if s not in encodings}
        logits = output.logits
        self._copying_out.wait_stream(computing)
        with torch.cuda.stream(self._copying_out), torch.inference_mode():
            batch = _Batch(
                features={s: features[s] for s in encodings},
                encodings={s: _encoding_to_host(encoding) for s, encoding in encodings.items()},
                plain={stage: _to_host(values) for stage, values in plain.items()},
                logits=None if logits is None else _to_host(logits),
                arrived=torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
            )
            batch.arrived.record()
        for tensor in (on_device, *features.values()):
            tensor.record_stream(self._copying_out)
        for encoding in encodings.values():
            for tensor in (*encoding.planes.values(), encoding.finite, encoding.octaves):
                tensor.record_stream(self._copying_out)
        if logits is not None:
            logits.record_stream(self._copying_out)
        return partial(self._finish, batch)

    def _finish(self, batch: "_Batch") -> HostBatch:
        batch.arrived.synchronize()
        planes = {}
        for stage, encoding in batch.encodings.items():
            if encoding.octaves.any():  # rare: values of a view exceed 16 bits
                with torch.inference_mode():
                    again = settled(self._encoders[stage], batch.features[stage])
                host = {name: plane.cpu().numpy() for name, plane in again.planes.items()}
            else:
                host = {name: plane.numpy() for name, plane in encoding.planes.items()}
            planes[stage] = partial(_checked, host, encoding.finite)
        return HostBatch(batch.plain, batch.logits, planes)


@dataclass(frozen=True)
class _Batch:
    """A batch whose copies to the host have been started.

    Attributes:
        features: Features on the device, for the stages encoded on the device.
        encodings: Encodings by stage; on the host after ``arrived``.
        plain: Features of the other stages; on the host after ``arrived``.
        logits: Logits; on the host after ``arrived``.
        arrived: Event recorded after the copies.
    """

    features: dict[int, Tensor]
    encodings: dict[int, Encoding]
    plain: dict[int, Tensor]
    logits: Tensor | None
    arrived: torch.cuda.Event


def _checked(planes: Planes, finite: Tensor) -> Planes:
    if not finite.all():
        view, token = (int(i) for i in (~finite).nonzero()[0])
        raise DataError(
            f"features of view {view} contain NaN or infinity at token {token}; the teacher"
            " overflowed or its weights are damaged"
        )
    return planes


def _pinned_copy(pixels: Tensor) -> Tensor:
    """Copy pixels to pinned memory with the same memory layout."""
    pinned = torch.empty_like(pixels, pin_memory=True)
    return pinned.copy_(pixels)


def _to_host(tensor: Tensor) -> Tensor:
    """Start a copy to pinned memory on the current stream."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _encoding_to_host(encoding: Encoding) -> Encoding:
    return Encoding(
        {name: _to_host(plane) for name, plane in encoding.planes.items()},
        _to_host(encoding.finite),
        _to_host(encoding.octaves),
    )
