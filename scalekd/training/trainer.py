"""The training loop: Accelerate for devices, precision and processes, timm for everything around.

One optimiser update is the unit of everything: losses are logged and checkpoints saved between
updates, signals are obeyed there, and a resumed run starts there. The host never waits for an
accelerator between two lines of the log: results are read one line later (`Meter`), and a step
whose gradient is not finite is left out on the device (`GuardedStep`). The processes exchange one
integer every ten updates. A process that fails trains on until then with gradients that are not
numbers, so that no process updates anything and none waits for another.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from scalekd.distributed import Coordinator, process_faults
from scalekd.errors import DataError, TrainingInterrupted, UsageError
from scalekd.signals import StopRequest
from scalekd.training.checkpoint import Position
from scalekd.training.compilation import compile_faults, compile_parts
from scalekd.training.config import TrainConfig
from scalekd.training.feed import num_batches, on_device
from scalekd.training.guarded_step import GuardedStep
from scalekd.training.interfaces import (
    Choose,
    EpochLoader,
    Evaluate,
    TrainResult,
    by_metric,
    by_training_loss,
    evaluated,
)
from scalekd.training.logs import RunningMeans
from scalekd.training.lookout import Lookout
from scalekd.training.meter import Meter
from scalekd.training.module import DistillationModule, StepOutput, hold_frozen_norms, norm_faults
from scalekd.training.optim import build_optimizer, build_scheduler, clip_gradients, current_rate
from scalekd.training.random_state import preserved_random_state
from scalekd.training.run_writer import RunWriter
from scalekd.training.state import TrainingState, read_same_run
from scalekd.training.targets import Batch


class Trainer:
    """Trains a student as configured, from the start or from a checkpoint of its run folder.

    Args:
        config: Configuration of the run.
        accelerator: Made with the configured precision.
        module: Student (with the bare timm model as ``.model``) and objective.
        loader: Batches of this process.
        targets: Makes a batch's targets, on the device.
        evaluate: Called on the student, and on its average, at the end of epochs.
        choose: Decides which epoch is the best; by default by top-1, or by the training loss
            without ``evaluate``.
        facts: JSON stored in every checkpoint: describes the weights for `scalekd.export`; its
            ``measure`` is that of `RunWriter`.
        notes: Sentences to show before the first update.
        late: Read measurements of the device one log line later; by default on accelerators.

    Raises:
        UsageError: The optimiser, schedule or run folder cannot be made as configured.
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
        choose: Choose | None = None,
        facts: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        late: bool | None = None,
    ) -> None:
        self.config = config
        self._accelerator = accelerator
        self._coordinator = Coordinator(accelerator.num_processes)
        self._loader = loader
        self._evaluate = evaluate
        self._choose = choose or (by_training_loss if evaluate is None else by_metric("top1"))
        self._facts = dict(facts or {})
        self._notes = tuple(notes)
        self._writer = RunWriter(config, accelerator, self._coordinator, self._facts.get("measure"))
        self._run = self._writer.folder
        self._stop = StopRequest()

        self._num_batches = num_batches(loader, self._coordinator, config.batch_size)
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

        # A CPU computes while the host waits, so there looking at every update costs nothing.
        self._late = accelerator.device.type != "cpu" if late is None else late
        self._meter = Meter(config.log_interval, late=self._late)
        self._step = GuardedStep(
            self._optimizer, self._trainable, scaled=accelerator.scaler is not None
        )
        self._position = Position()
        self._lookout = Lookout(
            self._meter,
            self._coordinator,
            self._writer,
            self._stop,
            scaled=accelerator.scaler is not None,
        )
        self._feed: Iterator[Batch] = iter(())
        self._last_batch: Batch = {}  # of several processes

    # -- the run -------------------------------------------------------------------------------

    @process_faults()
    def fit(self) -> TrainResult:
        """Train to the last epoch.

        Raises:
            TrainingInterrupted: A signal came; a checkpoint was written.
            TrainingDiverged: A loss or gradient is not finite; nothing was updated with it.
            ScaleKDError: Data, cache, disk or another process failed.
        """
        writing = self._writer.writing(
            num_epochs=self.num_epochs, updates_per_epoch=self._updates_per_epoch
        )
        with self._stop.listening(), writing:
            self._start()
            while self._position.epoch < self.num_epochs:
                self._train_epoch()
                self._finish_epoch()
        return TrainResult(
            output=str(self._run.root),
            epochs=self._position.epoch,
            samples_viewed=self._position.samples_viewed,
            metrics=self._writer.last_row,
            best_epoch=self._writer.best_epoch,
            best_metric=self._writer.best_metric,
        )

    def _start(self) -> None:
        path, notes = self._writer.claim()
        # Dropout draws differ between processes; nothing drawn before this moment matters.
        set_seed(self.config.seed + self._accelerator.process_index)
        if path is not None:
            notes = [*notes, *self._resume(path)]
            self._writer.copy_again(path, self._position)
        for note in (*self._notes, *notes):
            self._writer.say(note)
        self._writer.start(self._position)
        self._step_schedule(epoch=self._position.epoch)

    def _resume(self, path: Path) -> list[str]:
        objective = self._module.objective
        checkpoint = self._coordinator.together(
            lambda: read_same_run(
                path,
                self._facts,
                cache=self.config.cache or self.config.data_dir,
                has_teacher=objective.needs_features or objective.needs_logits,
            )
        )
        notes = self._coordinator.together(lambda: self._state.restore(checkpoint))
        was, now = (facts.get("cache_id") for facts in (checkpoint.facts, self._facts))
        if was and now and was != now:
            notes.append(f"cache_id was {was!r} and is now {now!r}")
        self._position = checkpoint.position
        meters = checkpoint.training.get("meters")
        try:
            self._meter.epoch.merge(meters["epoch"])  # type: ignore[index]
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: the checkpoint's means are damaged: {error!r}") from error
        notes += self._writer.restore(meters, path)  # type: ignore[arg-type]
        where = (
            f"{path}: resuming at epoch {self._position.epoch + 1}, update "
            f"{self._position.num_updates}, after {self._position.samples_viewed:,} views"
        )
        return [where, *notes]

    # -- an epoch ------------------------------------------------------------------------------

    def _train_epoch(self) -> None:
        self._module.train()
        hold_frozen_norms(self._module.student)
        done = self._start_batch()
        if done < self._num_batches:
            self._open_feed(done)
        self._meter.start()
        while done < self._num_batches:
            group = min(self.config.grad_accum_steps, self._num_batches - done)
            num_views = self._update(group)
            done += group
            last = done == self._num_batches
            self._position = replace(
                self._position,
                epoch_samples=self._position.epoch_samples + num_views,
                num_updates=self._position.num_updates + 1,
                samples_viewed=self._position.samples_viewed + num_views,
            )
            self._step_schedule()
            logged = last or self._position.num_updates % self.config.log_interval == 0
            if logged or self._meter.is_full:
                self._meter.end(self._position, current_rate(self._optimizer), logged=logged)
            signal_number = self._lookout.look(self._position, everything=last)
            if last:
                break
            self._stop_for(signal_number)
            interval = self.config.recovery_interval
            if interval and self._position.num_updates % interval == 0:
                self._save()

    def _start_batch(self) -> int:
        per_batch = self.config.batch_size * self._accelerator.num_processes
        start, repeated = divmod(self._position.epoch_samples, per_batch)
        if repeated and start < self._num_batches:
            self._writer.say(
                f"batches have {per_batch} views now: {repeated} views of this epoch are trained "
                "on a second time"
            )
            self._position = replace(self._position, epoch_samples=start * per_batch)
        return int(start)

    def _open_feed(self, start: int) -> None:
        with preserved_random_state():
            batches = iter(self._loader.epoch(self._position.epoch, start_batch=start))
            feed = on_device(batches, self._accelerator.device)
            # Together, so that every process has a batch before any needs a gradient of all.
            first = self._coordinator.together(lambda: next(feed, None))
        self._feed = feed if first is None else chain([first], feed)

    def _update(self, num_micro_batches: int) -> int:
        """Make one optimiser update; return its number of views over all processes."""
        reports: list[Tensor] = []
        names: list[str] = []
        num_views = 0
        for micro in range(num_micro_batches):
            batch = self._next_batch()
            num_views += len(batch["label"]) * self._accelerator.num_processes
            final = micro == num_micro_batches - 1
            sync = contextlib.nullcontext() if final else self._accelerator.no_sync(self._model)
            with sync, compile_faults(self.config.torchcompile):
                output = self._forward(batch)
                terms = {"loss": output.losses["total"]}
                terms |= {n: value for n, value in output.losses.items() if n != "total"}
                report = torch.stack(
                    [v.detach().float() for v in (terms | output.metrics).values()]
                )
                # Times one, or not a number on every process: the gradients are summed over all.
                # Top-1 is not a number where no view of a batch has a label.
                losses = report[: len(terms)]
                sound = torch.isfinite(losses).all() & (self._lookout.failure is None)
                factor = torch.where(sound, 1.0, torch.nan)
                self._accelerator.backward(output.losses["total"] / num_micro_batches * factor)
            names = [*terms, *output.metrics]
            reports.append(report)
        norm = self._clip_gradients()
        means = torch.stack(reports).mean(dim=0)
        row = self._meter.add(
            dict(zip([*names, "grad_norm"], [*means, norm], strict=True)), num_views
        )
        if self._late:
            self._step(norm)
        else:
            self._check_finite(self._meter.named(row))
            if self._lookout.failure is None:
                self._optimizer.step()
        self._optimizer.zero_grad()
        if self._ema is not None:
            self._ema.update(self._state.student, step=self._position.num_updates + 1)
        return num_views

    def _next_batch(self) -> Batch:
        before = time.monotonic()
        try:
            batch = next(self._feed, None)
            if batch is None:
                raise UsageError(
                    f"the loader ended an epoch before its {self._num_batches} batches were read"
                )
        except Exception as error:
            if self._coordinator.is_alone:
                raise
            # The other processes wait for this gradient before they can receive the error.
            self._lookout.fail(error)
            return self._last_batch
        self._meter.waiting(time.monotonic() - before)
        if not self._coordinator.is_alone:
            self._last_batch = batch
        return batch

    def _forward(self, batch: Batch) -> StepOutput:
        with torch.no_grad():
            targets = self._targets(batch)
        with norm_faults(len(batch["label"])):
            output: StepOutput = self._model(batch["pixels"], batch["label"], targets)
        return output

    def _clip_gradients(self) -> Tensor:
        self._accelerator.unscale_gradients(self._optimizer)
        return clip_gradients(self._trainable, self.config, self._state.student)

    def _check_finite(self, values: Mapping[str, float]) -> None:
        self._lookout.check(values, self._position)
        if self._coordinator.is_alone:
            self._lookout.raise_failure()

    # -- between updates -----------------------------------------------------------------------

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

    def _save(self, *, best: bool = False, keep_as: int | None = None) -> None:
        self._meter.end(self._position, current_rate(self._optimizer), logged=False)
        self._lookout.look(self._position, everything=True)
        # On resume every process takes its share of the means of all.
        means = self._lookout.over_processes(self._meter.epoch)
        checkpoint = self._state.capture(
            self._position,
            self._coordinator,
            meters={
                "epoch": means.state(shares=self._accelerator.num_processes),
                **self._writer.state(),
            },
            facts={**self._facts, "metrics": self._writer.last_row},
        )
        self._writer.save(checkpoint, best=best, keep_as=keep_as)

    def _stop_for(self, signal_number: int, *, saved: bool = False) -> None:
        if not signal_number:
            return
        if not saved:
            self._save()
        raise TrainingInterrupted(
            f"signal {signal_number} received: stopped after update {self._position.num_updates} "
            f"with a checkpoint in {self._run.last}; continue with --resume auto",
            signal_number,
        )

    # -- between epochs ------------------------------------------------------------------------

    def _finish_epoch(self) -> None:
        epoch = self._position.epoch
        row = self._lookout.epoch_row(self._position, current_rate(self._optimizer))
        self._state.share_buffers()
        last = epoch + 1 == self.num_epochs
        if self._evaluate is not None and ((epoch + 1) % self.config.eval_interval == 0 or last):
            # A corrupt image, or a scheduler that waits no longer, costs the evaluation only: a run
            # resumed from here trains nothing more in this epoch and evaluates.
            self._save()
            self._obey_signals()
            average = None if self._ema is None else self._ema.module
            row |= evaluated(self._evaluate, self._state.student, average)
        metric = self._choose(row)
        self._meter.epoch = RunningMeans()
        self._position = replace(self._position, epoch=epoch + 1, epoch_samples=0)
        self._step_schedule(epoch=epoch + 1)
        best = self._writer.end_epoch(row, metric)
        self._save(best=best, keep_as=epoch)
        self._writer.announce_epoch(row, step=self._position.num_updates)
        if not last:
            self._obey_signals()

    def _obey_signals(self) -> None:
        """Stop where a signal came, just after a checkpoint was written."""
        self._stop_for(self._coordinator.maximum(self._stop.signal_number), saved=True)
