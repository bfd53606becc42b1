"""The flags of `mlflow-dr train` by section, as its help and the reference list them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from mlflow_dr import compat
from mlflow_dr.training.arguments import (
    DataArguments,
    EngineArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
)
from mlflow_dr.training.gc_dpr import GcDprArguments
from mlflow_dr.training.parsing import training_parser

USUAL = ("learning_rate", "num_train_epochs", "max_steps", "bf16", "seed")
"""Flags of Hugging Face's that most trainings set; they are listed beside ours."""
SECTIONS: Mapping[str, type[Any]] = {
    "Data": DataArguments,
    "Encoder": ModelArguments,
    "Loss": LossArguments,
    "MLflow": PublishArguments,
    "Engine": EngineArguments,
}
HUGGING_FACE = "Hugging Face's TrainingArguments"


class FlagHelp(NamedTuple):
    """A flag: its spellings with underscores, its default if it has one, and its meaning."""

    names: tuple[str, ...]
    default: str
    meaning: str


def flag_sections(everything: bool) -> dict[str, list[FlagHelp]]:
    """The flags by section.

    Args:
        everything: also the flags of GC-DPR and all of Hugging Face's TrainingArguments.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in dict.fromkeys(compat.flag_actions(training_parser()).values()):
        actions.setdefault(action.dest, []).append(action)  # a flag, and its opposite
    names = {title: _names(kind) for title, kind in SECTIONS.items()}
    # those to which we gave another default or help
    ours = [name for name in RetrieverTrainingArguments.__annotations__ if name in actions]
    names["Training"] = [*USUAL, *ours, "config", "help", "help_all"]
    if everything:
        names["GC-DPR"] = _names(GcDprArguments)
        others = _names(RetrieverTrainingArguments)
        names[HUGGING_FACE] = [name for name in others if name not in names["Training"]]
    return {
        title: [_flag_help(actions[name]) for name in listed] for title, listed in names.items()
    }


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind) if field.init]


def _flag_help(actions: list[argparse.Action]) -> FlagHelp:
    """What is said about a flag, by its action and that of its opposite."""
    spelled = [name for action in actions for name in action.option_strings]
    value = actions[0].default
    is_shown = value not in (None, argparse.SUPPRESS, "") and value is not False
    default = ("true" if value is True else str(value)) if is_shown else ""
    default = f'"{default}"' if default.isspace() else default
    text = (actions[0].help or "").replace("%%", "%").replace("%(default)s", default)
    return FlagHelp(tuple(_without_dashed(spelled)), default, " ".join(text.split()))


def _without_dashed(names: Iterable[str]) -> list[str]:
    """Names without those that only have dashes for underscores."""
    return list({name.replace("-", "_"): name for name in reversed(list(names))}.values())[::-1]
