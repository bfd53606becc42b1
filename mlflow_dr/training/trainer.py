"""Hugging Face's Trainer with the contrastive loss, and the callbacks that write to MLflow."""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mlflow_dr.encoder.directory import save_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.training.batches import Collator, TrainingSet
from mlflow_dr.training.grad_cache import Texts, cached_vectors
from mlflow_dr.training.loss import contrastive_loss
from mlflow_dr.training.publishing import Publisher

log = logging.getLogger(__name__)

SUMMARY = {
    # what Trainer logs once at the end; its mean loss is no point of the loss curve
    "train_loss": "mean_loss",
    "train_runtime": "runtime",
    "train_samples_per_second": "samples_per_second",
    "train_steps_per_second": "steps_per_second",
}


class RetrieverTrainer(Trainer):
    """The Trainer, with two texts per example and the contrastive loss.

    Args:
        encoder: what is trained.
        arguments: Hugging Face's training arguments.
        training_set: groups of a query and its passages.
        collator: groups to token ids.
        temperature: divides the scores.
        callbacks: called at each step.
        chunk_sizes: texts in a chunk of the gradient cache, by role; None without it.
    """

    def __init__(
        self,
        encoder: Encoder,
        arguments: TrainingArguments,
        training_set: TrainingSet,
        collator: Collator,
        temperature: float,
        callbacks: list[TrainerCallback],
        chunk_sizes: Mapping[str, int] | None = None,
    ) -> None:
        arguments.remove_unused_columns = False
        arguments.disable_tqdm = arguments.disable_tqdm or not sys.stderr.isatty()
        super().__init__(
            model=encoder,
            args=arguments,
            train_dataset=training_set,
            data_collator=collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self._temperature = temperature
        self._chunk_sizes = chunk_sizes

    def compute_loss(  # type: ignore[override]  # two texts for each example
        self,
        model: Any,
        inputs: Mapping[str, Mapping[str, Tensor]],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch."""

        def encode(texts: Mapping[str, Texts]) -> dict[str, Tensor]:
            return {role: model(**one) for role, one in texts.items()}

        if self._chunk_sizes:
            no_sync = partial(self.accelerator.no_sync, model)
            vectors = cached_vectors(encode, inputs, self._chunk_sizes, no_sync)
        else:
            vectors = encode(inputs)
        loss = contrastive_loss(vectors["query"], vectors["passage"], self._temperature)
        return (loss, vectors) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the encoder's directory where Trainer wants its checkpoint."""
        directory = Path(output_dir or str(self.args.output_dir))
        fresh = directory / "encoder.partial"
        save_encoder(fresh, self.accelerator.unwrap_model(self.model), state_dict)
        for item in fresh.iterdir():
            target = directory / item.name
            if target.is_dir():
                shutil.rmtree(target)
            item.replace(target)
        fresh.rmdir()


class PublishCallback(TrainerCallback):
    """Submits the encoder every so many steps, before the first one if asked, and at the end."""

    def __init__(self, publisher: Publisher, every: int, initial: bool) -> None:
        self._publisher = publisher
        self._every = every
        self._initial = initial

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish the encoder as it is before training."""
        if self._initial and state.global_step == 0:
            self._publisher.submit(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish when it is time."""
        if self._every and state.global_step % self._every == 0:
            self._publisher.submit(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish the last step, unless it was."""
        if self._publisher.last_step != state.global_step:
            self._publisher.submit(state.global_step)


class MetricCallback(TrainerCallback):
    """Writes what Trainer logs as `train/...`, and a plain line where there is no progress bar."""

    def __init__(self, write: Callable[[Mapping[str, float], int], None]) -> None:
        self._write = write

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write the figures of this step."""
        values = {
            f"train/{SUMMARY.get(name, name)}": float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, int | float) and name != "total_flos"
        }
        if "train/mean_loss" in values:
            values.pop("train/epoch", None)  # the last step has it already
        self._write({k: v for k, v in values.items() if math.isfinite(v)}, state.global_step)
        if logs and "loss" in logs and not sys.stderr.isatty():
            log.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])


class StopCallback(TrainerCallback):
    """Ends training after the current step once asked to."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """End after the current step."""
        self.reason = reason

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell Trainer."""
        if self.reason:
            control.should_training_stop = True
