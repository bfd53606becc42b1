"""Trainer callbacks: metrics to MLflow, checkpoints on a schedule, requests to stop."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.devices import begin_host_copy
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.data_metrics import DataMetrics

log = logging.getLogger(__name__)

SUMMARY = {
    # Trainer logs these once at the end; its mean loss is not a point of the loss curve
    "train_loss": "mean_loss",
    "train_runtime": "runtime",
    "train_samples_per_second": "samples_per_second",
    "train_steps_per_second": "steps_per_second",
}
SUMMARY_TAG = "mlflow_dr.training_summary"
NOT_METRICS = ("total_flos", "step")
SUMMARY_KEY = "train_runtime"
"""Trainer logs this once, after the last step and before its callbacks end the run."""


class MetricCallback(TrainerCallback):
    """Writes what Trainer logs as `train/...`, and logs a line if there is no progress bar.

    Args:
        write: takes metrics and their step.
        last_step: the last step whose metrics the run has; a resumed training logs it again.
        data: metrics that are written with each loss.
        summarise: takes Trainer's figures of the whole training; they have no curve.
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, float], int], None],
        last_step: int | None = None,
        data: DataMetrics | None = None,
        summarise: Callable[[Mapping[str, float]], None] = lambda values: None,
    ) -> None:
        self._write = write
        self._summarise = summarise
        self._last_step = last_step
        self._data = data

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Write the metrics before the checkpoint to resume from that a killed training lost.

        A thread sends metrics, so a kill loses the last of them.
        """
        if state.is_world_process_zero:
            for logs in state.log_history:
                if not SUMMARY.keys() & logs.keys():
                    self._write_once(logs, int(logs["step"]))
        if self._data is not None:
            self._data.begin()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Write the metrics of this step."""
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        if SUMMARY.keys() & logs.keys():
            self._summarise({SUMMARY[name]: logs[name] for name in SUMMARY if name in logs})
            return
        data = None
        if self._data is not None and "loss" in logs:
            data = self._data.take(args.world_size)
        self._write_once(logs, state.global_step, data)
        if "loss" in logs and not sys.stderr.isatty():
            log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def _write_once(
        self, logs: Mapping[str, Any], step: int, data: Mapping[str, float] | None = None
    ) -> None:
        values = {
            f"train/{name}": float(value)
            for name, value in logs.items()
            if isinstance(value, int | float) and name not in NOT_METRICS
        }
        values.update(data or {})
        if self._last_step is not None and step <= self._last_step:
            values = {}
        if values := {name: value for name, value in values.items() if math.isfinite(value)}:
            self._write(values, step)


class StopCallback(TrainerCallback):
    """Ends training after the current step when asked to.

    Several processes end after the same step, one later: no GPU is waited for to ask the others.
    If the training saves checkpoints, it then saves one to resume from.

    Attributes:
        reason: why training was asked to stop; None if it was not.
        killed: whether a signal asked for it, in this process or in another.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.killed = False
        self._answer: Callable[[], Tensor] | None = None  # of all processes, in the step before

    def ask(self, reason: str, killed: bool = False) -> None:
        """End after the current step, or the next one. Any thread may call this."""
        self.killed = self.killed or killed
        self.reason = reason

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Tell Trainer."""
        is_asked = self.reason is not None if args.world_size == 1 else self._ask_all(args.device)
        if is_asked and not control.should_training_stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO

    def _ask_all(self, device: torch.device) -> bool:
        """Whether any process was asked to stop before the last call, which all know by now."""
        answer = self._answer
        mine = float(self.reason is not None) + float(self.killed)
        highest = torch.full((), mine, device=device)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        self._answer = begin_host_copy(highest)
        before = 0.0 if answer is None else answer().item()
        if before > mine:
            self.ask(self.reason or "another process was asked to stop", before > 1)
        return before > 0


def every_steps(every: int, epoch: int = 0) -> Callable[[int], bool]:
    """A function that says after which steps a checkpoint is published.

    Args:
        every: steps between two checkpoints; 0 for none.
        epoch: steps of an epoch, if the steps are counted anew in each epoch and the end of an
            epoch has a checkpoint, too; 0 to count from the start of training.
    """

    def publishes(step: int) -> bool:
        counted = step % epoch if epoch else step
        return every > 0 and counted % every == 0

    return publishes


def publish_schedule(request: TrainingRequest, examples: int) -> Callable[[int], bool]:
    """When a training on this number of examples publishes.

    GC-DPR's `--eval_per_epoch n` means every `ceil(steps of an epoch / n)` steps of an epoch, and
    its end.
    """
    if request.publish.publish_per_epoch is None:
        return every_steps(request.publish.publish_steps)
    trainer = request.trainer
    batch = trainer.train_batch_size * trainer.world_size
    batches = examples // batch if trainer.dataloader_drop_last else math.ceil(examples / batch)
    epoch = max(1, math.ceil(batches / trainer.gradient_accumulation_steps))
    return every_steps(math.ceil(epoch / request.publish.publish_per_epoch), epoch)


class ScheduledPublishing(TrainerCallback):
    """Publishes on a schedule, and optionally before the first and after the last step.

    Args:
        publish: called with each step to publish, in every process.
        schedule: says for a step whether to publish; None publishes whenever the trainer saves.
        initial: whether to publish before the first step.
        final: whether to publish after the last step.
    """

    def __init__(
        self,
        publish: Callable[[int], object],
        schedule: Callable[[int], bool] | None,
        initial: bool = True,
        final: bool = True,
    ) -> None:
        self._publish_step = publish
        self._schedule = schedule
        self._initial = initial
        self._final = final
        self._last_step: int | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish the model as it is before training."""
        self._last_step = None
        if self._initial and state.global_step == 0:
            self._submit(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish if the schedule says so."""
        if self._schedule is not None and self._schedule(state.global_step):
            self._submit(state)

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish with the trainer's own checkpoint, if there is no schedule."""
        if self._schedule is None:
            self._submit(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Publish the last step, before the run is ended."""
        if SUMMARY_KEY in (logs or {}):
            self.end(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish the last step, for a trainer that logs no summary."""
        self.end(state)

    def end(self, state: TrainerState) -> None:
        """Publish the last step, unless that is done."""
        if self._final and self._last_step != state.global_step:
            self._submit(state)

    def _submit(self, state: TrainerState) -> None:
        self._last_step = state.global_step
        self._publish_step(state.global_step)
