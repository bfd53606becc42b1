"""Flags and a `--config` file become a training request.

`gc_dpr.py` translates GC-DPR's flags to ours, and `checks.py` refuses flags that would do nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from mlflow_dr import compat
from mlflow_dr.errors import UsageError
from mlflow_dr.training.arguments import (
    DataArguments,
    EngineArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
    TrainingRequest,
)
from mlflow_dr.training.checks import (
    check_store,
    refuse_what_the_engine_lacks,
    refuse_what_would_be_ignored,
)
from mlflow_dr.training.flags import (
    JAX,
    check_values,
    read_flags,
    unknown_flag,
)
from mlflow_dr.training.gc_dpr import GC_DPR_FLAGS, GcDprArguments, translated
from mlflow_dr.training.recipes import JUDGED, as_flags, recipe_flags, recipe_of

LONGEST = 300
MAPPINGS = {field.name for field in fields(RetrieverTrainingArguments) if "dict" in str(field.type)}


class _Parser(HfArgumentParser):
    """Hugging Face's parser, which raises our errors."""

    def error(self, message: str) -> NoReturn:
        short = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        raise UsageError(f"{short}; see `mlflow-dr train --help`")


def training_parser() -> HfArgumentParser:
    """The parser of all training flags; each may have dashes or underscores."""
    kinds: Any = (
        ModelArguments,
        LossArguments,
        DataArguments,
        PublishArguments,
        EngineArguments,
        GcDprArguments,
        RetrieverTrainingArguments,
    )
    parser = _Parser(
        kinds, prog="mlflow-dr train", formatter_class=argparse.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config",
        help="A YAML or JSON file of these flags; flags of the command line override it.",
    )
    parser.add_argument(
        "--help_all",
        "--help-all",
        action="store_true",
        help="Show all flags, also those of GC-DPR and Hugging Face's.",
    )
    return parser


def training_argv(flags: Mapping[str, Any], others: Iterable[str] = ()) -> list[str]:
    """Flags of Python, name -> value, as words of a command line; None stands for no flag.

    Args:
        flags: name -> value.
        others: names of further flags of the command, for suggestions.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
    """
    parser = training_parser()
    known = compat.flag_actions(parser)
    names = {name: f"--{name}" for name in flags}
    if unknown := [name for name in names.values() if name not in known]:
        raise UsageError(unknown_flag(unknown[0], [*known, *(f"--{name}" for name in others)]))
    return _flag_words(parser, {names[name]: value for name, value in flags.items()})


def parse_training(argv: Sequence[str], processes: int = 1) -> TrainingRequest:
    """A training request from flags.

    Flags override the `--config` file, which overrides the recipe of the collection, which
    overrides the defaults.

    Args:
        argv: the flags.
        processes: number of training processes that will be started with these flags.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
    """
    parser = training_parser()
    seen, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise UsageError(unknown_flag(unknown[0], compat.flag_actions(parser)))
    in_file = _file_flags(parser, seen.config)
    typed = {**_typed(parser, in_file, f"{seen.config}: "), **_typed(parser, argv)}
    argv = [*in_file, *argv]
    given = vars(parser.parse_args(argv))
    check_values(given, lambda name: typed.get(name, name))
    translations = translated(given, typed)
    values = {**given, **translations}
    is_gc_dpr = not typed.keys().isdisjoint(GC_DPR_FLAGS)
    recipe = recipe_of(values["dataset_name"], values["train_dir"], values["recipe"], is_gc_dpr)
    flags = [*recipe_flags(recipe, bool(given["use_cpu"])), *as_flags(translations), *argv]
    flags += _consequences(given, typed)
    try:
        model, loss, data, publish, engine, _, trainer, _ = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False
        )
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if "publish_steps" in typed:
        if "publish_per_epoch" in typed:
            raise UsageError(
                f"{typed['publish_per_epoch']} and {typed['publish_steps']} exclude each other; "
                "give only one of them"
            )
        publish.publish_per_epoch = None
    bare_pooling = "mean" if recipe is JUDGED else "cls"
    request = TrainingRequest(model, loss, data, publish, trainer, bare_pooling, engine)
    refuse_what_the_engine_lacks(request, typed, processes)
    refuse_what_would_be_ignored(request, typed, processes)
    check_store(data, trainer.dataloader_num_workers, typed)
    return request


def _consequences(given: Mapping[str, Any], typed: Collection[str]) -> list[str]:
    """Flags that follow from the user's flags and override recipe and defaults."""
    flags: list[str] = []
    for name, other, value in (
        ("save_steps", "save_strategy", "steps"),
        ("num_train_epochs", "max_steps", "-1"),
    ):
        if name in typed and other not in typed:
            flags += [f"--{other}", value]
    if given["fp16"] and "bf16" not in typed:
        flags += ["--bf16", "false"]
    if given["engine"] == JAX:
        # torch's part stays on the processor; what that can do says nothing on bf16 on a TPU
        flags += ["--use_cpu", "true", *([] if "bf16" in typed else ["--bf16", "false"])]
    return flags


def _typed(
    parser: argparse.ArgumentParser, argv: Sequence[str], prefix: str = ""
) -> dict[str, str]:
    """The given flags: name -> the user's spelling; an alias has both names."""
    typed: dict[str, str] = {}
    actions = compat.flag_actions(parser)
    for word in argv:
        name = word.split("=", 1)[0]
        if action := actions.get(name):
            spelled = f"{prefix}{name.removeprefix('--')}" if prefix else name
            typed |= dict.fromkeys(
                (action.dest, name.removeprefix("--").replace("-", "_")), spelled
            )
    return typed


def _file_flags(parser: argparse.ArgumentParser, file: str | None) -> list[str]:
    if file is None:
        return []
    values = read_flags(Path(file), compat.flag_actions(parser))
    try:
        return _flag_words(parser, values)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _flag_words(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """Names and values of flags as words of a command line; None stands for no flag.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
    """
    actions = compat.flag_actions(parser)
    flags: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        items = list(value) if isinstance(value, list | tuple) else [value]
        if any(isinstance(item, list | tuple) for item in items):
            raise UsageError(f"{name}: expected a value, or a list of values")
        if any(isinstance(item, dict) for item in items) and actions[name].dest not in MAPPINGS:
            raise UsageError(f"{name}: expected a value, not a mapping")
        flags += [name, *(_typed_value(item, actions[name]) for item in items)]
    parser.parse_args(flags)
    return flags


def _typed_value(value: Any, action: argparse.Action) -> str:
    """A value of a file as on a command line: YAML reads `no` as false, mappings become JSON."""
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, dict) else str(value)
