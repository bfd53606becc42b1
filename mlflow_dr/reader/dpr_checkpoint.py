"""Readers of DPR and GC-DPR, and of transformers' `DPRReader`, from and to their own files.

A checkpoint of DPR has `encoder.*`, `qa_outputs.*` and `qa_classifier.*` in `model_dict`.
transformers has the same weights under `span_predictor.`, with `encoder.bert_model.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, BertConfig, DPRReader

from mlflow_dr.encoder.checks import checkpoint_errors
from mlflow_dr.encoder.dpr_checkpoint import SETTINGS, UNUSED, WEIGHTS, read_dpr_checkpoint
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.errors import UsageError, one_line
from mlflow_dr.files import atomic_write
from mlflow_dr.reader.model import ExtractiveReader

ENCODER, BACKBONE = "encoder.", "backbone."
OF_TRANSFORMERS = "span_predictor."
LAYERS = ("qa_outputs.", "qa_classifier.")
LONGEST = 350
SINCE_2021 = "encoder"
"""Of settings: DPR's programs, since they are configured by hydra, tell question from passage."""


def is_dpr_reader(path: Path) -> bool:
    """Whether a file is a reader's checkpoint of DPR, or a directory a `DPRReader`.

    Raises:
        UsageError: there is no such file.
        CheckpointError: the file is damaged, of another kind, or would run code.
    """
    if path.is_dir():
        return "DPRReader" in (AutoConfig.from_pretrained(path).architectures or [])
    return f"{LAYERS[0]}weight" in read_dpr_checkpoint(path).state


def import_dpr_reader(path: Path, backbone: str | None = None) -> tuple[ExtractiveReader, Any]:
    """The reader of a checkpoint, which gives the logits of DPR's own programs, and its tokenizer.

    Segment ids are all 0, or, if the checkpoint was saved by DPR since 2021, 1 after the question.

    Args:
        path: a checkpoint of DPR, or a directory with transformers' `DPRReader`.
        backbone: directory or hub name of the model that it was trained from, for its
            configuration and tokenizer; as the checkpoint says when None.

    Raises:
        UsageError: no such file or model, or the checkpoint is not of this model.
        CheckpointError: the checkpoint is damaged, of another kind, or would run code.
    """
    if path.is_dir():
        return _of_transformers(path, backbone)
    checkpoint = read_dpr_checkpoint(path)
    directory = checkpoint.backbone_directory(backbone)
    options = {"do_lower_case": True} if checkpoint.settings.get("do_lower_case") else {}
    try:
        reader = ExtractiveReader(AutoConfig.from_pretrained(directory))
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{directory}: no configuration and tokenizer of a BERT ({one_line(error)})"
        ) from error
    _load(reader, checkpoint.state, path)
    if SINCE_2021 in checkpoint.settings:
        reader.config.segment_separator = tokenizer.sep_token_id
    return reader.eval(), tokenizer


def _of_transformers(directory: Path, backbone: str | None) -> tuple[ExtractiveReader, Any]:
    with checkpoint_errors(directory):
        source: Any = DPRReader.from_pretrained(directory, dtype=torch.float32)
        config = source.config.to_dict()
        config.pop("model_type")
        reader = ExtractiveReader(BertConfig(**config))
        state = {
            name.removeprefix(OF_TRANSFORMERS).replace("bert_model.", ""): value
            for name, value in source.state_dict().items()
        }
        tokenizer = AutoTokenizer.from_pretrained(
            encoder_directory(backbone) if backbone else directory
        )
    _load(reader, state, directory)
    return reader.eval(), tokenizer


def _load(reader: ExtractiveReader, state: Mapping[str, Tensor], path: Path) -> None:
    """Load weights by DPR's names.

    Raises:
        UsageError: they are not of this model.
    """
    weights = {
        name.replace(ENCODER, BACKBONE, 1) if name.startswith(ENCODER) else name: value
        for name, value in state.items()
        if not name.removeprefix(ENCODER).startswith(UNUSED)
    }
    try:
        reader.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{path}: its weights are not of this model; name the model that it was trained from "
            f"by --backbone ({one_line(error)[:200]})"
        ) from error


def export_dpr_reader(reader: ExtractiveReader, tokenizer: Any, path: Path, backbone: str) -> None:
    """Write a reader as a checkpoint that DPR and GC-DPR load.

    Args:
        reader: its backbone is a BERT.
        tokenizer: the reader's.
        path: the file.
        backbone: what DPR's programs are told that it was trained from: a directory or hub name.

    Raises:
        UsageError: the backbone is no BERT, or GC-DPR would compute other logits.
    """
    if getattr(reader.config, "segment_separator", None) is not None:
        raise UsageError(
            "GC-DPR's programs cannot use this reader: it was trained by DPR since 2021, with "
            "segment ids of question and passage"
        )
    if reader.config.model_type != "bert":
        raise UsageError("DPR's programs cannot use this reader: its backbone is no BERT")
    width = reader.config.hidden_size
    state = {
        name.replace(BACKBONE, ENCODER, 1): value.contiguous().cpu()
        for name, value in reader.state_dict().items()
    }
    state[f"{ENCODER}pooler.dense.weight"] = torch.eye(width)
    state[f"{ENCODER}pooler.dense.bias"] = torch.zeros(width)
    settings = {
        "do_lower_case": tokenizer("Ab")["input_ids"] == tokenizer("ab")["input_ids"],
        "pretrained_model_cfg": backbone,
        "encoder_model_type": "hf_bert",
        "pretrained_file": None,
        "projection_dim": 0,
        "sequence_length": LONGEST,
    }
    content = {WEIGHTS: state, SETTINGS: settings, "offset": 0, "epoch": 0}
    content |= {"optimizer_dict": {}, "scheduler_dict": {}}
    with atomic_write(path) as partial:
        torch.save(content, partial)
