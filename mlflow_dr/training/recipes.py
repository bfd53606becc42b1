"""Recipes: defaults of flags for a collection or a kind of training data."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_dr.collection.catalogue import (
    IR_DATASETS_PREFIX,
    dataset_path,
    parse_mixture,
)
from mlflow_dr.collection.irds import IrDataset
from mlflow_dr.devices import resolve_device, resolve_dtype

Recipe = Mapping[str, str]
"""Defaults of training flags: name -> value."""

TINY: Recipe = {
    # two layers from scratch learn to retrieve in 300 steps at this rate
    "model_name_or_path": "tiny",
    "pooling": "mean",
    "normalize": "true",
    "temperature": "0.05",
    "dropout": "0",  # faster, and the curve is higher (docs/benchmarks.md)
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

MSMARCO: Recipe = {
    # as in Tevatron's example for MS MARCO passage ranking
    "model_name_or_path": "bert-base-uncased",
    "q_max_len": "16",
    "p_max_len": "128",
    "train_n_passages": "8",
    "per_device_train_batch_size": "8",
    "learning_rate": "5e-6",
    "num_train_epochs": "3",
    "publish_steps": "10000",
}

JUDGED: Recipe = {
    # collections that have only relevance judgements have no hard negatives
    "train_n_passages": "1",
    "per_device_train_batch_size": "64",
    "learning_rate": "3e-5",
    "normalize": "true",
    "temperature": "0.05",
}

# training files come with hard negatives; the flags' own defaults are Tevatron's
TRAINING_FILES: Recipe = {}

DPR: Recipe = {
    # Karpukhin et al. 2020 and Gao et al. 2021, as GC-DPR's README trains on Natural Questions
    "pooling": "cls",
    "normalize": "false",
    "untie_encoder": "true",
    "temperature": "1.0",
    "passage_field_separator": " [SEP] ",
    "strip_question_mark": "true",
    "positive_passage_no_shuffle": "true",
    "negatives_x_device": "true",
    "q_max_len": "256",
    "p_max_len": "256",
    "train_n_passages": "2",
    "per_device_train_batch_size": "128",
    "grad_cache": "true",
    "gc_q_chunk_size": "16",
    "gc_p_chunk_size": "8",
    "learning_rate": "2e-5",
    "lr_scheduler_type": "linear",
    "warmup_steps": "1237",
    "max_grad_norm": "2.0",
    "num_train_epochs": "40",
    "publish_per_epoch": "1",
}

GC_DPR: Recipe = {
    # the defaults of GC-DPR's program; lengths are the published 256
    **DPR,
    "per_device_train_batch_size": "2",
    "grad_cache": "false",
    "learning_rate": "1e-5",
    "warmup_steps": "100",
    "max_grad_norm": "1.0",
    "num_train_epochs": "3",
    "logging_steps": "100",
    "seed": "0",
}

RECIPES = {"demo": TINY, "demo-qa": TINY, "msmarco": MSMARCO}
NAMED = {
    "demo": TINY,
    "msmarco": MSMARCO,
    "judged": JUDGED,
    "tevatron": TRAINING_FILES,
    "dpr": DPR,
}


def recipe_of(
    dataset: str, train_dir: str | None = None, name: str | None = None, gc_dpr: bool = False
) -> Recipe:
    """The named recipe, or the one for a collection, a mixture or training files.

    Args:
        dataset: the training data, as `--dataset` takes it.
        train_dir: training examples that replace those of the dataset.
        name: a key of `NAMED`.
        gc_dpr: whether the command line comes from GC-DPR.

    Raises:
        UsageError: a mixture is malformed, or ir_datasets does not have such an id.
    """
    if name is not None:
        return NAMED[name]
    if gc_dpr:
        return GC_DPR
    if train_dir is None and dataset in RECIPES:
        return RECIPES[dataset]
    if train_dir is None and all(_is_judged(name) for name, _ in parse_mixture(dataset)):
        return JUDGED
    return TRAINING_FILES


def _is_judged(name: str) -> bool:
    """Whether a collection has only relevance judgements to train on, so no hard negatives."""
    if name.startswith(IR_DATASETS_PREFIX):
        return not IrDataset(name.removeprefix(IR_DATASETS_PREFIX)).has_negatives
    path = dataset_path(name)
    return name in ("demo", "demo-qa") or (path is not None and (path / "qrels").is_dir())


def recipe_flags(recipe: Recipe, use_cpu: bool = False) -> list[str]:
    """Command-line flags of a recipe, to stand before those of the user, which override them."""
    values = dict(recipe)
    device = resolve_device("cpu" if use_cpu else "auto")
    if device.type == "cpu":
        values["use_cpu"] = "true"  # without it, Trainer refuses bf16 on a CPU
    if resolve_dtype("auto", device) == "bf16":
        values["bf16"] = "true"
    return as_flags(values)


def as_flags(values: Mapping[str, str]) -> list[str]:
    """Name -> value as command-line flags."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]
