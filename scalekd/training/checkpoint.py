"""Checkpoints: everything a run needs to go on as if nothing had happened.

A checkpoint is a folder: ``model.safetensors`` (the student alone, as timm names it),
``objective.safetensors`` (projectors), ``ema.safetensors``, ``training_state.pt`` (optimiser,
schedule, scaler, random states; plain tensors and numbers, read with ``weights_only``) and
``state.json`` (where the run stands, for people and tools). It is written beside its place,
flushed, and renamed into it; a crash leaves the old one or the new one, never half of either.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalekd.errors import DataError, EnvironmentFault

FORMAT_VERSION = 1
STUDENT_FILE = "model.safetensors"
OBJECTIVE_FILE = "objective.safetensors"
EMA_FILE = "ema.safetensors"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands, between two optimiser updates.

    Attributes:
        epoch: The epoch under way, or the next one when ``epoch_samples`` is 0.
        epoch_samples: Views of that epoch that are trained on, over all processes.
        num_updates: Optimiser updates so far.
        samples_viewed: Views so far, over all processes and epochs: the paper's measure of cost.
    """

    epoch: int = 0
    epoch_samples: int = 0
    num_updates: int = 0
    samples_viewed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder.

    Attributes:
        position: Where the run stood.
        weights: File name to tensors, for the files of weights.
        training: Optimiser, schedule, scaler, random states per rank, meters.
        facts: JSON beside it: metrics and what the weights belong to.
    """

    position: Position
    weights: Mapping[str, Mapping[str, Tensor]]
    training: Mapping[str, Any]
    facts: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``folder``, replacing an older one only once the new one is on disk.

    Raises:
        EnvironmentFault: The disk is full or not writable; an older checkpoint is untouched.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in checkpoint.weights.items():
            save_file(_separate(tensors), temporary / name, metadata={"format": "pt"})
        torch.save(dict(checkpoint.training), temporary / TRAINING_FILE)
        state = {
            "format_version": FORMAT_VERSION,
            **asdict(checkpoint.position),
            **checkpoint.facts,
        }
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        mode = (temporary / STATE_FILE).stat().st_mode  # safetensors makes files private
        for file in temporary.iterdir():
            file.chmod(mode)
            sync(file)
        sync(temporary)
        _swap_in(temporary, folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(
            f"{folder}: the checkpoint could not be written: {error}. The one before it is "
            "untouched; free space and resume with --resume auto"
        ) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Make ``target`` the same checkpoint, sharing its bytes on disk where links are possible."""
    temporary = target.with_name(f".{target.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for file in source.iterdir():
            try:
                os.link(file, temporary / file.name)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK):
                    raise
                shutil.copyfile(file, temporary / file.name)
        sync(temporary)
        _swap_in(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise EnvironmentFault(f"{target}: the checkpoint could not be copied: {error}") from error


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint at ``folder``, or the one that a crash kept it from replacing."""
    for candidate in (folder, _retired(folder)):
        if (candidate / STATE_FILE).is_file():
            return candidate
    return None


def find_run_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run, its last where there is no best, or ``run`` if it is one."""
    candidates = (run, run / "model_best", run / "last")
    return next((found for path in candidates if (found := find_checkpoint(path))), None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        DataError: It is missing, damaged, or of another format version.
    """
    try:
        facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        version = facts.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder}: a checkpoint of format version {version}; this scalekd reads version "
                f"{FORMAT_VERSION}"
            )
        position = Position(**{name: facts.pop(name) for name in Position.__dataclass_fields__})
        weights = {
            name: load_file(folder / name)
            for name in (STUDENT_FILE, OBJECTIVE_FILE, EMA_FILE)
            if (folder / name).is_file()
        }
        # Our own run folder, and even so nothing is unpickled but tensors and plain values.
        training = torch.load(folder / TRAINING_FILE, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise DataError(
            f"{folder}: the checkpoint cannot be read ({type(error).__name__}: {reason}); resume "
            "from another one with --resume FOLDER"
        ) from error
    return Checkpoint(position, weights, training, facts)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _retired(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _swap_in(temporary: Path, folder: Path) -> None:
    # A folder cannot be renamed over a full one: the old steps aside first, where
    # `find_checkpoint` still sees it.
    retired = _retired(folder)
    if folder.exists():
        shutil.rmtree(retired, ignore_errors=True)
        folder.rename(retired)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, such as tied weights.
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in seen and plain.numel():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        separate[name] = plain
    return separate
