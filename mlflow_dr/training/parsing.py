"""Flags and a `--config` file become a training request.

Flags of `train_dense_encoder.py` (DPR, GC-DPR) are translated to ours; those that differ only in
name (`--batch_size`, `--adam_eps`, ...) are aliases in `arguments.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from glob import glob
from multiprocessing import get_all_start_methods, get_start_method
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from mlflow_dr import compat
from mlflow_dr.collection.catalogue import JOIN, POOL_PREFIX
from mlflow_dr.errors import UsageError
from mlflow_dr.stores.base import TEXT, TOKENS
from mlflow_dr.stores.store import STORES
from mlflow_dr.training.arguments import (
    WITHOUT_MEANING,
    DataArguments,
    EngineArguments,
    GcDprArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
    TrainingRequest,
)
from mlflow_dr.training.flags import (
    JAX,
    OWN_LOSSES,
    TORCH,
    check_values,
    numbers_of,
    read_flags,
    unknown_flag,
)
from mlflow_dr.training.recipes import JUDGED, as_flags, recipe_flags, recipe_of

log = logging.getLogger(__name__)

LONGEST = 300
MAPPINGS = {field.name for field in fields(RetrieverTrainingArguments) if "dict" in str(field.type)}
ACCEPTED_ONLY = [
    *(field.name for field in fields(GcDprArguments) if field.metadata["help"] == WITHOUT_MEANING),
    "local_rank",
]
GC_DPR_FLAGS = (
    "train_file",
    "dev_file",
    "pretrained_model_cfg",
    "encoder_model_type",
    "model_file",
)
"""A command line with one of these comes from GC-DPR, so the recipe is `dpr`."""
JAX_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
MAY_DIFFER = {"q_max_len", "p_max_len"}


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
    _refuse_what_the_engine_lacks(request, typed, processes)
    _refuse_what_would_be_ignored(request, typed, processes)
    _check_store(data, trainer.dataloader_num_workers, typed)
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


def _refuse_what_would_be_ignored(
    request: TrainingRequest, typed: Collection[str], processes: int
) -> None:
    """Refuse flags that would have no effect, or that do not work together."""
    trainer, loss = request.trainer, request.loss
    if "do_train" in typed and not trainer.do_train:
        raise UsageError("--do_train false leaves nothing to do; `mlflow-dr train` always trains")
    unfit = {
        "--label_smoothing_factor": trainer.label_smoothing_factor,
        "--neftune_noise_alpha": trainer.neftune_noise_alpha,
        "--use_liger_kernel": trainer.use_liger_kernel,
        "--train_sampling_strategy group_by_length": "group"
        in str(trainer.train_sampling_strategy),
        "--debug": bool(trainer.debug),
    }
    if refused := [name for name, value in unfit.items() if value]:
        raise UsageError(f"{', '.join(refused)} does not fit a retriever's training; leave it out")
    if trainer.push_to_hub:
        raise UsageError(
            "--push_to_hub: checkpoints go to MLflow; `mlflow-dr best --push OWNER/NAME` uploads "
            "the best one"
        )
    if trainer.do_eval or trainer.do_predict or trainer.eval_on_start:
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
    is_alone = max(trainer.world_size, processes) == 1 and request.engine.engine == TORCH
    if loss.negatives_x_device and is_alone and "negatives_x_device" in typed:
        log.warning("--negatives_x_device has no effect: there is one training process")


def _refuse_what_the_engine_lacks(
    request: TrainingRequest, typed: Mapping[str, str], processes: int
) -> None:
    """Refuse flags that the engine does not have."""
    engine, trainer = request.engine, request.trainer
    if engine.engine == TORCH:
        names = ("coordinator", "n_hosts", "host_index", "compile_only")
        if given := [typed[name] for name in names if name in typed]:
            raise UsageError(f"{given[0]} needs --engine jax")
        return
    optimizer = OptimizerNames(trainer.optim).value
    wrong = {
        "--fsdp": trainer.fsdp,
        "--deepspeed": trainer.deepspeed,
        "--lora": request.model.lora,
        "--fp16": trainer.fp16,
        "--torch_compile": trainer.torch_compile,
        "--auto_find_batch_size": trainer.auto_find_batch_size,
        f"--optim {optimizer}": optimizer not in JAX_OPTIMIZERS,
        f"--loss {request.loss.loss}": request.loss.loss not in OWN_LOSSES,
    }
    if refused := [name for name, value in wrong.items() if value]:
        hint = "; use --bf16" if "--fp16" in refused else ""
        raise UsageError(
            f"--engine jax does not have {', '.join(refused)}{hint}; leave it out, or use "
            "--engine torch"
        )
    if processes > 1:
        raise UsageError(
            "--engine jax drives all devices of a host by one process; leave --gpus out"
        )


def _check_store(data: DataArguments, n_workers: int, typed: Collection[str]) -> None:
    """Refuse a document store that is unknown, cannot be trained with, or would not be read."""
    name = data.document_store
    store = STORES.get(name)
    if store.holds == TOKENS:
        raise UsageError(
            f"--document_store {name}: it holds token ids, which training reads by --token_table "
            "true; leave both flags out, or name a store of text"
        )
    if store.holds != TEXT:
        raise UsageError(f"--document_store {name}: it holds no text; name a store of text")
    if "document_store" in typed and data.token_table:
        raise UsageError(
            f"--document_store {name} would not be read, because all passages are tokenised before "
            "training; add --token_table false"
        )
    # the first one is the default; asking for it by `get_start_method` would make it final
    method = get_start_method(allow_none=True) or get_all_start_methods()[0]
    if n_workers and not store.works_in_forks and method == "fork":
        raise UsageError(
            f"--document_store {name}: forked processes cannot read it; use "
            "--dataloader_num_workers 0, or another store"
        )


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


def translated(given: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, str]:
    """Our flags for GC-DPR's, name -> value; flags of the user override them.

    Args:
        given: name -> value of all training flags; None for a flag that the user did not give.
        typed: name -> spelling of the flags that the user gave; an alias has both names.

    Raises:
        UsageError: a flag is not supported, its file does not exist, or the flag that it stands
            for is given, too.
    """
    names = [field.name for field in fields(GcDprArguments) if given.get(field.name) is not None]
    if refused := [f"--{name}" for name in names if name.startswith("val_av_rank_")]:
        raise UsageError(
            f"{', '.join(refused)}: average rank is measured outside the training; leave the flag "
            "out, and run `mlflow-dr validate --dataset pool:DEV_FILE --measures average_rank@30`"
        )
    if (kind := given.get("encoder_model_type")) not in (None, "hf_bert"):
        raise UsageError(
            f"--encoder_model_type {kind} is not supported; use hf_bert, and name a Hugging Face "
            "model by --pretrained_model_cfg, such as roberta-base"
        )
    validates = {"dev_file", "model_file"} & set(typed)
    if validates and not {"train_file", "dataset_name"} & set(typed):
        raise UsageError(
            f"--{min(validates)} needs --train_file, the training data; to measure an encoder "
            "without training, use `mlflow-dr evaluate`"
        )
    values: dict[str, str] = {}
    for name, translate in _TRANSLATIONS.items():
        if name not in names:
            continue
        translation = translate(given[name])
        if twice := sorted((set(translation) - MAY_DIFFER) & set(typed)):
            raise UsageError(
                f"{typed[name]} and {typed[twice[0]]} set the same value; give only one of them"
            )
        values |= translation
    if without := [f"--{name}" for name in ACCEPTED_ONLY if name in typed]:
        log.warning("%s: accepted, without effect", ", ".join(without))
    return values


def _train_file(pattern: str) -> dict[str, str]:
    files = _files(pattern, "--train_file")
    if len(files) > 1 and (bad := next((file for file in files if JOIN in file), None)):
        raise UsageError(
            f"--train_file {bad}: rename the file; {JOIN} in it separates names of files"
        )
    return {"dataset_name": JOIN.join(files)}


def _dev_file(pattern: str) -> dict[str, str]:
    files = _files(pattern, "--dev_file")
    if len(files) > 1:
        raise UsageError(f"--dev_file {pattern!r} matches {len(files)} files; name one")
    return {"validation_dataset": POOL_PREFIX + files[0]}


def _files(pattern: str, flag_name: str) -> list[str]:
    """Files of a path, a pattern (sorted by name), or several of these separated by commas."""
    parts = [pattern] if Path(pattern).exists() else pattern.split(",")
    files: list[str] = []
    for part in map(str.strip, parts):
        matches = [part] if Path(part).exists() else sorted(glob(part))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not matches:
            raise UsageError(f"{flag_name}: no file matches {part!r}")
        files += matches
    return files


def _projection(size: int) -> dict[str, str]:
    if not size:
        return {"add_pooler": "false"}
    return {"add_pooler": "true", "projection_out_dim": str(size)}


def _betas(text: str) -> dict[str, str]:
    pair = numbers_of(text, "--adam_betas", "(0.9, 0.999)")
    if len(pair) != 2:
        raise UsageError(f"--adam_betas is {text[:80]!r}; expected two numbers: (0.9, 0.999)")
    both = dict(zip(("adam_beta1", "adam_beta2"), pair, strict=True))
    check_values(both, lambda name: "--adam_betas")
    return {name: str(value) for name, value in both.items()}


_TRANSLATIONS: Mapping[str, Callable[[Any], dict[str, str]]] = {
    "train_file": _train_file,
    "dev_file": _dev_file,
    "hard_negatives": lambda count: {"train_n_passages": str(1 + count)},
    "shuffle_positive_ctx": lambda shuffle: {"positive_passage_no_shuffle": str(not shuffle)},
    "sequence_length": lambda length: dict.fromkeys(("q_max_len", "p_max_len"), str(length)),
    "projection_dim": _projection,
    "adam_betas": _betas,
}
