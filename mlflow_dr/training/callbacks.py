"""What happens at each step beside the training: figures to MLflow, and requests to stop."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

log = logging.getLogger(__name__)

SUMMARY = {
    # what Trainer logs once at the end; its mean loss is no point of the loss curve
    "train_loss": "mean_loss",
    "train_runtime": "runtime",
    "train_samples_per_second": "samples_per_second",
    "train_steps_per_second": "steps_per_second",
}
NO_FIGURES = ("total_flos", "step")


class MetricCallback(TrainerCallback):
    """Writes what Trainer logs as `train/...`, and a plain line where there is no progress bar.

    Args:
        write: takes figures and their step.
        known: the last step that has figures already; a resumed training passes it again.
    """

    def __init__(
        self, write: Callable[[Mapping[str, float], int], None], known: int | None = None
    ) -> None:
        self._write = write
        self._known = known

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write what was logged before a checkpoint that is resumed from, and never got there.

        Figures are sent by a thread, so a kill loses the last of them.
        """
        if state.is_world_process_zero:
            for logs in state.log_history:
                if not SUMMARY.keys() & logs.keys():
                    self._write_once(logs, int(logs["step"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the figures of this step."""
        if not state.is_world_process_zero:
            return
        self._write_once(logs or {}, state.global_step)
        if logs and "loss" in logs and not sys.stderr.isatty():
            log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])

    def _write_once(self, logs: Mapping[str, Any], step: int) -> None:
        values = {
            f"train/{SUMMARY.get(name, name)}": float(value)
            for name, value in logs.items()
            if isinstance(value, int | float) and name not in NO_FIGURES
        }
        if "train/mean_loss" in values:
            values.pop("train/epoch", None)  # the last step has it already
        elif self._known is not None and step <= self._known:
            values = {}
        if values := {name: value for name, value in values.items() if math.isfinite(value)}:
            self._write(values, step)


class StopCallback(TrainerCallback):
    """Ends training after the current step once asked to, in all processes after the same one.

    What can be resumed from is saved then, where checkpoints are saved at all.

    Attributes:
        reason: why, once asked.
        killed: whether a signal asked for it, to this process or to another.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.killed = False

    def ask(self, reason: str, killed: bool = False) -> None:
        """End after the current step; may be called from any thread."""
        self.killed = self.killed or killed
        self.reason = reason

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell Trainer."""
        if args.world_size > 1:
            mine = float(self.reason is not None) + float(self.killed)
            asked = torch.tensor(mine, device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            if asked.item() > mine:
                self.ask(self.reason or "another process was asked to stop", asked.item() > 1)
        if self.reason is not None and not control.should_training_stop:
            control.should_training_stop = True
            control.should_save = args.save_strategy != SaveStrategy.NO
