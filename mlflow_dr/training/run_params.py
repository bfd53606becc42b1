"""What a run says about its training: the params that count, and a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.tracking.descriptions import dated_name
from mlflow_dr.training.arguments import (
    DataArguments,
    EngineArguments,
    LossArguments,
    ModelArguments,
    RetrieverTrainingArguments,
    TrainingRequest,
)

ALWAYS_LOGGED = (
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "seed"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "gradient_accumulation_steps"),
    *("bf16", "fp16", "model", "dataset_name", "loss", "temperature", "train_n_passages"),
    *("q_max_len", "p_max_len", "publish_steps", "publish_per_epoch"),
)
NEVER_LOGGED = {
    *("output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token"),
    *("dataset_proc_num", "cache_dir", "model_name_or_path", "disable_tqdm", "logging_steps"),
    "dataloader_pin_memory",
}
PARTS = {
    "lora": (
        *("lora_name_or_path", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
        "lora_publish",
    ),
    "grad_cache": ("gc_q_chunk_size", "gc_p_chunk_size"),
    "add_pooler": ("projection_in_dim", "projection_out_dim"),
    "distil_weight": ("distil_temperature",),
}
"""A flag -> flags that have an effect only with it; they are logged with it, and only then."""


def params_of(request: TrainingRequest) -> dict[str, Any]:
    """The params of a run: the flags that differ from their defaults, and some that never hide."""
    values, usual = all_flags(request), default_flags()
    hidden = {name for on, names in PARTS.items() if not values.get(on) for name in names}
    shown = {name for on, names in PARTS.items() if values.get(on) for name in names}
    if values.get("token_table"):
        hidden.add("document_store")
    return {
        name: value
        for name, value in values.items()
        if name not in hidden | NEVER_LOGGED
        and (name in shown or name in ALWAYS_LOGGED or _differs(value, usual.get(name)))
    }


def _differs(value: object, default: object) -> bool:
    return value != default and not (value is False and default is None)


def all_flags(request: TrainingRequest) -> dict[str, Any]:
    """Every flag of a training that has a value; what cannot be a param is left out."""
    per_epoch = request.publish.publish_per_epoch
    values = {
        **{
            name: value
            for name, value in request.trainer.to_dict().items()
            if name in ALWAYS_LOGGED or isinstance(value, bool | int | float | str)
        },
        "model": request.model.model_name_or_path,
        **asdict(request.model),
        **asdict(request.loss),
        **asdict(request.data),
        "engine": request.engine.engine,
        "publish_per_epoch": per_epoch,
        "publish_steps": request.publish.publish_steps if per_epoch is None else None,
    }
    return {name: value for name, value in values.items() if value not in (None, "")}


def default_flags() -> Mapping[str, Any]:
    """The default of each flag that has one."""
    kinds = (
        RetrieverTrainingArguments,
        ModelArguments,
        LossArguments,
        DataArguments,
        EngineArguments,
    )
    return {
        field.name: field.default
        for kind in kinds
        for field in fields(kind)
        if field.default is not MISSING
    }


def encoder_params(encoder: Encoder) -> dict[str, Any]:
    """The settings of an encoder as params, under the names of their flags.

    Those that no flag names come from the encoder's directory.
    """
    settings = encoder.settings
    values = {
        "pooling": settings.pooling,
        "normalize": settings.normalize,
        "query_prefix": encoder.query_encoder.settings.query_prompt,
        "passage_prefix": settings.passage_prompt,
        "q_max_len": encoder.query_encoder.settings.query_max_length,
        "p_max_len": settings.passage_max_length,
    }
    return {name: value for name, value in values.items() if value != ""}


def run_name(request: TrainingRequest) -> str:
    """The name of a run that is given none: collection, backbone and time."""
    return dated_name(request.data.dataset_name, request.model.model_name_or_path)
