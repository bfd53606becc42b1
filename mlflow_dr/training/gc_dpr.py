"""The flags of GC-DPR's `train_dense_encoder.py`, and what they are in ours.

Flags that differ only in name (`--batch_size`, `--adam_eps`, ...) are aliases in `arguments.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any

from mlflow_dr.collection.catalogue import JOIN, POOL_PREFIX
from mlflow_dr.errors import UsageError
from mlflow_dr.training.flags import check_values, flag, numbers_of

log = logging.getLogger(__name__)


WITHOUT_MEANING = "Flag of GC-DPR; accepted, without effect."
AVERAGE_RANK = "Flag of GC-DPR's average rank, which a validator measures here."


@dataclass
class GcDprArguments:
    """Flags of GC-DPR."""

    train_file: str | None = flag(
        None, "GC-DPR: files of training examples, a pattern or separated by commas; see --dataset."
    )
    dev_file: str | None = flag(
        None,
        "GC-DPR: a file of examples; its questions are validated on its own passages. The same "
        "as --validation_dataset pool:FILE.",
    )
    encoder_model_type: str | None = flag(
        None, "GC-DPR: hf_bert stands for any Hugging Face model."
    )
    sequence_length: int | None = flag(None, "Longest query and longest passage, in tokens.")
    projection_dim: int | None = flag(
        None, "GC-DPR: output size of a linear layer after the pooling; 0 for no layer."
    )
    hard_negatives: int | None = flag(
        None, "GC-DPR: hard negatives per query; see --train_n_passages."
    )
    shuffle_positive_ctx: bool | None = flag(
        None,
        "GC-DPR: use another positive in each epoch; see --positive_passage_no_shuffle.",
        nargs="?",
        const=True,
    )
    adam_betas: str | None = flag(None, 'Both of Adam\'s betas, such as "(0.9, 0.999)".')
    pretrained_file: str | None = flag(None, WITHOUT_MEANING)
    dev_batch_size: str | None = flag(None, WITHOUT_MEANING)
    fp16_opt_level: str | None = flag(None, WITHOUT_MEANING)
    global_loss_buf_sz: str | None = flag(None, WITHOUT_MEANING)
    checkpoint_file_name: str | None = flag(None, WITHOUT_MEANING)
    train_rolling_loss_step: str | None = flag(None, WITHOUT_MEANING)
    val_av_rank_start_epoch: str | None = flag(None, AVERAGE_RANK)
    val_av_rank_hard_neg: str | None = flag(None, AVERAGE_RANK)
    val_av_rank_other_neg: str | None = flag(None, AVERAGE_RANK)
    val_av_rank_bsz: str | None = flag(None, AVERAGE_RANK)
    val_av_rank_max_qs: str | None = flag(None, AVERAGE_RANK)


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
MAY_DIFFER = {"q_max_len", "p_max_len"}


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
