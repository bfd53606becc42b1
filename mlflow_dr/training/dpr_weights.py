"""The weights of a checkpoint file of DPR's or GC-DPR's, to begin training with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import CheckpointError, UsageError, one_line

WEIGHTS = "model_dict"
QUERIES, PASSAGES = "question_model.", "ctx_model."
PROJECTION = "encode_proj."
UNUSED = ("pooler.", "embeddings.position_ids")


def load_dpr_weights(file: str, encoder: Encoder) -> None:
    """Replace an encoder's weights by those of a DPR checkpoint; nothing in the file is run.

    Args:
        file: what DPR wrote by `torch.save`: `model_dict` with `question_model.*` and
            `ctx_model.*`.
        encoder: with weights of their own for queries.

    Raises:
        UsageError: there is no such file, or the encoder is not of its shape.
        CheckpointError: the file is damaged, of another kind, or would run code.
    """
    if encoder.query_tower is None:
        raise UsageError("--model_file has two encoders; add --untie_encoder")
    state = _read(Path(file).expanduser())
    for prefix, tower in ((QUERIES, encoder.query_tower), (PASSAGES, encoder)):
        part = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        if not part:
            raise CheckpointError(f"{file}: {WEIGHTS} has no {prefix}*; expected DPR's bi-encoder")
        _load(file, tower, part)


def _load(file: str, tower: Encoder, part: Mapping[str, Tensor]) -> None:
    layer = {
        name.removeprefix(PROJECTION): value
        for name, value in part.items()
        if name.startswith(PROJECTION)
    }
    weights = {
        name: value for name, value in part.items() if not name.startswith((PROJECTION, *UNUSED))
    }
    projections: list[Any] = [module for module in tower.head if hasattr(module, "linear")]
    if bool(layer) != bool(projections):
        size = len(layer["weight"]) if "weight" in layer else 0
        raise UsageError(f"--model_file {file} needs --projection_dim {size}")
    try:
        missing, unexpected = tower.backbone.load_state_dict(weights, strict=False)
        if layer:
            projections[0].linear.load_state_dict(layer)
    except RuntimeError as error:
        raise UsageError(
            f"--model_file {file}: its weights are not of the model's shape; name the model that "
            f"it was trained from by --pretrained_model_cfg ({one_line(error)[:200]})"
        ) from error
    missing = [name for name in missing if not name.startswith(UNUSED)]
    if missing or unexpected:
        what, name = ("lacks", missing[0]) if missing else ("has an unknown", unexpected[0])
        raise UsageError(f"--model_file {file} {what} {name}; is it of another kind of model?")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(f"--model_file {path}: no such file")
    try:
        read: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(
            f"--model_file {path}: damaged, or it holds objects whose code would run; where you "
            f"trust it, keep its weights alone: torch.save({{'{WEIGHTS}': torch.load(FILE, "
            f"weights_only=False)['{WEIGHTS}']}}, NEW_FILE) ({type(error).__name__})"
        ) from error
    state = read.get(WEIGHTS) if isinstance(read, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"--model_file {path}: no {WEIGHTS} of tensors; expected DPR's file")
    return state
