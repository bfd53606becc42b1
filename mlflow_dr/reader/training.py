"""Training the reader by Hugging Face's Trainer."""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from mlflow_dr.devices import resolve_device, resolve_dtype
from mlflow_dr.encoder.model import positions
from mlflow_dr.encoder.onednn import trained_by_onednn
from mlflow_dr.errors import CheckpointError, MlflowDrError, TrainingError, UsageError, one_line
from mlflow_dr.reader.batches import ReaderCollator, ReaderTrainingSet, by_question
from mlflow_dr.reader.config import ReaderTrainConfig
from mlflow_dr.reader.model import (
    ExtractiveReader,
    ReaderSource,
    length_batches,
    new_reader,
    reader_loss,
    save_reader,
)
from mlflow_dr.reader.preprocessing import reader_data
from mlflow_dr.reader.sequences import SequenceBuilder
from mlflow_dr.retrieval.encode import TOKENS_PER_BATCH
from mlflow_dr.tracking.checkpoints import fail_pending_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.descriptions import dated_name, describe_run
from mlflow_dr.tracking.runs import TrackedRun, open_run
from mlflow_dr.tracking.stop_request import StopWatcher, clear_stop_request
from mlflow_dr.training.callbacks import (
    MetricCallback,
    ScheduledPublishing,
    StopCallback,
    every_steps,
)
from mlflow_dr.training.disk_use import DiskUse, bytes_of
from mlflow_dr.training.encoder_setup import set_dropout
from mlflow_dr.training.process import stop_on_signals, use_one_gpu
from mlflow_dr.training.publishing import Publisher, published_checkpoints

log = logging.getLogger(__name__)

LOSS_METRIC = "train/loss"
RUN_FILE = "mlflow_run_id.txt"
"""Names the run in the output directory, for a training that is resumed."""


class ReaderTraining(NamedTuple):
    """What a training did.

    Attributes:
        steps: those that were done, in all.
        questions: those that were learnt from.
        loss: mean loss of a step.
        real_tokens: share of the tokens that are not padding.
    """

    steps: int
    questions: int
    loss: float
    real_tokens: float


class ReaderTrainer(Trainer):
    """Trainer with the reader's loss. Arguments as Hugging Face's Trainer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.remove_callback(PrinterCallback)
        self._tokens = self._computed = 0

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as Trainer does; linear layers are computed by oneDNN where that is faster."""
        with trained_by_onednn(cast("nn.Module", self.model), self.args):
            return super().train(*arguments, **options)

    @property
    def real_tokens(self) -> float:
        """Share of the tokens so far that are not padding; 1 before the first."""
        return self._tokens / self._computed if self._computed else 1.0

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch, summed over its questions."""
        logits = model(inputs["input_ids"], inputs["attention_mask"])
        relevance, positives = by_question(logits.relevance, inputs["places"])
        loss = reader_loss(
            relevance,
            logits.starts[positives],
            logits.ends[positives],
            inputs["spans"],
            inputs["span_mask"],
        )
        if not math.isfinite(float(loss.detach())):
            raise TrainingError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}; try a lower "
                "--learning-rate or --dtype fp32"
            )
        self._count(inputs["attention_mask"])
        return (loss, logits) if return_outputs else loss

    def _count(self, mask: Tensor) -> None:
        lengths = mask.sum(dim=1).cpu().numpy()
        self._tokens += int(lengths.sum())
        batches = length_batches(lengths, TOKENS_PER_BATCH[mask.device.type])
        self._computed += sum(len(rows) * int(lengths[rows].max()) for rows in batches)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Run one epoch; the training set gets its number here, also after resuming."""
        self.train_dataset.set_epoch(options["epoch"])  # type: ignore[union-attr]
        super()._run_epoch(*arguments, **options)


def train_reader(config: ReaderTrainConfig) -> ReaderTraining | None:
    """Train a reader and write it to `output_dir`.

    Under torchrun every process calls this; the first one writes.

    Returns:
        What was done; None in all processes but the first.

    Raises:
        UsageError: the output exists, there is nothing to resume from, or the model is none to read
            with.
        DataError: the results cannot be read, or there is nothing to learn from.
        CheckpointError: the model's files, or the checkpoint to resume from, are damaged.
        TrainingError: the loss is not a finite number.
        TrackingError: the tracking server cannot be reached, or the last checkpoint was not
            published.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and the reader published.
    """
    checkpoint = _checkpoint(config)
    arguments = training_arguments(config)
    if arguments.process_index > 0:
        logging.getLogger("mlflow_dr").setLevel(logging.WARNING)
    set_seed(config.seed)
    reader, tokenizer = new_reader(config.model, config.tracking_uri)
    check_length(reader, config.sequence_length)
    if config.dropout is not None:
        set_dropout(reader, config.dropout)
    with arguments.main_process_first(desc="preparing the reader's data"):
        data = reader_data(
            config.train_file, SequenceBuilder(tokenizer), training=True, gold=config.gold_passages
        )
    training_set = ReaderTrainingSet(
        data,
        config.sequence_length,
        config.passages_per_question,
        config.max_n_answers,
        config.seed,
    )
    use_one_gpu(arguments)
    stop = StopCallback()
    trainer = ReaderTrainer(
        model=reader,
        args=arguments,
        train_dataset=training_set,
        data_collator=ReaderCollator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
        callbacks=[stop],
    )
    if arguments.process_index > 0:
        with stop_on_signals(stop, says=False):
            _train(trainer, checkpoint)
        return None
    log.info("training %s on %d questions", config.model, len(training_set))
    loss = _train_tracked(trainer, stop, config, checkpoint)
    return ReaderTraining(trainer.state.global_step, len(training_set), loss, trainer.real_tokens)


