"""Which values the training's flags may have: a number's range, or a closed choice."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlflow_dr.encoder.config import POOLINGS, SHORTEST
from mlflow_dr.errors import UsageError

LARGEST = 2**31 - 1
LARGEST_SEED = 2**32 - 1
SEEDS = ("seed", "data_seed")
LONGEST_SHOWN = 40
RECIPE_NAMES = ("demo", "msmarco", "judged", "tevatron", "dpr")
MERGED, ADAPTER = "merged", "adapter"

CHOICES: Mapping[str, tuple[str, ...]] = {
    "pooling": POOLINGS,
    "lora_publish": (MERGED, ADAPTER),
    "recipe": RECIPE_NAMES,
    "encoder_model_type": ("hf_bert", "pytext_bert", "fairseq_roberta"),
}


class Range(NamedTuple):
    """What a number may be; NaN is in no range.

    Attributes:
        words: the range, as it ends the sentence "it must be ...".
        holds: whether a number is in it.
    """

    words: str
    holds: Callable[[float], bool]


def at_least(lowest: int) -> Range:
    """Numbers from `lowest` on."""
    return Range(f"at least {lowest}", lambda value: value >= lowest)


POSITIVE = Range("above 0", lambda value: value > 0)
COUNT = at_least(1)
BELOW_ONE = Range("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
STEPS = Range("at least 1, or -1 for whole epochs", lambda value: value >= 1 or value == -1)

RANGES: Mapping[str, Range] = {
    "learning_rate": at_least(0),
    "weight_decay": at_least(0),
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": at_least(0),
    "num_train_epochs": POSITIVE,
    "max_steps": STEPS,
    "warmup_steps": at_least(0),
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "save_total_limit": at_least(0),
    "seed": at_least(0),
    "data_seed": at_least(0),
    "label_smoothing_factor": BELOW_ONE,
    "dataloader_num_workers": at_least(0),
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "temperature": POSITIVE,
    "distil_weight": SHARE,
    "distil_temperature": POSITIVE,
    "gc_q_chunk_size": COUNT,
    "gc_p_chunk_size": COUNT,
    "dataset_proc_num": COUNT,
    "train_n_passages": COUNT,
    "q_max_len": at_least(SHORTEST),
    "p_max_len": at_least(SHORTEST),
    "projection_in_dim": COUNT,
    "projection_out_dim": COUNT,
    "dropout": BELOW_ONE,
    "lora_r": COUNT,
    "lora_alpha": COUNT,
    "lora_dropout": BELOW_ONE,
    "publish_steps": at_least(0),
    "publish_per_epoch": COUNT,
    "projection_dim": at_least(0),
    "sequence_length": at_least(SHORTEST),
    "hard_negatives": at_least(0),
    "other_negatives": at_least(0),
}


def check_values(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse numbers out of range and words that are none of a closed choice.

    Args:
        values: name -> value; None is no value, and names without a rule are not looked at.
        typed: how the user spelled a name.

    Raises:
        UsageError: with the name and what it may be.
    """
    for name, allowed in RANGES.items():
        value = values.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        largest = LARGEST_SEED if name in SEEDS else LARGEST
        if allowed.holds(value) and value <= largest:
            continue
        words = f"at most {largest}" if value > largest else allowed.words
        shown = value if isinstance(value, float) or abs(value) < 10**15 else "too large"
        raise UsageError(f"{_named(name, typed)} is {shown}; it must be {words}")
    check_choices(values, typed)


def check_choices(values: Mapping[str, Any], typed: Callable[[str], str] = str) -> None:
    """Refuse words that are none of a closed choice, as `check_values` does."""
    for name, allowed in CHOICES.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            *most, last = allowed
            shown = repr(str(value)[:LONGEST_SHOWN])
            raise UsageError(
                f"{_named(name, typed)} is {shown}; expected {', '.join(most)} or {last}"
            )


def _named(name: str, typed: Callable[[str], str]) -> str:
    """The flag as it was typed, without dashes, and its first name where that is another one."""
    spelled = typed(name).removeprefix("--")
    return spelled if spelled.replace("-", "_").endswith(name) else f"{spelled}: {name}"


def numbers_of(text: str, name: str, example: str) -> list[float]:
    """The numbers of a list that is written as in Python; the brackets may be left out.

    Raises:
        UsageError: with the flag's name and an example.
    """
    try:
        read = ast.literal_eval(text)
        numbers = read if isinstance(read, list | tuple) else [read]
        return [float(number) for number in numbers]
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError):
        shown = repr(text[:LONGEST_SHOWN])
        raise UsageError(f"{name} is {shown}; expected numbers, such as {example}") from None


def upsample_rates(text: str | None) -> list[int]:
    """How often each part of a mixture is read in an epoch; empty where nothing is said.

    Raises:
        UsageError: not whole numbers above 0.
    """
    if text is None:
        return []
    name = "--train_files_upsample_rates"
    rates = numbers_of(text, name, "[1,2]")
    if not rates or not all(1 <= rate <= LARGEST and rate == int(rate) for rate in rates):
        raise UsageError(f"{name} is {text[:LONGEST_SHOWN]!r}; expected whole numbers above 0")
    return [int(rate) for rate in rates]
