"""A checkpoint's encoder: read from its files, and tried."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.devices import resolve_device, torch_dtype
from mlflow_dr.errors import CheckpointError, UnavailableError, UsageError
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.encoders import encoder_errors, local_cause
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.validation.evaluate import Settings

TEXT = "text"


def encoder_of(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Encoder:
    """The encoder of a checkpoint, which may come as safetensors only where it was published.

    Args:
        checkpoint: published, or found in a directory.
        changes: what replaces what the checkpoint says.

    Raises:
        UnavailableError: it cannot be had or read here.
        CheckpointError: it cannot be read anywhere.
        UsageError: it can be read without the changes only.
        OSError: the disk is full.
    """
    with checkpoint_files(checkpoint) as directory:
        return loaded(checkpoint, directory, changes)


def loaded(checkpoint: Checkpoint, directory: Path, changes: Mapping[str, Any]) -> Encoder:
    """The encoder of a checkpoint that was fetched; see `encoder_of`."""
    what = checkpoint.directory or checkpoint.uri
    try:
        with encoder_errors(what):
            return load_encoder(directory, safetensors_only=not checkpoint.directory, **changes)
    except UsageError as error:
        if changes:
            loaded(checkpoint, directory, {})
            raise  # it is what the user has asked for
        kind = UnavailableError if local_cause(error) else CheckpointError
        raise kind(f"{what} cannot be read: {error}") from error


def check_vectors(encoder: Encoder, settings: Settings) -> None:
    """Encode a query and a passage: what cannot be encoded at all is no encoder.

    Raises:
        CheckpointError: the encoder gives NaN.
        Exception: as the libraries raise.
    """
    encoder.eval().to(resolve_device(settings.device), torch_dtype(settings.dtype))
    tower = encoder.query_encoder
    asking = TextTokenizer(tower.tokenizer, tower.settings)
    answering = TextTokenizer(encoder.tokenizer, encoder.settings)
    query_ids = asking.query_ids([Query("", TEXT)])
    passage_ids = answering.passage_ids([Passage("", TEXT, TEXT)])
    encode_all(tower, token_table(query_ids), asking.pad_id, "query")
    encode_all(encoder, token_table(passage_ids), answering.pad_id, "passage")