def _train_tracked(
    trainer: ReaderTrainer, stop: StopCallback, config: ReaderTrainConfig, checkpoint: str | None
) -> float:
    """Train in the process that writes to MLflow; returns the mean loss."""
    run = open_reader_run(config, checkpoint)
    reader: Any = trainer.model
    source = ReaderSource(reader, trainer.processing_class)
    with run.finish_on_exit("training the reader"), ExitStack() as ending:
        publisher = Publisher(run, source, published_checkpoints(run), on_refused=stop.ask)
        ending.callback(publisher.close)
        ending.callback(StopWatcher(run, stop.ask).close)
        ending.enter_context(stop_on_signals(stop, says=True))
        last_step = run.last_step(LOSS_METRIC) if checkpoint else None
        schedule = every_steps(config.publish_steps)
        trainer.add_callback(MetricCallback(run.log_metrics, last_step))
        size = bytes_of(reader.state_dict().values())
        trainer.add_callback(DiskUse(run, size, schedule, initial=False))
        trainer.add_callback(ScheduledPublishing(publisher.publish, schedule, initial=False))
        loss = _train(trainer, checkpoint)
        publisher.close()
        if stop.killed:
            raise KeyboardInterrupt
        save_reader(config.output_dir, source.reader, source.tokenizer)
        if (error := publisher.error()) is not None:
            raise error
        if stop.reason:
            log.info("training ended as asked: %s", stop.reason)
    return loss


def open_reader_run(config: ReaderTrainConfig, checkpoint: str | None) -> TrackedRun:
    """The run of a training: a new one, or that of the training which is resumed."""
    client = connect(config.tracking_uri)
    note = config.output_dir / RUN_FILE
    run_id = note.read_text(encoding="utf-8").strip() if checkpoint and note.exists() else None
    usual = dated_name(config.train_file.stem, "reader", config.model)
    run = open_run(client, config.experiment_name, run_id, config.run_name, usual)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(run.id, encoding="utf-8")
    log.info("run %s (%s)", run.id, run.name)
    if run_id is not None:
        clear_stop_request(run)
        fail_pending_checkpoints(run)
    else:
        run.log_params({name: str(value) for name, value in config.model_dump().items()})
    describe_run(run)
    return run


def training_arguments(config: ReaderTrainConfig) -> TrainingArguments:
    """Hugging Face's arguments of a configuration."""
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    return TrainingArguments(
        output_dir=str(config.output_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_eps,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        logging_steps=config.log_batch_step,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
        ddp_find_unused_parameters=False,
    )


def check_length(reader: ExtractiveReader, length: int) -> None:
    """Refuse sequences that are longer than the backbone's positions.

    Raises:
        UsageError: with both numbers.
    """
    most = positions(reader.backbone)
    if most is not None and length > most:
        raise UsageError(
            f"--sequence-length {length}: the model reads at most {most} tokens; pass that or less"
        )


def _checkpoint(config: ReaderTrainConfig) -> str | None:
    """The checkpoint to resume from; None if training begins."""
    output = Path(config.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if config.resume:
        if last is None:
            raise UsageError(
                f"{output}: no checkpoint to resume from; train without --resume, and with "
                "--save-steps to have some"
            )
        return last
    if not config.force and (last or (output / "config.json").exists()):
        raise UsageError(
            f"{output} has a reader or its checkpoints already; --resume continues the training, "
            "--force trains anew"
        )
    if int(os.environ.get("RANK", "0")) == 0:
        for old in output.glob("checkpoint-*"):  # they would be resumed from
            shutil.rmtree(old)
    return None


def _train(trainer: ReaderTrainer, checkpoint: str | None) -> float:
    """Train to the end, from a checkpoint or from the start; returns the mean loss."""
    from mlflow_dr.encoder.backbone import quiet_transformers

    try:
        with quiet_transformers():
            return float(trainer.train(resume_from_checkpoint=checkpoint).training_loss)
    except (MlflowDrError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if checkpoint is None:
            raise
        raise CheckpointError(
            f"{checkpoint}: does not fit this training ({one_line(error)}); resume with the flags "
            "that the training began with, or train anew with --force"
        ) from error
