"""The folder of a run: what it holds, and when it may be used.

``args.yaml`` (the configuration), ``summary.csv``, ``log.jsonl``, and checkpoints in ``last``,
``model_best`` and ``checkpoint-N``, as timm lays them out. A folder that holds anything else
is never written to, and a run is only ever continued on request.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.training.checkpoint import copy_checkpoint, find_checkpoint
from scalekd.training.config import TrainConfig
from scalekd.training.logs import EpochSummary, StepLog, replace_text

ARGS_FILE = "args.yaml"

# Other values of these would make the checkpoint's tensors meaningless.
_FIXED_ON_RESUME = (
    "model",
    "num_classes",
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
# What these say is about this launch, not about the run.
_FREE_ON_RESUME = frozenset(
    {
        "output",
        "resume",
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

    @property
    def last(self) -> Path:
        return self.root / "last"

    @property
    def best(self) -> Path:
        return self.root / "model_best"

    def claim(self, config: TrainConfig) -> tuple[Path | None, list[str]]:
        """Decide whether this run starts here or continues, and write ``args.yaml``.

        Returns:
            The checkpoint to continue from, if any, and sentences on what differs from before.

        Raises:
            UsageError: The folder holds something else, or a run that was not asked to continue,
                or one that the configuration does not fit.
            EnvironmentFault: The folder cannot be made.
        """
        notes: list[str] = []
        args = self.root / ARGS_FILE
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            holds_something = any(self.root.iterdir())
        except OSError as error:
            raise EnvironmentFault(
                f"{self.root}: the run's folder cannot be made: {error}"
            ) from error
        checkpoint = self._checkpoint(config.resume)
        if holds_something and not args.is_file():
            raise UsageError(
                f"{self.root}: holds something that is not a training run; choose another --output"
            )
        if args.is_file():
            if config.resume is None:
                raise UsageError(
                    f"{self.root}: a run is here already; continue it with --resume auto, or "
                    "choose another --output"
                )
            notes = _changes(TrainConfig.from_yaml(args), config)
        elif config.resume == "auto":
            notes = [f"{self.root}: nothing to resume, starting"]
        replace_text(args, config.to_yaml())
        return checkpoint, notes

    def _checkpoint(self, resume: str | None) -> Path | None:
        if resume is None:
            return None
        if resume == "auto":
            return find_checkpoint(self.last)
        checkpoint = find_checkpoint(Path(resume)) or find_checkpoint(Path(resume) / "last")
        if checkpoint is None:
            raise UsageError(f"--resume {resume}: no checkpoint is there")
        return checkpoint

    def keep_best(self) -> None:
        copy_checkpoint(self.last, self.best)

    def keep_epoch(self, epoch: int, metrics: Mapping[int, float], limit: int) -> None:
        """Keep ``last`` as ``checkpoint-<epoch>``, and only the ``limit`` best of those kept.

        Args:
            epoch: The epoch that ``last`` ends.
            metrics: Every finished epoch's metric, larger is better.
            limit: How many to keep.
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
