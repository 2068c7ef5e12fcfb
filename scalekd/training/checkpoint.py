"""Checkpoints: everything that is needed to continue a run exactly.

A checkpoint is a folder: ``model.safetensors`` (the student alone, as timm names it),
``objective.safetensors`` (projectors), ``ema.safetensors``, ``training_state.pt`` (optimiser,
schedule, scaler, random states; plain tensors and numbers, read with ``weights_only``) and
``state.json`` (position of the run, for people and tools, with the size and SHA-256 of every other
file and of itself). A checkpoint is written to a temporary folder beside its own, flushed, and
renamed; a crash leaves the old one or the new one, never half of either.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalekd.cache.documents import check_depth
from scalekd.errors import DataError, EnvironmentFault
from scalekd.models.weights import load_plain_tensors
from scalekd.storage.files import TEMPORARY_SUFFIX, sync, temporary_path
from scalekd.storage.locks import lock
from scalekd.text import first_line

FORMAT_VERSION = 1
STUDENT_FILE = "model.safetensors"
OBJECTIVE_FILE = "objective.safetensors"
EMA_FILE = "ema.safetensors"
TRAINING_FILE = "training_state.pt"
STATE_FILE = "state.json"

_OLD_TEMPORARY_SUFFIX = ".writing"  # of earlier releases
_MAX_STATE_BYTES = 32 << 20  # class names of ImageNet-21k take 1 MB
_MAX_COUNT = 2**62
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Position:
    """Progress of a run between two optimiser updates.

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
        position: Progress of the run when it was saved.
        weights: File name to tensors, for the files of weights.
        training: Optimiser, schedule, scaler, random states per rank, meters.
        facts: JSON beside it: metrics and what the weights belong to.
    """

    position: Position
    weights: Mapping[str, Mapping[str, Tensor]]
    training: Mapping[str, Any]
    facts: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``folder``, replacing an older checkpoint only once the new one is on disk.

    Raises:
        EnvironmentFault: The disk is full or not writable; an older checkpoint is untouched.
    """
    try:
        with _replacement_of(folder) as temporary:
            for name, tensors in checkpoint.weights.items():
                save_file(_separate(tensors), temporary / name, metadata={"format": "pt"})
            torch.save(dict(checkpoint.training), temporary / TRAINING_FILE)
            state = {
                "format_version": FORMAT_VERSION,
                **asdict(checkpoint.position),
                **checkpoint.facts,
                "files": {file.name: _digest(file) for file in sorted(temporary.iterdir())},
            }
            state["digest"] = _digest_of(state)
            text = json.dumps(state, indent=2) + "\n"
            (temporary / STATE_FILE).write_text(text, encoding="utf-8")
            mode = (temporary / STATE_FILE).stat().st_mode  # safetensors makes files private
            for file in temporary.iterdir():
                file.chmod(mode)
                sync(file)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EnvironmentFault(
            f"{folder}: the checkpoint could not be written: {error}. The one before it is "
            "untouched; free space and resume with --resume auto"
        ) from error


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a checkpoint to ``target``.

    The copy has its own bytes on disk: damage to one of the two does not reach the other.

    Raises:
        EnvironmentFault: The disk is full or not writable; an older ``target`` is untouched.
    """
    try:
        with _replacement_of(target) as temporary:
            for file in source.iterdir():
                shutil.copy(file, temporary / file.name)
                sync(temporary / file.name)
    except OSError as error:
        raise EnvironmentFault(f"{target}: the checkpoint could not be copied: {error}") from error


def remove_leftovers(run: Path) -> None:
    """Remove what interrupted writes left; only while no other process writes to the run."""
    for path in (*run.glob(f".*{TEMPORARY_SUFFIX}"), *run.glob(f".*{_OLD_TEMPORARY_SUFFIX}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def find_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint at ``folder``, or the older one that a crash left beside it."""
    for candidate in (folder, _retired(folder)):
        if (candidate / STATE_FILE).is_file():
            return candidate
    return None


