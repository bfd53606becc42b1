"""What is trained how when the user does not say: defaults by collection."""

from __future__ import annotations

from mlflow_dr.engines.devices import resolve_device, resolve_dtype

TINY = {
    # two layers from scratch learn to retrieve in 300 steps at this rate
    "model_name_or_path": "tiny",
    "pooling": "mean",
    "normalize": "true",
    "temperature": "0.05",
    "q_max_len": "32",
    "p_max_len": "64",
    "train_n_passages": "1",
    "per_device_train_batch_size": "128",
    "learning_rate": "2e-3",
    "lr_scheduler_type": "linear",
    "warmup_steps": "30",
    "max_steps": "300",
    "publish_steps": "50",
}

MSMARCO = {
    # as in Tevatron's example for MS MARCO passage ranking
    "model_name_or_path": "bert-base-uncased",
    "pooling": "cls",
    "normalize": "false",
    "q_max_len": "16",
    "p_max_len": "128",
    "train_n_passages": "8",
    "per_device_train_batch_size": "8",
    "learning_rate": "5e-6",
    "num_train_epochs": "3",
    "publish_steps": "10000",
}

OTHER = {
    # collections with judgements alone have no hard negatives
    "train_n_passages": "1",
    "per_device_train_batch_size": "64",
    "learning_rate": "3e-5",
    "normalize": "true",
    "temperature": "0.05",
    "pooling": "mean",
}

RECIPES = {"demo": TINY, "msmarco": MSMARCO}


def recipe_flags(dataset: str, use_cpu: bool = False) -> list[str]:
    """Command-line flags that stand before the user's own, so that the user's count."""
    values = dict(RECIPES.get(dataset, OTHER))
    device = resolve_device("cpu" if use_cpu else "auto")
    if device.type == "cpu":
        values["use_cpu"] = "true"  # without it, Trainer refuses bf16 on a processor
    if resolve_dtype("auto", device) == "bf16":
        values["bf16"] = "true"
    return [word for key, value in values.items() for word in (f"--{key}", value)]
