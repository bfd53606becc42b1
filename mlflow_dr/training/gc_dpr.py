"""The flags of GC-DPR's and DPR's `train_dense_encoder.py` that have another form here.

Those that differ in name alone (`--batch_size`, `--adam_eps`, ...) are aliases in `arguments.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from glob import glob
from pathlib import Path
from typing import Any

from mlflow_dr.collection.catalogue import JOIN, POOL_PREFIX
from mlflow_dr.errors import UsageError
from mlflow_dr.training.flags import check_values, flag, numbers_of

log = logging.getLogger(__name__)

WITHOUT_MEANING = "GC-DPR's; accepted, and without effect here."
WITHOUT_EFFECT = (
    "pretrained_file",
    "dev_batch_size",
    "fp16_opt_level",
    "global_loss_buf_sz",
    "checkpoint_file_name",
    "train_rolling_loss_step",
    "local_rank",
)
AVERAGE_RANK = "GC-DPR's average rank, which is not offered."
MARKS = ("train_file", "dev_file", "pretrained_model_cfg", "encoder_model_type", "model_file")
"""A command line with one of these is GC-DPR's, so the recipe is DPR's."""
MAY_DIFFER = {"q_max_len", "p_max_len"}


@dataclass
class GcDprArguments:
    """GC-DPR's names."""

    train_file: str | None = flag(
        None, "GC-DPR's: files of training examples, as a pattern or with commas; see --dataset."
    )
    dev_file: str | None = flag(
        None,
        "GC-DPR's: a file of examples whose questions are judged on the file's own passages; "
        "--validation_dataset pool:FILE.",
    )
    encoder_model_type: str | None = flag(None, "GC-DPR's; hf_bert is any Hugging Face model.")
    sequence_length: int | None = flag(None, "Tokens of a query and of a passage at most.")
    projection_dim: int | None = flag(
        None, "GC-DPR's: a linear layer after the pooling that gives so much; 0 for none."
    )
    hard_negatives: int | None = flag(
        None, "GC-DPR's: hard negatives of a query; see --train_n_passages."
    )
    shuffle_positive_ctx: bool | None = flag(
        None,
        "GC-DPR's: take all positives of a query in turn; see --positive_passage_no_shuffle.",
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


def translated(given: Mapping[str, Any], typed: Mapping[str, str]) -> dict[str, str]:
    """Our flags for GC-DPR's, name -> value, to stand before the user's own.

    Args:
        given: name -> value of all training flags; None where the user gave none.
        typed: the flags that the user gave, name -> as it was typed; aliases under both names.

    Raises:
        UsageError: a flag asks for what is not offered here, names no file, or is given besides
            the flag that it stands for.
    """
    names = [one.name for one in fields(GcDprArguments) if given.get(one.name) is not None]
    if refused := [f"--{name}" for name in names if name.startswith("val_av_rank_")]:
        raise UsageError(
            f"{', '.join(refused)}: the average rank is not offered; leave it out: validators "
            "measure MRR, nDCG and recall on --dev_file or --validation_dataset"
        )
    if (kind := given.get("encoder_model_type")) not in (None, "hf_bert"):
        raise UsageError(
            f"--encoder_model_type {kind} is not offered; use hf_bert, and name the Hugging Face "
            "model by --pretrained_model_cfg, such as roberta-base"
        )
    validates = {"dev_file", "model_file"} & set(typed)
    if validates and not {"train_file", "dataset_name"} & set(typed):
        raise UsageError(
            f"--{min(validates)} without --train_file, which names what is trained on; "
            "`mlflow-dr evaluate` measures an encoder without training"
        )
    values: dict[str, str] = {}
    for name, stands_for in _STAND_FOR.items():
        if name not in names:
            continue
        meant = stands_for(given[name])
        if twice := sorted((set(meant) - MAY_DIFFER) & set(typed)):
            raise UsageError(
                f"{typed[name]} and {typed[twice[0]]} say the same thing: give one of them"
            )
        values |= meant
    if without := [f"--{name}" for name in WITHOUT_EFFECT if name in typed]:
        log.warning("%s: accepted, and without effect here", ", ".join(without))
    return values


def is_gc_dpr(typed: Collection[str]) -> bool:
    """Whether a command line with these flags is GC-DPR's."""
    return not set(typed).isdisjoint(MARKS)


def _train_file(pattern: str) -> dict[str, str]:
    files = _files(pattern, "--train_file")
    if len(files) > 1 and (bad := next((file for file in files if JOIN in file), None)):
        raise UsageError(f"--train_file: {bad}: rename it; {JOIN} joins the names of several files")
    return {"dataset_name": JOIN.join(files)}


def _dev_file(pattern: str) -> dict[str, str]:
    files = _files(pattern, "--dev_file")
    if len(files) > 1:
        raise UsageError(f"--dev_file {pattern!r} names {len(files)} files; name one")
    return {"validation_dataset": POOL_PREFIX + files[0]}


def _files(pattern: str, flag_name: str) -> list[str]:
    """Files by a path, a pattern, or several of these with commas; those of a pattern by name."""
    parts = [pattern] if Path(pattern).exists() else pattern.split(",")
    files: list[str] = []
    for part in map(str.strip, parts):
        found = [part] if Path(part).exists() else sorted(glob(part))  # noqa: PTH207 - Path.glob takes no absolute pattern
        if not found:
            raise UsageError(f"{flag_name}: no file {part!r}")
        files += found
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


_STAND_FOR: Mapping[str, Callable[[Any], dict[str, str]]] = {
    "train_file": _train_file,
    "dev_file": _dev_file,
    "hard_negatives": lambda count: {"train_n_passages": str(1 + count)},
    "shuffle_positive_ctx": lambda yes: {"positive_passage_no_shuffle": str(not yes)},
    "sequence_length": lambda length: dict.fromkeys(("q_max_len", "p_max_len"), str(length)),
    "projection_dim": _projection,
    "adam_betas": _betas,
}
