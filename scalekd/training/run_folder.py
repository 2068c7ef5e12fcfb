"""The folder of a run: its contents, and when a run may use it.

``args.yaml`` (the configuration), ``summary.csv``, ``log.jsonl``, and checkpoints in ``last``,
``model_best`` and ``checkpoint-N``, as timm lays them out. A folder that contains anything else
is never written to, a run is continued with ``--resume`` and replaced with ``--overwrite`` only.
One process at a time trains in a folder: it holds a lock on ``.lock``, which the operating system
releases when the process ends or is killed.
"""

import errno
import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.storage.files import commit_file
from scalekd.storage.locks import lock_record
from scalekd.training.checkpoint import (
    copy_checkpoint,
    find_checkpoint,
    remove_leftovers,
    sound_position,
)
from scalekd.training.config import TrainConfig
from scalekd.training.logs import EpochSummary, StepLog

ARGS_FILE = "args.yaml"
_LOCK_FILE = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN)

# Other values of these would make the checkpoint's tensors meaningless.
_FIXED_ON_RESUME = (
    "model",
    "num_classes",
    "class_map",
    "img_size",
    "model_kwargs",
    "objective",
    "distillation",
    "freeze",
    "opt",
    "layer_decay",
    "wd_exclude",
    "model_ema",
)
# These options describe this launch, not the run.
_FREE_ON_RESUME = frozenset(
    {
        "output",
        "resume",
        "overwrite",
        "workers",
        "log_interval",
        "cache",
        "data_dir",
        "local_cache",
        "local_cache_size",
    }
)


