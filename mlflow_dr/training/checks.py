"""Flags of a training that are refused before it begins: without effect, or not of its engine."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from multiprocessing import get_all_start_methods, get_start_method

from transformers.training_args import OptimizerNames

from mlflow_dr.errors import UsageError
from mlflow_dr.stores.base import TEXT, TOKENS
from mlflow_dr.stores.store import STORES
from mlflow_dr.training.arguments import DataArguments, TrainingRequest
from mlflow_dr.training.flags import OWN_LOSSES, TORCH

log = logging.getLogger(__name__)


JAX_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def refuse_what_would_be_ignored(
    request: TrainingRequest, typed: Collection[str], processes: int
) -> None:
    """Refuse flags that would have no effect, or that do not work together."""
    trainer, loss = request.trainer, request.loss
    if "do_train" in typed and not trainer.do_train:
        raise UsageError("--do_train false leaves nothing to do; `mlflow-dr train` always trains")
    unfit = {
        "--label_smoothing_factor": trainer.label_smoothing_factor,
        "--neftune_noise_alpha": trainer.neftune_noise_alpha,
        "--use_liger_kernel": trainer.use_liger_kernel,
        "--train_sampling_strategy group_by_length": "group"
        in str(trainer.train_sampling_strategy),
        "--debug": bool(trainer.debug),
    }
    if refused := [name for name, value in unfit.items() if value]:
        raise UsageError(f"{', '.join(refused)} does not fit a retriever's training; leave it out")
    if trainer.push_to_hub:
        raise UsageError(
            "--push_to_hub: checkpoints go to MLflow; `mlflow-dr best --push OWNER/NAME` uploads "
            "the best one"
        )
    if trainer.do_eval or trainer.do_predict or trainer.eval_on_start:
        raise UsageError(
            "training does not evaluate; `mlflow-dr validate --run-id RUN` evaluates its "
            "checkpoints at the same time, and `mlflow-dr run` starts both"
        )
    if loss.grad_cache and (trainer.fsdp or trainer.deepspeed):
        raise UsageError(
            "--grad_cache cannot be used with --fsdp or --deepspeed; use it under torchrun without "
            "them, or leave it out"
        )
    if trainer.fsdp and trainer.resume_from_checkpoint:
        raise UsageError("--resume_from_checkpoint cannot be used with --fsdp yet")
    zero = getattr(trainer, "hf_deepspeed_config", None)
    if zero is not None and zero.is_zero3():
        raise UsageError(
            "ZeRO stage 3 shards the weights, so they cannot be published; use stage 1 or 2, or "
            "--fsdp"
        )
    if trainer.fp16 and trainer.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU; on a CPU use --bf16, or neither")
    is_alone = max(trainer.world_size, processes) == 1 and request.engine.engine == TORCH
    if loss.negatives_x_device and is_alone and "negatives_x_device" in typed:
        log.warning("--negatives_x_device has no effect: there is one training process")


def refuse_what_the_engine_lacks(
    request: TrainingRequest, typed: Mapping[str, str], processes: int
) -> None:
    """Refuse flags that the engine does not have."""
    engine, trainer = request.engine, request.trainer
    if engine.engine == TORCH:
        names = ("coordinator", "n_hosts", "host_index", "compile_only")
        if given := [typed[name] for name in names if name in typed]:
            raise UsageError(f"{given[0]} needs --engine jax")
        return
    optimizer = OptimizerNames(trainer.optim).value
    wrong = {
        "--fsdp": trainer.fsdp,
        "--deepspeed": trainer.deepspeed,
        "--lora": request.model.lora,
        "--fp16": trainer.fp16,
        "--torch_compile": trainer.torch_compile,
        "--auto_find_batch_size": trainer.auto_find_batch_size,
        f"--optim {optimizer}": optimizer not in JAX_OPTIMIZERS,
        f"--loss {request.loss.loss}": request.loss.loss not in OWN_LOSSES,
    }
    if refused := [name for name, value in wrong.items() if value]:
        hint = "; use --bf16" if "--fp16" in refused else ""
        raise UsageError(
            f"--engine jax does not have {', '.join(refused)}{hint}; leave it out, or use "
            "--engine torch"
        )
    if processes > 1:
        raise UsageError(
            "--engine jax drives all devices of a host by one process; leave --gpus out"
        )


def check_store(data: DataArguments, n_workers: int, typed: Collection[str]) -> None:
    """Refuse a document store that is unknown, cannot be trained with, or would not be read."""
    name = data.document_store
    store = STORES.get(name)
    if store.holds == TOKENS:
        raise UsageError(
            f"--document_store {name}: it holds token ids, which training reads by --token_table "
            "true; leave both flags out, or name a store of text"
        )
    if store.holds != TEXT:
        raise UsageError(f"--document_store {name}: it holds no text; name a store of text")
    if "document_store" in typed and data.token_table:
        raise UsageError(
            f"--document_store {name} would not be read, because all passages are tokenised before "
            "training; add --token_table false"
        )
    # the first one is the default; asking for it by `get_start_method` would make it final
    method = get_start_method(allow_none=True) or get_all_start_methods()[0]
    if n_workers and not store.works_in_forks and method == "fork":
        raise UsageError(
            f"--document_store {name}: forked processes cannot read it; use "
            "--dataloader_num_workers 0, or another store"
        )
