"""Weights of a saved encoder, put back into one of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mlflow_dr.encoder import lora
from mlflow_dr.encoder.description import reading
from mlflow_dr.encoder.directory import QUERY_TOWER, head_state, load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.sentence_transformers import module_folder
from mlflow_dr.errors import CheckpointError


def restore_encoder(directory: Path, encoder: Encoder, trust_remote_code: bool = False) -> None:
    """Read an encoder's weights back, as `save_encoder(..., merged=False)` wrote them.

    Args:
        directory: where they are.
        encoder: gets them; with adapters, the adapters alone are read.
        trust_remote_code: whether code in the directory may run.

    Raises:
        CheckpointError: the directory is damaged, or of an encoder of another shape.
    """
    with reading(directory):
        _restore(directory, encoder, trust_remote_code)


def _restore(directory: Path, encoder: Encoder, trust_remote_code: bool) -> None:
    if lora.is_adapted(encoder.backbone):
        lora.restore_adapter(directory, encoder.backbone)
        for index, module in enumerate(encoder.head, start=1):
            if module.state_dict():
                _put(module, head_state(directory / module_folder(index, module)), directory)
        if encoder.query_tower is not None:
            _restore(directory / QUERY_TOWER, encoder.query_tower, trust_remote_code)
        return
    saved = load_encoder(directory, trust_remote_code=trust_remote_code, safetensors_only=True)
    _put(encoder, saved.state_dict(), directory)


def _put(module: nn.Module, state: Mapping[str, Any], directory: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{directory}: not of the encoder that is trained: {reason}"
        ) from error
