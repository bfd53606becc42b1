"""Flags and a configuration file to a training request."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from mlflow_dr.errors import MlflowDrError, UsageError
from mlflow_dr.training.arguments import (
    DataArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
    TrainingRequest,
)
from mlflow_dr.training.recipes import recipe_flags, recipe_of

log = logging.getLogger(__name__)


class _Parser(HfArgumentParser):
    """Hugging Face's parser, whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `mlflow-dr train --help`")


def training_parser() -> HfArgumentParser:
    """The parser of all training flags; each is taken with dashes or underscores."""
    kinds: Any = (
        ModelArguments,
        LossArguments,
        DataArguments,
        PublishArguments,
        RetrieverTrainingArguments,
    )
    parser = _Parser(
        kinds, prog="mlflow-dr train", formatter_class=argparse.HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="A YAML or JSON file of these flags; flags go before it.")
    return parser


def parse_training(words: Sequence[str], processes: int = 1) -> TrainingRequest:
    """A training request from flags.

    What counts, from last to first: the user's flags, the `--config` file, the recipe of the
    collection, the defaults.

    Args:
        words: the flags.
        processes: training processes that will be started with them; torchrun's own know theirs.

    Raises:
        UsageError: an unknown flag, or a value that does not fit.
    """
    parser = training_parser()
    seen, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise UsageError(_unknown_flag(parser, unknown[0]))
    words = [*_file_flags(parser, seen.config), *words]
    seen = parser.parse_args(words)
    recipe = recipe_of(seen.dataset_name, seen.train_dir)
    flags = [*recipe_flags(recipe, bool(seen.use_cpu)), *words]
    if _given(words, "save_steps") and not _given(words, "save_strategy"):
        flags += ["--save_strategy", "steps"]
    if seen.fp16 and not _given(words, "bf16"):
        flags += ["--bf16", "false"]
    if _given(words, "num_train_epochs") and not _given(words, "max_steps"):
        flags += ["--max_steps", "-1"]
    try:
        model, loss, data, publish, trainer, _ = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False
        )
    except MlflowDrError:
        raise
    except (ValueError, ImportError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    request = TrainingRequest(model, loss, data, publish, trainer, recipe.bare_pooling)
    _refuse_what_would_be_ignored(request, words, processes)
    return request


def _refuse_what_would_be_ignored(
    request: TrainingRequest, words: Sequence[str], processes: int
) -> None:
    """Better no training than one that is not what was asked for."""
    trainer, loss = request.trainer, request.loss
    if _given(words, "do_train") and not trainer.do_train:
        raise UsageError("--do_train false leaves nothing to do: `mlflow-dr train` trains")
    if trainer.do_eval or trainer.do_predict:
        raise UsageError(
            "training does not stop to evaluate; `mlflow-dr validate --run-id RUN` measures its "
            "checkpoints meanwhile, and `mlflow-dr run` starts both"
        )
    if loss.grad_cache and (trainer.fsdp or trainer.deepspeed):
        raise UsageError(
            "--grad_cache cannot be used with --fsdp or --deepspeed, which shard what it replays; "
            "use it under torchrun without them, or leave it out"
        )
    if trainer.fsdp and trainer.resume_from_checkpoint:
        raise UsageError("--resume_from_checkpoint cannot be used with --fsdp so far")
    zero = getattr(trainer, "hf_deepspeed_config", None)
    if zero is not None and zero.is_zero3():
        raise UsageError(
            "ZeRO stage 3 shards weights that are to be published; use stage 1 or 2, or --fsdp"
        )
    if trainer.fp16 and trainer.device.type == "cpu":
        raise UsageError("--fp16 needs a GPU; on a processor use --bf16, or neither")
    if loss.negatives_x_device and max(trainer.world_size, processes) == 1:
        log.warning("--negatives_x_device changes nothing: there is one training process")


def _given(words: Sequence[str], name: str) -> bool:
    flags = {f"--{name}", f"--{name.replace('_', '-')}"}
    return any(word.split("=", 1)[0] in flags for word in words)


def _unknown_flag(parser: argparse.ArgumentParser, word: str) -> str:
    flag = word.split("=", 1)[0]
    known = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ";"
    return f"no flag {flag}{hint} `mlflow-dr train --help` lists all"


def _file_flags(parser: argparse.ArgumentParser, file: str | None) -> list[str]:
    if file is None:
        return []
    path = Path(file)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected flags and values, got {type(values).__name__}")
    flags: list[str] = []
    for key, value in values.items():
        name = f"--{str(key).replace('-', '_')}"
        if name not in parser._option_string_actions or key == "config":
            raise UsageError(f"{path}: {_unknown_flag(parser, name)}")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        action = parser._option_string_actions[name]
        flags += [name, *(_word(item, action) for item in items)]
    return flags


def _word(value: Any, action: argparse.Action) -> str:
    """A file's value as it is typed: YAML reads `no` as false, mappings are typed as JSON."""
    if isinstance(value, bool) and action.choices:
        return "yes" if value else "no"
    return json.dumps(value) if isinstance(value, dict) else str(value)