def find_run_checkpoint(run: Path) -> Path | None:
    """Return ``run`` if it is a checkpoint, otherwise the best or last checkpoint of the run."""
    candidates = (run, run / "model_best", run / "last")
    return next((path for folder in candidates if (path := find_checkpoint(folder))), None)


def read_state(folder: Path) -> dict[str, Any]:
    """Read and check ``state.json`` of a checkpoint.

    Raises:
        DataError: It is missing, damaged, too large, or of another format version.
    """
    path = folder / STATE_FILE
    with _readable(folder):
        if path.stat().st_size > _MAX_STATE_BYTES:
            raise ValueError(f"{STATE_FILE} has more than {_MAX_STATE_BYTES:,} bytes")
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"{STATE_FILE} is not a JSON object")
        check_depth(state, at_most=_MAX_DEPTH)
        version = state.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{folder}: a checkpoint of format version {str(version)[:20]}; this scalekd reads "
                f"version {FORMAT_VERSION}"
            )
        digest = state.pop("digest", None)  # absent from checkpoints of scalekd 0.1
        if digest is not None and digest != _digest_of(state):
            raise ValueError(f"{STATE_FILE} does not have the SHA-256 that it records")
        for name in Position.__dataclass_fields__:
            if type(state[name]) is not int or not 0 <= state[name] <= _MAX_COUNT:
                raise ValueError(f"{name} is {str(state[name])[:40]!r}, not a count")
    return state


def check_file(folder: Path, state: Mapping[str, Any], name: str) -> Path:
    """Compare a checkpoint's file with its recorded digest, and return its path.

    Raises:
        DataError: The file is missing or has other bytes.
    """
    path = folder / name
    with _readable(folder):
        recorded = state.get("files")
        if not path.is_file():
            raise FileNotFoundError(f"{name} is missing")
        if recorded is not None and recorded[name] != _digest(path):
            raise ValueError(f"{name} does not have the size and SHA-256 that {STATE_FILE} records")
    return path


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        DataError: It is missing, damaged, or of another format version.
    """
    state = read_state(folder)
    present = [
        name
        for name in (STUDENT_FILE, OBJECTIVE_FILE, EMA_FILE)
        if name in (state.get("files") or ()) or (folder / name).is_file()
    ]
    paths = {name: check_file(folder, state, name) for name in (*present, TRAINING_FILE)}
    with _readable(folder):
        weights = {name: load_file(paths[name]) for name in present}
        training = load_plain_tensors(paths[TRAINING_FILE])
        if not isinstance(training, dict):
            raise ValueError(f"{TRAINING_FILE} does not contain a mapping")
    position = Position(**{name: state.pop(name) for name in Position.__dataclass_fields__})
    facts = {
        name: value for name, value in state.items() if name not in ("format_version", "files")
    }
    return Checkpoint(position, weights, training, facts)


def sound_position(folder: Path) -> Position | None:
    """Return the position of a checkpoint; ``None`` if a file is not as it was written."""
    try:
        state = read_state(folder)
        if "files" in state:
            for name in state["files"]:
                check_file(folder, state, name)
        else:
            read_checkpoint(folder)
    except DataError:
        return None
    return Position(**{name: state[name] for name in Position.__dataclass_fields__})


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # json, safetensors, pickle and zip readers raise many kinds
        reason = f"{type(error).__name__}: {first_line(error, limit=200)}"
        raise DataError(
            f"{folder}: the checkpoint cannot be read ({reason}); choose another one of the run, "
            "such as RUN/checkpoint-N"
        ) from error


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def _digest_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _replacement_of(folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` once the block has filled it."""
    with temporary_path(folder) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        sync(temporary)
        _swap_in(temporary, folder)


def _retired(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.replaced"


def _swap_in(temporary: Path, folder: Path) -> None:
    # A folder cannot be renamed over a full one: the old one is renamed first, to where
    # `find_checkpoint` still sees it. Processes that write the same folder take turns.
    retired = _retired(folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every network file system has locks
            lock(parent)
        if folder.exists():
            shutil.rmtree(retired, ignore_errors=True)
            folder.rename(retired)
        temporary.rename(folder)
        os.fsync(parent)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        os.close(parent)


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
