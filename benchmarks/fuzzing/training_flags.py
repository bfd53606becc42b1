"""Flags of a training in a YAML or JSON file."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from benchmarks.fuzzing.plans import read_yaml, written

WHOLE, NUMBER, TRUTH, TEXT = "whole", "number", "truth", "text"
TRAINING: dict[str, tuple[Any, str, float, float]] = {
    "model_name_or_path": ("tiny", TEXT, 0, 0),
    "dataset_name": ("demo", TEXT, 0, 0),
    "output_dir": ("made", TEXT, 0, 0),
    "query_prefix": ("query: ", TEXT, 0, 0),
    "pooling": ("cls", TEXT, 0, 0),
    "max_steps": (10, WHOLE, -1, 10**9),
    "per_device_train_batch_size": (4, WHOLE, 1, 10**6),
    "gradient_accumulation_steps": (2, WHOLE, 1, 10**6),
    "train_n_passages": (3, WHOLE, 1, 10**6),
    "q_max_len": (16, WHOLE, 1, 10**6),
    "p_max_len": (32, WHOLE, 1, 10**6),
    "publish_steps": (5, WHOLE, 0, 10**9),
    "seed": (7, WHOLE, 0, 2**32 - 1),
    "gc_q_chunk_size": (4, WHOLE, 1, 10**6),
    "learning_rate": (1e-4, NUMBER, 0, 1e308),
    "weight_decay": (0.01, NUMBER, 0, 1e308),
    "warmup_steps": (5, NUMBER, 0, 1e308),
    "logging_steps": (5, NUMBER, 0, 1e308),
    "temperature": (0.02, NUMBER, 5e-324, 1e308),
    "distil_weight": (0.25, NUMBER, 0, 1),
    "adam_beta1": (0.9, NUMBER, 0, 1),
    "adam_epsilon": (1e-8, NUMBER, 0, 1e308),
    "max_grad_norm": (1.0, NUMBER, 0, 1e308),
    "normalize": (True, TRUTH, 0, 0),
    "publish_initial": (False, TRUTH, 0, 0),
    "grad_cache": (True, TRUTH, 0, 0),
    "use_cpu": (True, TRUTH, 0, 0),
}
YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def flag(key: str, value: Any) -> Any:
    """The value of a flag."""
    _, kind, least, most = TRAINING[key]
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, list | dict) or value is None:
        raise UnreadableError(f"{key} is no value")
    text = str(value)
    if kind == TEXT:
        return text
    if kind == TRUTH:
        if text.lower() not in YES + NO:
            raise UnreadableError(f"{key} is neither true nor false")
        return text.lower() in YES
    if isinstance(value, bool):
        raise UnreadableError(f"{key} is no number")
    try:
        number = int(text) if kind == WHOLE else float(text)
    except ValueError as error:
        raise UnreadableError(f"{key} is no number") from error
    if not (least <= number <= most and math.isfinite(number)):
        raise UnreadableError(f"{key} is out of range")
    return number


def training_right(path: Path) -> Any:
    values = read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UnreadableError("no mapping")
    values = {key.replace("-", "_"): value for key, value in values.items() if value is not None}
    if not set(values) <= set(TRAINING):
        raise UnreadableError("an unknown flag")
    return {key: flag(key, value) for key, value in values.items()}


def training_ours(path: Path) -> Any:
    from mlflow_dr.training.parsing import parse_training

    request = parse_training(["--config", str(path)])
    values = read_yaml(path)
    groups = (request.model, request.loss, request.data, request.publish, request.trainer)
    given = [key.replace("-", "_") for key, value in (values or {}).items() if value is not None]
    made = {
        key: next(getattr(group, key) for group in groups if hasattr(group, key)) for key in given
    }
    return {
        key: float(value) if TRAINING[key][1] == NUMBER else value for key, value in made.items()
    }


def training(chance: Random, workdir: Path) -> Case:
    path = workdir / chance.choice(("train.yaml", "train.json"))
    keys = chance.sample(list(TRAINING), 8)
    values: Any = {key: TRAINING[key][0] for key in [*keys, "use_cpu"]}
    if chance.random() < 0.3:
        key = chance.choice([key for key in keys if not isinstance(values[key], bool)])
        odd: tuple[Any, ...] = (
            0,
            -1,
            -0.5,
            1e-320,
            float("nan"),
            float("inf"),
            10**12,
            "nan",
            "1_0",
            "٣",
            2.5,
            "1e2",
            "",
        )
        values[key] = chance.choice(odd)
        how = f"{key} = {values[key]!r}"
        path.write_bytes(yaml.safe_dump(values, allow_unicode=True).encode())
    else:
        how = written(chance, path, values)
    names = (path.name, *TRAINING, "dataset")
    return Case(how, lambda: training_ours(path), lambda: training_right(path), names)


KINDS = [Kind("training-config", training, 6)]
