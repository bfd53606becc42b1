"""Hugging Face's Trainer with a loss of queries and passages, and checkpoints to resume from.

It overrides private methods of Trainer, which `mlflow_dr/compat.py` lists.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from mlflow_dr import compat
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.onednn import trained_by_onednn
from mlflow_dr.encoder.saving import restore_encoder, save_encoder
from mlflow_dr.errors import CheckpointError, MlflowDrError, one_line
from mlflow_dr.files import grant_umask_modes, is_full
from mlflow_dr.training.batches import (
    LENGTHS,
    PASSAGE,
    QUERY,
    QUERY_IDS,
    Collator,
    Group,
)
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.data_metrics import Supply
from mlflow_dr.training.grad_cache import cached_vectors
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.loss_check import LossCheck
from mlflow_dr.training.resume import mark_complete

log = logging.getLogger(__name__)

PROGRESS_FILE = "mlflow_dr_progress.json"


@dataclass(frozen=True)
class TrainerParts:
    """What a trainer of an encoder is made of.

    Attributes:
        encoder: the encoder to train.
        arguments: Hugging Face's training arguments.
        training_set: groups of a query and its passages.
        collator: makes token ids of groups.
        objective: the loss.
        callbacks: called at each step.
        chunk_sizes: texts in a chunk of the gradient cache, by role; None without the cache.
        run_id: the MLflow run, noted in checkpoints to resume from.
        trust_remote_code: whether code in a checkpoint may run when training resumes from it.
        supply: counts the batches that the data loader gives.
        losses: checks losses.
        packs_texts: whether texts may lie end to end, with an attention of our own.
    """

    encoder: Encoder
    arguments: TrainingArguments
    training_set: Dataset[Group]
    collator: Collator
    objective: Objective
    callbacks: Sequence[TrainerCallback] = ()
    chunk_sizes: Mapping[str, int] | None = None
    run_id: str = ""
    trust_remote_code: bool = False
    supply: Supply = field(default_factory=Supply)
    losses: LossCheck = field(default_factory=LossCheck)
    packs_texts: bool = True


class RetrieverTrainer(Trainer):
    """Trainer for an encoder, with queries and passages in each batch."""

    def __init__(self, parts: TrainerParts) -> None:
        arguments = parts.arguments
        arguments.remove_unused_columns = False
        arguments.disable_tqdm = arguments.disable_tqdm or not sys.stderr.isatty()
        arguments.logging_nan_inf_filter = False  # `LossCheck` does it
        if arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = False
        if arguments.ddp_broadcast_buffers is None:
            arguments.ddp_broadcast_buffers = False
        is_plain = not arguments.fsdp and not arguments.torch_compile
        super().__init__(
            model=BiEncoder(parts.encoder, is_plain, parts.packs_texts and is_plain),
            args=arguments,
            train_dataset=parts.training_set,
            data_collator=parts.collator,
            callbacks=[*parts.callbacks, _Progress(self)],
        )
        self.remove_callback(PrinterCallback)
        self._encoder = parts.encoder
        self._objective = parts.objective
        self._chunk_sizes = parts.chunk_sizes
        self._run_id = parts.run_id
        self._trust_remote_code = parts.trust_remote_code
        self.resumed_progress: dict[str, float] | None = None
        self._supply = parts.supply
        self.losses = parts.losses

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train as Trainer does; linear layers are computed by oneDNN where that is faster."""
        with trained_by_onednn(self._encoder, self.args):
            return super().train(*arguments, **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's data loader, with a random generator of its own to seed its workers.

        Persistent workers are seeded once. With torch's global generator, a resumed training would
        seed them at another step, and dropout would then draw other numbers.

        Trainer copies batches to the device before it uses them. If accelerate's loader did it, the
        copy would wait for the step before, and this would count as waiting for data.
        """
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        if inner is not loader and not self.accelerator.non_blocking:
            loader.device = None
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step, as Trainer takes them, counted by the supply."""
        batches = self._supply.timed(epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch."""
        lengths = inputs.get(LENGTHS, {})
        texts = {role: {**inputs[role], LENGTHS: lengths.get(role)} for role in (QUERY, PASSAGE)}
        if self._chunk_sizes:
            no_sync = partial(self.accelerator.no_sync, model)
            vectors = cached_vectors(model, texts, self._chunk_sizes, no_sync)
        else:
            vectors = model(texts)
        loss = self._objective(
            vectors[QUERY], vectors[PASSAGE], inputs.get("keys"), inputs.get("teacher")
        )
        self.losses.note(loss, self.state.global_step + 1, inputs.get(QUERY_IDS, []))
        return (loss, vectors) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the encoder into Trainer's checkpoint."""
        if not self.args.should_save:
            return
        directory = Path(output_dir or str(self.args.output_dir))
        fresh = directory / "encoder.partial"
        if state_dict is not None:
            prefix = "encoder."
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        save_encoder(fresh, self._encoder, state_dict, merged=False)
        for item in fresh.iterdir():
            target = directory / item.name
            if target.is_dir():
                shutil.rmtree(target)
            item.replace(target)
        fresh.rmdir()
        grant_umask_modes(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        restore_encoder(Path(resume_from_checkpoint), self._encoder, self._trust_remote_code)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load as Trainer does; an error is one line."""
        with _resuming(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load as Trainer does; an error is one line."""
        with _resuming(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load as Trainer does; an error is one line."""
        with _resuming(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint to resume from, and mark it as complete at the very end.

        If the disk is full, this checkpoint is lost and training goes on.
        """
        self.losses.check()
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        if main:
            shutil.rmtree(directory, ignore_errors=True)  # a killed training may have left it
        self.accelerator.wait_for_everyone()
        progress = self._progress()
        # older checkpoints are deleted only when this one is complete
        kept, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main and not self.args.save_only_model:
                (directory / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
                mark_complete(directory, self._run_id)
        except (OSError, SafetensorError, RuntimeError) as error:
            if self.args.world_size > 1 or not is_full(error, directory.parent):
                raise
            shutil.rmtree(directory, ignore_errors=True)
            log.error("%s was not saved, the disk is full: %s", directory, one_line(error))
        finally:
            self.args.save_total_limit = kept
        if main and kept:
            rotate_checkpoints(
                output_dir=str(directory.parent),
                save_total_limit=kept,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _progress(self) -> dict[str, float]:
        """The sums of losses, which Trainer does not save in a checkpoint."""
        loss, total, logged = compat.loss_progress(self)
        loss = loss.detach().clone()
        if self.args.world_size > 1:
            distributed.all_reduce(loss)
            loss /= self.args.world_size
        return {"loss": loss.item(), "total": total, "logged": logged}

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Run one epoch, unless all steps are done: Trainer would do one more.

        The training set gets the number of the epoch here: accelerate 1.15 does not set it under
        torchrun, and not when it skips the batches that were read before a resumption.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if set_epoch := getattr(self.train_dataset, "set_epoch", None):
            set_epoch(options["epoch"])
        super()._run_epoch(*arguments, **options)

    def restore_progress(self) -> None:
        """Continue the sums of losses of the checkpoint."""
        if self.resumed_progress:
            progress = self.resumed_progress
            logged = int(progress["logged"])
            compat.set_loss_progress(self, progress["loss"], progress["total"], logged)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; the mean loss at the end is that of all steps, resumed or not."""
        self.losses.check()
        if "train_loss" in logs and self.state.global_step:
            logs["train_loss"] = compat.loss_progress(self)[1] / self.state.global_step
        super().log(logs, start_time)

    def resume(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint or from the start."""
        if checkpoint is not None:
            with _resuming(checkpoint, PROGRESS_FILE):
                progress = json.loads((checkpoint / PROGRESS_FILE).read_text(encoding="utf-8"))
                self.resumed_progress = {
                    key: float(progress[key]) for key in ("loss", "total", "logged")
                }
            with _resuming(checkpoint, TRAINER_STATE_NAME):
                state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
                int(state.global_step)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextmanager
def _resuming(checkpoint: str | Path | None, name: str) -> Iterator[None]:
    """Turn any error while a file of a checkpoint is loaded into one line.

    Raises:
        CheckpointError: the file is damaged, or belongs to another training.
    """
    try:
        yield
    except MlflowDrError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: {name} does not fit this training ({one_line(error)}); resume with the "
            "flags that the training began with, or from another checkpoint"
        ) from error


class _Progress(TrainerCallback):
    """Restores the sums of losses, which Trainer sets to 0 when training begins."""

    def __init__(self, trainer: RetrieverTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Restore the sums."""
        self._trainer.restore_progress()
