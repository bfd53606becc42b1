"""Hugging Face's Trainer with the contrastive loss, and checkpoints that can be resumed from."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from mlflow_dr.encoder.directory import restore_encoder, save_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import CheckpointError, MlflowDrError, TrainingError, one_line
from mlflow_dr.files import grant_umask_modes, is_full
from mlflow_dr.training.batches import Collator, Group
from mlflow_dr.training.bi_encoder import PASSAGE, QUERY, BiEncoder
from mlflow_dr.training.grad_cache import cached_vectors
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.resume import mark_complete

log = logging.getLogger(__name__)

# torch 2.13 warns of the name that accelerate gives DistributedDataParallel for our setting
warnings.filterwarnings(
    "ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning
)

PROGRESS_FILE = "mlflow_dr_progress.json"
IDS_SHOWN = 8


class RetrieverTrainer(Trainer):
    """The Trainer, with two texts per example and the contrastive loss.

    Args:
        encoder: what is trained.
        arguments: Hugging Face's training arguments.
        training_set: groups of a query and its passages.
        collator: groups to token ids.
        objective: the loss.
        callbacks: called at each step.
        chunk_sizes: texts in a chunk of the gradient cache, by role; None without it.
        run_id: the MLflow run, noted in checkpoints to resume from.
        trust_remote_code: whether code in a checkpoint may run when it is resumed from.
    """

    def __init__(
        self,
        encoder: Encoder,
        arguments: TrainingArguments,
        training_set: Dataset[Group],
        collator: Collator,
        objective: Objective,
        callbacks: list[TrainerCallback],
        chunk_sizes: Mapping[str, int] | None = None,
        run_id: str = "",
        trust_remote_code: bool = False,
    ) -> None:
        arguments.remove_unused_columns = False
        arguments.disable_tqdm = arguments.disable_tqdm or not sys.stderr.isatty()
        arguments.logging_nan_inf_filter = False  # `_check` looks already
        if arguments.ddp_find_unused_parameters is None:
            arguments.ddp_find_unused_parameters = False
        if arguments.ddp_broadcast_buffers is None:
            arguments.ddp_broadcast_buffers = False
        super().__init__(
            model=BiEncoder(encoder),
            args=arguments,
            train_dataset=training_set,
            data_collator=collator,
            callbacks=[*callbacks, _Progress(self)],
        )
        self.remove_callback(PrinterCallback)
        self._encoder = encoder
        self._objective = objective
        self._chunk_sizes = chunk_sizes
        self._run_id = run_id
        self._trust_remote_code = trust_remote_code
        self.resumed_progress: dict[str, float] | None = None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's, whose workers are seeded by random numbers of its own.

        Workers that outlive an epoch are seeded once, so a resumed training would seed its own at
        another step, and from there on draw other numbers for dropout.
        """
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of one batch."""
        texts = {role: inputs[role] for role in (QUERY, PASSAGE)}
        if self._chunk_sizes:
            no_sync = partial(self.accelerator.no_sync, model)
            vectors = cached_vectors(model, texts, self._chunk_sizes, no_sync)
        else:
            vectors = model(texts)
        loss = self._objective(
            vectors[QUERY], vectors[PASSAGE], inputs.get("keys"), inputs.get("teacher")
        )
        self._check(loss, inputs)
        return (loss, vectors) if return_outputs else loss

    def _check(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Stop, in all processes together, when the loss of one is not a number."""
        broken = (~torch.isfinite(loss.detach())).any().float()
        if self.args.world_size > 1:
            distributed.all_reduce(broken, distributed.ReduceOp.MAX)
        if not bool(broken):
            return
        ids = ", ".join(map(repr, inputs.get("query_ids", [])[:IDS_SHOWN]))
        raise TrainingError(
            f"the loss of step {self.state.global_step + 1} is {loss.item()} (queries {ids}, ...); "
            "a lower --learning_rate, --max_grad_norm, or bf16 instead of fp16 may help; published "
            "checkpoints stay"
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the encoder's directory where Trainer wants its checkpoint."""
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
        """Put the weights of a checkpoint back."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        restore_encoder(Path(resume_from_checkpoint), self._encoder, self._trust_remote_code)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's; what does not fit is one line."""
        with _resuming(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's; what does not fit is one line."""
        with _resuming(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Trainer's; what does not fit is one line."""
        with _resuming(checkpoint, "scaler.pt"):
            super()._load_scaler(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save what training can be resumed from, and declare it whole at the very end.

        A disk that is full costs this checkpoint, not the training.
        """
        directory = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        main = self.args.should_save
        if main:
            shutil.rmtree(directory, ignore_errors=True)  # what a killed training left there
        self.accelerator.wait_for_everyone()
        progress = self._progress()
        # older checkpoints go when this one is whole
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
        """What Trainer forgets in a checkpoint: the losses since they were logged last."""
        loss = self._tr_loss.detach().clone()
        if self.args.world_size > 1:
            distributed.all_reduce(loss)
            loss /= self.args.world_size
        return {
            "loss": loss.item(),
            "total": self._total_loss_scalar,
            "logged": self._globalstep_last_logged,
        }

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """One epoch; none where all steps were done before, as Trainer would do one too many.

        The training set is told which: accelerate 1.15 does not under torchrun, nor when it skips
        the batches that were read before a resumption.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if set_epoch := getattr(self.train_dataset, "set_epoch", None):
            set_epoch(options["epoch"])
        super()._run_epoch(*arguments, **options)

    def restore_progress(self) -> None:
        """Go on summing losses where the checkpoint left off."""
        if self.resumed_progress:
            self._tr_loss.fill_(self.resumed_progress["loss"])
            self._total_loss_scalar = self.resumed_progress["total"]
            self._globalstep_last_logged = int(self.resumed_progress["logged"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the mean loss at the end is that of all steps, those before a resumption too."""
        if "train_loss" in logs and self.state.global_step:
            logs["train_loss"] = self._total_loss_scalar / self.state.global_step
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
    """Turn what goes wrong while a file of a checkpoint is taken into one line.

    Raises:
        CheckpointError: the file is damaged, or of another training.
    """
    try:
        yield
    except MlflowDrError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: {name} does not fit this training ({one_line(error)}); resume with the "
            "flags that it was begun with, or from another checkpoint"
        ) from error


class _Progress(TrainerCallback):
    """Restores the sum of losses, which Trainer sets to 0 when it begins."""

    def __init__(self, trainer: RetrieverTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Trainer has just begun."""
        self._trainer.restore_progress()
