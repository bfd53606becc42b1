"""What an MLflow run shows of a training's flags."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from typing import Any

from mlflow_dr.training.arguments import RetrieverTrainingArguments, TrainingRequest

ALWAYS_LOGGED = (
    "learning_rate",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)
NEVER_LOGGED = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token"}


def params_of(request: TrainingRequest) -> dict[str, Any]:
    """What the run shows: our own arguments, and Hugging Face's where they are not the default."""
    defaults = _defaults()
    chosen = {
        name: value
        for name, value in request.trainer.to_dict().items()
        if name in ALWAYS_LOGGED
        or (isinstance(value, bool | int | float | str) and value != defaults.get(name, value))
    }
    own = {
        "model": request.model.model_name_or_path,
        **asdict(request.model),
        **asdict(request.loss),
        **asdict(request.data),
        **_published(request),
    }
    both = {**chosen, **own}
    return {
        name: value
        for name, value in both.items()
        if value not in (None, "") and name not in NEVER_LOGGED
    }


def _published(request: TrainingRequest) -> dict[str, Any]:
    """When checkpoints are published, under the name of the flag that says it."""
    asked = request.publish
    if asked.publish_per_epoch is not None:
        return {"publish_per_epoch": asked.publish_per_epoch}
    return {"publish_steps": asked.publish_steps}


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default
        for field in fields(RetrieverTrainingArguments)
        if field.default is not MISSING
    }
