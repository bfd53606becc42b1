"""Flags and a `--config` file become a training request."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from mlflow_dr import compat
from mlflow_dr.errors import MlflowDrError, UsageError
from mlflow_dr.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
    TrainingRequest,
)
from mlflow_dr.training.flags import check_values, read_flags, unknown_flag
from mlflow_dr.training.gc_dpr import GcDprArguments, is_gc_dpr, translated
from mlflow_dr.training.recipes import as_flags, recipe_flags, recipe_of

log = logging.getLogger(__name__)

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
    return parser


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
    recipe = recipe_of(
        values["dataset_name"], values["train_dir"], values["recipe"], gc_dpr=is_gc_dpr(typed)
    )
    flags = [*recipe_flags(recipe, bool(given["use_cpu"])), *as_flags(translations), *argv]
    flags += _consequences(given, typed)
    try:
        model, loss, data, publish, _, trainer, _ = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False
        )
    except MlflowDrError:
        raise
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if "publish_steps" in typed:
        if "publish_per_epoch" in typed:
            raise UsageError(
                f"{typed['publish_per_epoch']} and {typed['publish_steps']} exclude each other; "
                "give only one of them"
            )
        publish.publish_per_epoch = None
    request = TrainingRequest(model, loss, data, publish, trainer, recipe.bare_pooling)
    _refuse_what_would_be_ignored(request, typed, processes)
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


def _refuse_what_would_be_ignored(
    request: TrainingRequest, typed: Collection[str], processes: int
) -> None:
    """Refuse flags that would have no effect, or that do not work together."""
    trainer, loss = request.trainer, request.loss
    if "do_train" in typed and not trainer.do_train:
        raise UsageError("--do_train false leaves nothing to do; `mlflow-dr train` always trains")
    if trainer.do_eval or trainer.do_predict:
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
    is_alone = max(trainer.world_size, processes) == 1
    if loss.negatives_x_device and is_alone and "negatives_x_device" in typed:
        log.warning("--negatives_x_device has no effect: there is one training process")


def _file_flags(parser: argparse.ArgumentParser, file: str | None) -> list[str]:
    if file is None:
        return []
    actions = compat.flag_actions(parser)
    flags: list[str] = []
    for name, value in read_flags(Path(file), actions).items():
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, list) for item in items):
            raise UsageError(f"{file}: {name}: expected a value, or a list of values")
        if any(isinstance(item, dict) for item in items) and actions[name].dest not in MAPPINGS:
            raise UsageError(f"{file}: {name}: expected a value, not a mapping")
        flags += [name, *(_typed_value(item, actions[name]) for item in items)]
    try:
        parser.parse_args(flags)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    return flags


def _typed_value(value: Any, action: argparse.Action) -> str:
    """A value of a file as on a command line: YAML reads `no` as false, mappings become JSON."""
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, dict) else str(value)