class RunFolder:
    """A run's folder on disk. Only the main process writes to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.step_log = StepLog(root / "log.jsonl")
        self.summary = EpochSummary(root / "summary.csv")
        self._lock: int | None = None

    @property
    def last(self) -> Path:
        return self.root / "last"

    @property
    def best(self) -> Path:
        return self.root / "model_best"

    def claim(self, config: TrainConfig) -> tuple[Path | None, list[str]]:
        """Lock the folder, decide whether the run starts or continues, and write ``args.yaml``.

        Returns:
            The checkpoint to continue from, if any, and sentences on what differs from before.

        Raises:
            UsageError: The folder holds something else, or a run that was not asked to continue,
                or one that the configuration does not fit.
            DataError: The run's files are damaged, or none of its checkpoints can be read.
            EnvironmentFault: The folder cannot be made, or another process trains in it.
        """
        if config.overwrite and config.resume is not None:
            raise UsageError(
                "--overwrite and --resume: the first starts a new run, the second continues one"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_other_content()
            self._acquire()
        except OSError as error:
            raise EnvironmentFault(
                f"{self.root}: the run's folder cannot be made: {error}"
            ) from error
        try:
            return self._start_or_continue(config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_other_content(self) -> None:
        content = [path for path in self.root.iterdir() if path.name != _LOCK_FILE]
        if content and not (self.root / ARGS_FILE).is_file():
            raise UsageError(
                f"{self.root}: contains something that is not a training run; choose another"
                " --output"
            )

    def _acquire(self) -> None:
        # A record lock, not `flock`: loader workers that outlive a killed process do not hold it.
        descriptor = os.open(self.root / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            lock_record(descriptor)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            if error.errno not in _BUSY:
                raise
            owner = "".join(c if c.isprintable() else "?" for c in owner) or "another process"
            raise EnvironmentFault(
                f"{self.root}: {owner} is training in this folder; wait until it has ended, or "
                "choose another --output"
            ) from None
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _start_or_continue(self, config: TrainConfig) -> tuple[Path | None, list[str]]:
        args = self.root / ARGS_FILE
        remove_leftovers(self.root)
        if config.overwrite:
            self._remove_run()
        checkpoint, notes = self._checkpoint(config.resume)
        if args.is_file():
            if config.resume is None:
                raise UsageError(
                    f"{self.root}: contains a run already; continue it with --resume auto, replace "
                    "it with --overwrite, or choose another --output"
                )
            notes += _changes(TrainConfig.from_yaml(args), config)
        commit_file(args, config.to_yaml().encode())
        return checkpoint, notes

    def _remove_run(self) -> None:
        for path in (self.root / ARGS_FILE, self.step_log.path, self.summary.path):
            path.unlink(missing_ok=True)
        for folder in self._checkpoint_folders():
            shutil.rmtree(folder)

    def _checkpoint(self, resume: str | None) -> tuple[Path | None, list[str]]:
        if resume is None:
            return None, []
        if resume == "auto":
            return self._newest_sound()
        folder = Path(resume)
        checkpoint = find_checkpoint(folder) or find_checkpoint(folder / "last")
        if checkpoint is None:
            raise UsageError(f"--resume {resume}: contains no checkpoint")
        inside = self.root.resolve() in checkpoint.resolve().parents
        if not inside and (self._checkpoint_folders() or self.summary.num_epochs()):
            raise UsageError(
                f"--resume {resume}: is not of the run in {self.root}, which has checkpoints and "
                "logs of its own; choose another --output"
            )
        return checkpoint, []

    def _newest_sound(self) -> tuple[Path | None, list[str]]:
        folders = self._checkpoint_folders()
        positions = {folder: sound_position(folder) for folder in folders}
        sound = {folder: p.num_updates for folder, p in positions.items() if p is not None}
        damaged = ", ".join(folder.name for folder in folders if folder not in sound)
        if not sound:
            num_epochs = self.summary.num_epochs()
            if folders or num_epochs:
                state = f"cannot be read: {damaged}" if damaged else "are gone"
                raise DataError(
                    f"{self.root}: the run's checkpoints {state} ({num_epochs} epochs are in its "
                    "summary.csv); give a copy of one with --resume FOLDER, or start again with "
                    "--overwrite"
                )
            return None, [f"{self.root}: nothing to resume, starting"]
        newest = max(sound, key=lambda folder: (sound[folder], folder == self.last))
        notes = [f"{self.root}: cannot be read: {damaged}"] if damaged else []
        if newest != self.last and self.last not in sound:
            notes.append(f"{self.last} is missing or damaged: continuing from {newest.name}")
        return newest, notes

    def _checkpoint_folders(self) -> list[Path]:
        names = ["last", "model_best", ".last.replaced", ".model_best.replaced"]
        names += [f"checkpoint-{epoch}" for epoch in sorted(self.kept_epochs())]
        return [self.root / name for name in names if (self.root / name).is_dir()]

    def keep_best(self) -> None:
        """Keep ``last`` as ``model_best``."""
        copy_checkpoint(self.last, self.best)

    def keep_epoch(self, epoch: int, metrics: Mapping[int, float], limit: int) -> None:
        """Keep ``last`` as ``checkpoint-<epoch>``, and only the ``limit`` best of those kept.

        Args:
            epoch: The epoch that ``last`` ends.
            metrics: Every finished epoch's metric, larger is better.
            limit: Number of checkpoints to keep.
        """
        copy_checkpoint(self.last, self.root / f"checkpoint-{epoch}")
        kept = sorted(self.kept_epochs(), key=lambda e: (metrics.get(e, float("-inf")), e))
        for worst in kept[: max(0, len(kept) - limit)]:
            shutil.rmtree(self.root / f"checkpoint-{worst}", ignore_errors=True)

    def kept_epochs(self) -> list[int]:
        matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.root.iterdir())
        return [int(match[1]) for match in matches if match]


def _changes(before: TrainConfig, now: TrainConfig) -> list[str]:
    old, new = before.model_dump(), now.model_dump()
    changed: dict[str, tuple[Any, Any]] = {
        name: (old[name], new[name])
        for name in new
        if old[name] != new[name] and name not in _FREE_ON_RESUME
    }
    fixed = [name for name in _FIXED_ON_RESUME if name in changed]
    if fixed:
        was, is_now = changed[fixed[0]]
        raise UsageError(
            f"{now.output}: this run has {fixed[0]} = {was!r} and cannot continue with {is_now!r}; "
            "choose another --output (its weights can start a new run by --initial-checkpoint)"
        )
    return [
        f"{name} was {was!r} and is now {new_value!r}" for name, (was, new_value) in changed.items()
    ]
