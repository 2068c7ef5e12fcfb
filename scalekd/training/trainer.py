"""The training loop: Accelerate for devices, precision and processes, timm for everything around.

One optimiser update is the unit of everything: losses are checked, logged and saved between
updates, signals are obeyed there, and a resumed run starts there.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils.agc import adaptive_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from scalekd.distributed import (
    Coordinator,
    StopRequest,
    TrainingDiverged,
    TrainingInterrupted,
    process_faults,
)
from scalekd.errors import CacheMismatch, DataError, UsageError
from scalekd.training.checkpoint import (
    Checkpoint,
    Position,
    find_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from scalekd.training.compilation import compile_faults, compile_parts
from scalekd.training.config import TrainConfig
from scalekd.training.logs import RunningMeans
from scalekd.training.module import DistillationModule, StepOutput, hold_frozen_norms
from scalekd.training.optim import build_optimizer, build_scheduler
from scalekd.training.progress import TrainingProgress
from scalekd.training.random_state import preserved_random_state
from scalekd.training.run_folder import RunFolder
from scalekd.training.state import TrainingState
from scalekd.training.targets import Batch
from scalekd.training.trackers import Trackers

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Bare timm model to metrics, ``top1`` among them; collective, called by every process."""


class EpochLoader(Protocol):
    """A loader that knows its length and can start in the middle of an epoch."""

    @property
    def num_batches(self) -> int:
        """Batches that each process gets in one epoch."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterable[Batch]:
        """Batches of an epoch from ``start_batch`` on, in an order that only seeds decide."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        output: The run's folder.
        epochs: Epochs trained.
        samples_viewed: Views trained on.
        metrics: The last row of ``summary.csv``.
        best_epoch: The epoch of ``model_best``.
        best_metric: Its metric: top-1 where there is validation, otherwise minus the loss.
    """

    output: str
    epochs: int
    samples_viewed: int
    metrics: Mapping[str, float]
    best_epoch: int
    best_metric: float


class Trainer:
    """Trains a student as configured, from wherever its run folder stands.

    Args:
        config: Of the run.
        accelerator: Made with the configured precision.
        module: Student (with the bare timm model as ``.model``) and objective.
        loader: Batches of this process.
        targets: Makes a batch's targets, on the device.
        evaluate: Called on the student, and on its average, at the end of epochs.
        facts: JSON kept with every checkpoint: what the weights are, for `scalekd.export`.
        notes: Sentences to show before the first update.

    Raises:
        UsageError: The optimiser, schedule or run folder cannot be had as configured.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        module: DistillationModule,
        loader: EpochLoader,
        targets: nn.Module,
        evaluate: Evaluate | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.config = config
        self._accelerator = accelerator
        self._coordinator = Coordinator(accelerator.num_processes)
        self._loader = loader
        self._evaluate = evaluate
        self._facts = dict(facts or {})
        self._notes = tuple(notes)
        self._run = RunFolder(Path(config.output))
        self._stop = StopRequest()
        self._trackers = Trackers(accelerator, Path(config.output))

        self._num_batches = loader.num_batches
        if self._coordinator.maximum(self._num_batches) + self._coordinator.maximum(
            -self._num_batches
        ):
            raise UsageError(
                f"the processes would train different numbers of batches ({self._num_batches} "
                "here); every process must read the same data set with the same --batch-size"
            )
        if not self._num_batches:
            raise UsageError(
                f"an epoch has no full batch of {config.batch_size} views for each of "
                f"{accelerator.num_processes} processes; give a smaller --batch-size"
            )
        self._updates_per_epoch = -(-self._num_batches // config.grad_accum_steps)

        module.to(accelerator.device)
        self._module = module
        self._targets = targets.to(accelerator.device)
        student: nn.Module = module.student.model  # type: ignore[assignment]
        self._ema = (
            ModelEmaV3(student, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
            if config.model_ema
            else None
        )
        if config.torchcompile:
            compile_parts(module, config.torchcompile)
        raw_optimizer = build_optimizer(config, student, module.objective)
        self._scheduler, self.num_epochs = build_scheduler(
            config, raw_optimizer, updates_per_epoch=self._updates_per_epoch
        )
        self._model, self._optimizer = accelerator.prepare(module, raw_optimizer)
        self._state = TrainingState(accelerator, module, self._optimizer, self._ema)
        self._trainable = [p for p in module.parameters() if p.requires_grad]

        self._position = Position()
        self._epoch_means = RunningMeans()
        self._metric_by_epoch: dict[int, float] = {}
        self._last_row: dict[str, float] = {}

    # -- the run -------------------------------------------------------------------------------

    @process_faults()
    def fit(self) -> TrainResult:
        """Train to the last epoch.

        Raises:
            TrainingInterrupted: A signal came; a checkpoint was written.
            TrainingDiverged: A loss or gradient is not finite; nothing was updated with it.
            ScaleKDError: Data, cache, disk or another process failed.
        """
        progress = TrainingProgress(
            num_epochs=self.num_epochs,
            updates_per_epoch=self._updates_per_epoch,
            shown=self._accelerator.is_main_process,
        )
        with (
            self._stop.listening(),
            progress,
            contextlib.closing(self._run),
            contextlib.closing(self._trackers),
        ):
            self._start(progress)
            while self._position.epoch < self.num_epochs:
                self._train_epoch(progress)
                self._finish_epoch(progress)
        best = self._best_epoch()
        return TrainResult(
            output=str(self._run.root),
            epochs=self._position.epoch,
            samples_viewed=self._position.samples_viewed,
            metrics=self._last_row,
            best_epoch=best,
            best_metric=self._metric_by_epoch.get(best, float("nan")),
        )

    def _start(self, progress: TrainingProgress) -> None:
        main = self._accelerator.is_main_process
        claimed = self._coordinator.together(
            lambda: self._run.claim(self.config) if main else (None, [])
        )
        # Dropout draws differ between processes; nothing drawn before this moment matters.
        set_seed(self.config.seed + self._accelerator.process_index)
        # Only the main process looked; on a shared file system all read what it found.
        path, notes = self._coordinator.collect(claimed)[0]
        if path is not None:
            notes = [*notes, *self._resume(path)]
            self._copy_again(path)
        for note in (*self._notes, *notes):
            progress.say(note)
        if main:
            self._run.step_log.keep_until(self._position.num_updates)
            dropped = self._run.summary.keep_until(self._position.epoch)
            if dropped:
                progress.say(
                    f"{self._run.summary.path}: the rows of {dropped} epochs after the checkpoint "
                    "are dropped; these epochs are trained again"
                )
        settings = self.config.model_dump(mode="json")
        self._coordinator.together(lambda: self._trackers.start(settings) if main else None)
        self._step_schedule(epoch=self._position.epoch)

    def _resume(self, path: Path) -> list[str]:
        checkpoint = self._coordinator.together(lambda: self._read(path))
        notes = self._coordinator.together(lambda: self._state.restore(checkpoint))
        was, now = (facts.get("cache_id") for facts in (checkpoint.facts, self._facts))
        if was and now and was != now:
            notes.append(f"cache_id was {was!r} and is now {now!r}")
        self._position = checkpoint.position
        try:
            meters = checkpoint.training["meters"]
            self._epoch_means.merge(meters["epoch"])
            by_epoch = meters["metric_by_epoch"].items()
            self._metric_by_epoch = {int(epoch): float(value) for epoch, value in by_epoch}
            self._last_row = {str(name): float(x) for name, x in meters["last_row"].items()}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: the checkpoint's means are damaged: {error!r}") from error
        where = (
            f"{path}: resuming at epoch {self._position.epoch + 1}, update "
            f"{self._position.num_updates}, after {self._position.samples_viewed:,} views"
        )
        return [where, *notes]

    def _read(self, path: Path) -> Checkpoint:
        """Read a checkpoint, and see that it learns from the same teacher and images as this run.

        Raises:
            CacheMismatch: It does not. A cache may be moved or written anew, but not be another.
        """
        checkpoint = read_checkpoint(path)
        origins = {"data_fingerprint": "training images"}
        objective = self._module.objective
        if objective.needs_features or objective.needs_logits:
            origins["teacher_weights_sha256"] = "teacher's weights"
        for name, what in origins.items():
            was, now = checkpoint.facts.get(name), self._facts.get(name)
            if was and now and was != now:
                raise CacheMismatch(
                    f"{path}: the run's {what} are {was[:12]}…, and those of {self.config.cache} "
                    f"are {now[:12]}…; give --cache as the run was begun, or choose another "
                    "--output (the weights can start a new run by --initial-checkpoint)"
                )
        return checkpoint

    def _copy_again(self, path: Path) -> None:
        """Repeat the copies of ``last`` that a kill just after it was written kept from being."""
        epoch = self._position.epoch - 1
        if epoch < 0 or self._position.epoch_samples:
            return

        def copy() -> None:
            last = self._run.last
            if self._accelerator.is_main_process and last.exists() and path.samefile(last):
                self._keep(epoch, best=epoch == self._best_epoch())

        self._coordinator.together(copy)

    def _best_epoch(self) -> int:
        """The first of the epochs with the best metric; -1 before there is one."""
        metrics = self._metric_by_epoch
        return max(metrics, key=lambda epoch: (metrics[epoch], -epoch), default=-1)

    def _start_batch(self, progress: TrainingProgress) -> int:
        per_batch = self.config.batch_size * self._accelerator.num_processes
        start, repeated = divmod(self._position.epoch_samples, per_batch)
        if repeated and start < self._num_batches:
            progress.say(
                f"batches hold {per_batch} views now: {repeated} views of this epoch are trained "
                "on a second time"
            )
            self._position = replace(self._position, epoch_samples=start * per_batch)
        return int(start)

    # -- an epoch ------------------------------------------------------------------------------

    def _train_epoch(self, progress: TrainingProgress) -> None:
        self._module.train()
        hold_frozen_norms(self._module.student)
        start = self._start_batch(progress)
        batches = self._batches(start)
        recent = RunningMeans()
        waited = 0.0
        started = time.monotonic()
        done = start
        while done < self._num_batches:
            group = min(self.config.grad_accum_steps, self._num_batches - done)
            values, num_views, waited_now = self._update(batches, group)
            done += group
            waited += waited_now
            self._position = replace(
                self._position,
                epoch_samples=self._position.epoch_samples + num_views,
                num_updates=self._position.num_updates + 1,
                samples_viewed=self._position.samples_viewed + num_views,
            )
            self._step_schedule()
            now = time.monotonic()
            recent.add(values, num_views)
            self._epoch_means.add(values, num_views)
            elapsed = max(now - started, 1e-9)
            if (
                self._position.num_updates % self.config.log_interval == 0
                or done == self._num_batches
            ):
                self._log_step(recent, elapsed, waited, progress)
                # Rates travel as sums of seconds, so that they average over resumed parts too.
                self._epoch_means.merge(
                    {"sums": {"_seconds": elapsed, "_waited": waited}, "weight": 0.0}
                )
                recent, waited, started = RunningMeans(), 0.0, time.monotonic()
            last_of_epoch = done == self._num_batches
            if not last_of_epoch:
                self._obey_signals()
                interval = self.config.recovery_interval
                if interval and self._position.num_updates % interval == 0:
                    self._save()

    def _batches(self, start: int) -> Iterator[Batch]:
        with preserved_random_state():
            iterator = iter(self._loader.epoch(self._position.epoch, start_batch=start))
            first = self._coordinator.together(lambda: next(iterator, None))
        if first is not None:
            yield first
        while (batch := self._coordinator.together(lambda: next(iterator, None))) is not None:
            yield batch

    def _update(
        self, batches: Iterator[Batch], num_micro_batches: int
    ) -> tuple[dict[str, float], int, float]:
        """One optimiser update; returns mean values, views over all processes, seconds waited."""
        reports: list[Tensor] = []
        names: list[str] = []
        waited = 0.0
        num_views = 0
        for micro in range(num_micro_batches):
            before = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - before
            if batch is None:
                raise UsageError(
                    f"the loader ended an epoch before its {self._num_batches} batches were read"
                )
            num_views += len(batch["label"]) * self._accelerator.num_processes
            final = micro == num_micro_batches - 1
            sync = contextlib.nullcontext() if final else self._accelerator.no_sync(self._model)
            with sync, compile_faults(self.config.torchcompile):
                output = self._forward(batch)
                self._accelerator.backward(output.losses["total"] / num_micro_batches)
            terms = {"loss": output.losses["total"]} | {
                name: value for name, value in output.losses.items() if name != "total"
            }
            terms |= output.metrics
            names = list(terms)
            reports.append(torch.stack([value.detach().float() for value in terms.values()]))
        norm = self._clip_gradients()
        # The only transfer from the device: loss terms and gradient norm, once an update.
        host = torch.cat([torch.stack(reports).mean(dim=0), norm.reshape(1)]).tolist()
        values = dict(zip([*names, "grad_norm"], host, strict=True))
        self._check_finite(values)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update(self._state.student, step=self._position.num_updates + 1)
        return values, num_views, waited

    def _forward(self, batch: Batch) -> StepOutput:
        on_device = {
            name: tensor.to(self._accelerator.device, non_blocking=True)
            for name, tensor in batch.items()
        }
        with torch.no_grad():
            targets = self._targets(on_device)
        try:
            output: StepOutput = self._model(on_device["pixels"], on_device["label"], targets)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel"):
                raise
            raise UsageError(
                f"--batch-size {len(batch['label'])}: batch normalisation of a map of 1 x 1 needs "
                "two views in a batch; give a larger --batch-size or --img-size"
            ) from error
        return output

    def _clip_gradients(self) -> Tensor:
        """Clip as configured; returns the norm before clipping, over student and projectors."""
        self._accelerator.unscale_gradients(self._optimizer)
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).float()
        limit = self.config.clip_grad
        if limit is None:
            return norm
        if self.config.clip_mode == "norm":
            nn.utils.clip_grads_with_norm_(self._trainable, limit, norm)
        elif self.config.clip_mode == "value":
            nn.utils.clip_grad_value_(self._trainable, limit)
        else:
            # As timm: the classifier's rows are meant to grow and shrink freely.
            classifier = self._state.student.get_classifier()  # type: ignore[operator]
            heads = classifier if isinstance(classifier, tuple) else (classifier,)  # DeiT has two
            head = {id(p) for part in heads for p in part.parameters()}
            body = [p for p in self._trainable if id(p) not in head]
            adaptive_clip_grad(body, limit)  # type: ignore[no-untyped-call]
        return norm

    def _check_finite(self, values: Mapping[str, float]) -> None:
        def check() -> None:
            wrong = [name for name in values if not math.isfinite(values[name])]
            if self._accelerator.scaler is not None:
                wrong = [name for name in wrong if name != "grad_norm"]  # the scaler skips the step
            # The sum is not finite because a term is not: the term is what helps.
            terms = [name for name in wrong if name not in ("loss", "grad_norm")] or wrong
            if terms:
                what = "the gradient's norm" if terms[0] == "grad_norm" else terms[0]
                saved = find_checkpoint(self._run.last)
                kept = f"the last checkpoint is {saved}" if saved else "there is no checkpoint yet"
                raise TrainingDiverged(
                    f"update {self._position.num_updates + 1} (epoch {self._position.epoch + 1}): "
                    f"{what} is {values[terms[0]]}; nothing was updated with it. Lower --lr, add "
                    f"--clip-grad or warm-up, or train with --amp no; {kept}"
                )

        self._coordinator.together(check)

    def _step_schedule(self, *, epoch: int | None = None) -> None:
        if self._scheduler is None:
            return
        if epoch is not None:
            self._scheduler.step(epoch)
        # Not the updates made so far: a run resumed with other batches stays where it was.
        per_update = self.config.batch_size * self._accelerator.num_processes
        per_update *= self.config.grad_accum_steps
        within = -(-self._position.epoch_samples // per_update)
        self._scheduler.step_update(self._position.epoch * self._updates_per_epoch + within)

    # -- between epochs ------------------------------------------------------------------------

    def _finish_epoch(self, progress: TrainingProgress) -> None:
        epoch = self._position.epoch
        row = self._training_row(epoch)
        self._state.share_buffers()
        last = epoch + 1 == self.num_epochs
        if self._evaluate is not None and ((epoch + 1) % self.config.eval_interval == 0 or last):
            # A corrupt image, or a scheduler that waits no longer, costs the evaluation only: a run
            # resumed from here trains nothing more in this epoch and evaluates.
            self._save()
            self._obey_signals(saved=True)
            row |= self._evaluated(self._evaluate)
        metric = row.get("ema_eval_top1", row.get("eval_top1"))
        if self._evaluate is None:
            metric = -row["train_loss"]
        best = False
        if metric is not None:
            best = metric > max(self._metric_by_epoch.values(), default=-math.inf)
            self._metric_by_epoch[epoch] = metric
        self._epoch_means = RunningMeans()
        self._last_row = row
        self._position = replace(self._position, epoch=epoch + 1, epoch_samples=0)
        self._step_schedule(epoch=epoch + 1)
        if self._accelerator.is_main_process:
            # Before the checkpoint: a crash between the two trains and writes this epoch again.
            self._run.summary.write(row)
        self._save(best=best, keep_as=epoch)
        self._trackers.log(row, step=self._position.num_updates, say=progress.say)
        progress.say(_epoch_line(row, self.num_epochs))
        if not last:
            self._obey_signals(saved=True)

    def _evaluated(self, evaluate: Evaluate) -> dict[str, float]:
        models = {"eval": self._state.student}
        if self._ema is not None:
            models["ema_eval"] = self._ema.module
        row: dict[str, float] = {}
        for prefix, model in models.items():
            with preserved_random_state():
                metrics = evaluate(model)
            # Plain numbers: a NumPy one in a checkpoint could not be read back safely.
            row |= {f"{prefix}_{name}": float(value) for name, value in metrics.items()}
        return row

    def _over_processes(self, means: RunningMeans) -> RunningMeans:
        together = RunningMeans()
        for state in self._coordinator.collect(means.state()):
            together.merge(state)
        return together

    def _training_row(self, epoch: int) -> dict[str, float]:
        means = self._over_processes(self._epoch_means)
        seconds = means.sums.pop("_seconds", 0.0) / self._accelerator.num_processes
        waited = means.sums.pop("_waited", 0.0) / self._accelerator.num_processes
        row: dict[str, float] = {"epoch": epoch}
        row |= {f"train_{name}": value for name, value in means.means().items()}
        return row | {
            "lr": self._current_lr(),
            "samples_viewed": self._position.samples_viewed,
            "images_per_second": self._position.epoch_samples / max(seconds, 1e-9),
            "data_wait_share": waited / max(seconds, 1e-9),
            "seconds": seconds,
        }

    def _current_lr(self) -> float:
        # With layer decay the groups' rates differ; the largest is the one that was configured.
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def _log_step(
        self, recent: RunningMeans, elapsed: float, waited: float, progress: TrainingProgress
    ) -> None:
        means = self._over_processes(recent)
        record = {
            "epoch": self._position.epoch,
            "step": self._position.num_updates,
            "samples_viewed": self._position.samples_viewed,
            "lr": self._current_lr(),
            **means.means(),
            # Every process weighs its means with the views of all.
            "images_per_second": means.weight / self._accelerator.num_processes / elapsed,
            "data_wait_share": waited / elapsed,
        }
        if self._accelerator.is_main_process:
            self._run.step_log.write(record)
        self._trackers.log(record, step=self._position.num_updates, say=progress.say)
        progress.step(self._position.epoch, self._position.num_updates, record)

    def _save(self, *, best: bool = False, keep_as: int | None = None) -> None:
        # On resume every process takes its share of the means of all.
        means = self._over_processes(self._epoch_means)
        checkpoint = self._state.capture(
            self._position,
            self._coordinator,
            meters={
                "epoch": means.state(shares=self._accelerator.num_processes),
                "metric_by_epoch": dict(self._metric_by_epoch),
                "last_row": dict(self._last_row),
            },
            facts={**self._facts, "metrics": self._last_row},
        )

        def write() -> None:
            if not self._accelerator.is_main_process:
                return
            write_checkpoint(self._run.last, checkpoint)
            if keep_as is not None:
                self._keep(keep_as, best=best)

        self._coordinator.together(write)

    def _keep(self, epoch: int, *, best: bool) -> None:
        if best:
            self._run.keep_best()
        self._run.keep_epoch(epoch, self._metric_by_epoch, self.config.checkpoint_hist)

    def _obey_signals(self, *, saved: bool = False) -> None:
        signal_number = self._coordinator.maximum(self._stop.signal_number)
        if not signal_number:
            return
        if not saved:
            self._save()
        raise TrainingInterrupted(
            f"signal {signal_number} received: stopped after update {self._position.num_updates} "
            f"with a checkpoint in {self._run.last}; go on with --resume auto",
            signal_number,
        )


def _epoch_line(row: Mapping[str, float], num_epochs: int) -> str:
    parts = [f"epoch {int(row['epoch']) + 1}/{num_epochs}", f"loss {row['train_loss']:.4g}"]
    for name, label in (
        ("eval_top1", "top-1"),
        ("eval_top5", "top-5"),
        ("ema_eval_top1", "EMA top-1"),
    ):
        if name in row:
            parts.append(f"{label} {row[name]:.2f} %")
    parts.append(f"{row['samples_viewed']:,.0f} views")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    parts.append(f"{row['data_wait_share']:.0%} waiting for data")
    return "  ".join(parts)
