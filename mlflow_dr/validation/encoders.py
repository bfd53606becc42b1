"""Encoders, as a validator reads and evaluates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.devices import resolve_device, torch_dtype
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.opening import LOCAL, Engines, device_names
from mlflow_dr.errors import CheckpointError, UnavailableError, UsageError
from mlflow_dr.retrieval.encode import check_finite
from mlflow_dr.time_limit import TimeLimit
from mlflow_dr.tracking.checkpoints import MODEL_TYPE, Checkpoint, run_checkpoints
from mlflow_dr.tracking.encoders import encoder_errors, local_cause
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.prefetch import CheckpointFiles
from mlflow_dr.tracking.runs import DATASET_PARAM, SPLIT_PARAM, TrackedRun
from mlflow_dr.tracking.validations import run_validations
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.evaluate import evaluate_all, tokenise
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.resolve import (
    EvalDatasets,
    ResolvedMean,
    RetrievalValidation,
    resolve_mean,
)
from mlflow_dr.validation.validations import EvalConfig, Validation

TEXT = "text"


class EncoderKind:
    """Encoders, which are evaluated by what they retrieve; see `CheckpointKind`.

    Args:
        config: has the validations, and how encoders are read.
    """

    model_type = MODEL_TYPE

    def __init__(self, config: ValidateConfig) -> None:
        self._config = config
        self._engines = Engines()
        self._datasets = EvalDatasets(self._engines)

    @property
    def awaited_steps(self) -> set[int]:
        """The steps of encoders that choose subsets."""
        validations = self._config.all_validations
        parts = [part for validation in validations for part in validation.subset.terms]
        return {part.step for part in parts if part.step is not None}

    @property
    def keeps_model(self) -> bool:
        """Whether several corpora are encoded, or one in several ways."""
        ways = {
            (each.dataset, settings.engine, settings.device, settings.dtype, str(settings.prompts))
            for each in self._config.all_validations
            for settings in [each.settings]
        }
        return len(ways) > 1

    def start(self) -> None:
        """Open the engine; there may be no such cluster."""
        settings = self._config.all_validations[0].settings
        self._engines.get(settings.engine, device_names(settings.engine, settings.device))

    def has_data(self, params: Mapping[str, str]) -> bool:
        """Whether the run or the configuration names the dataset and split of each validation."""
        return all(
            (validation.dataset or DATASET_PARAM in params)
            and (validation.split or SPLIT_PARAM in params)
            for validation in self._config.all_validations
        )

    def resolve(
        self, run: TrackedRun, is_ahead: bool
    ) -> list[RetrievalValidation | ResolvedMean] | None:
        """The validations on a run; nothing is bound yet if overrides of encoders are untried."""
        validations, changes = self._config.all_validations, self._config.encoder_changes
        if not check_encoder_overrides(run, validations, changes) and is_ahead:
            for validation in validations:
                if not validation.mean_of:
                    self._datasets.open(run, validation)
            return None
        searching = {
            validation.name: self._datasets.resolve(run, validation, changes)
            for validation in validations
            if not validation.mean_of
        }
        means = [
            resolve_mean(run, validation, searching)
            for validation in validations
            if validation.mean_of
        ]
        return [*searching.values(), *means]

    def load(self, checkpoint: Checkpoint, files: CheckpointFiles = checkpoint_files) -> Encoder:
        """The encoder of a checkpoint."""
        return load_checkpoint(checkpoint, self._config.encoder_changes, files)

    def evaluate(
        self,
        model: Encoder,
        checkpoint: Checkpoint,
        validations: Sequence[RetrievalValidation],
        limit: TimeLimit,
    ) -> Sequence[Report]:
        """Encode, search and measure."""
        settings = validations[0].settings
        with limit:
            dtype = next(model.parameters()).dtype
            if dtype not in (torch.float32, torch_dtype(settings.dtype)):  # it has lost digits
                model = self.load(checkpoint)
            with encoder_errors(checkpoint.uri):
                check_vectors(model, settings)
        pairs = [(validation.data, validation.settings) for validation in validations]
        engine = self._engines.get(settings.engine, settings.device)
        if limit.seconds is not None:
            tokenise(model, pairs)  # done for all checkpoints
        with limit:
            return evaluate_all(model, pairs, False, engine)

    def close(self) -> None:
        """Close the engines."""
        self._engines.close()


def load_checkpoint(
    checkpoint: Checkpoint, changes: Mapping[str, Any], files: CheckpointFiles = checkpoint_files
) -> Encoder:
    """The encoder of a checkpoint; a published one has to be in safetensors format.

    Args:
        checkpoint: published, or found in a directory.
        changes: what replaces settings of the encoder.
        files: fetches it.

    Raises:
        UnavailableError: it cannot be fetched or read on this machine.
        CheckpointError: it cannot be read anywhere.
        UsageError: it can only be read without the changes.
        OSError: the disk is full.
    """
    with files(checkpoint) as directory:
        return _load(checkpoint, directory, changes)


def _load(checkpoint: Checkpoint, directory: Path, changes: Mapping[str, Any]) -> Encoder:
    name = checkpoint.directory or checkpoint.uri
    try:
        with encoder_errors(name):
            return load_encoder(directory, safetensors_only=not checkpoint.directory, **changes)
    except UsageError as error:
        if changes:
            _load(checkpoint, directory, {})
            raise  # the changes are the user's
        kind = UnavailableError if local_cause(error) else CheckpointError
        raise kind(f"{name} cannot be read: {error}") from error


def check_vectors(encoder: Encoder, settings: EvalConfig) -> None:
    """Encode a query and a passage, to find an encoder that cannot encode any text.

    Raises:
        CheckpointError: the encoder gives NaN.
        Exception: as the libraries raise.
    """
    device, dtype = torch.device("cpu"), torch_dtype(settings.dtype)
    if settings.engine == LOCAL and "," not in settings.device:
        device = resolve_device(settings.device)  # others encode in other processes
    elif dtype == torch.float16:
        dtype = torch.float32  # a processor does not compute in fp16
    encoder.eval().to(device, dtype)
    query_tokenizer = TextTokenizer.of(encoder.query_encoder)
    passage_tokenizer = TextTokenizer.of(encoder)
    query_ids = query_tokenizer.query_ids([Query("", TEXT)])
    passage_ids = passage_tokenizer.passage_ids([Passage("", TEXT, TEXT)])
    for of_kind, ids, what in (
        (encoder.query_encoder, query_ids, "query"),
        (encoder, passage_ids, "passage"),
    ):
        tokens = torch.tensor(ids, device=device)
        with torch.inference_mode():
            check_finite(of_kind(tokens, torch.ones_like(tokens)), what)


def check_encoder_overrides(
    run: TrackedRun, validations: tuple[Validation, ...], changes: Mapping[str, Any]
) -> bool:
    """Whether a checkpoint can be read with the overrides of encoders, before a name is bound.

    A name always stands for one configuration, so a wrong tokenizer or length would make it
    useless. Nothing is read if there are no overrides, or if all names are bound already.

    Returns:
        Whether there was a checkpoint that can be read.

    Raises:
        UsageError: a checkpoint can only be read without the overrides.
    """
    names = {validation.name for validation in validations}
    if not changes or run_validations(run).keys() >= names:
        return True
    return any(
        _is_readable(checkpoint, changes)
        for checkpoint in run_checkpoints(run)
        if checkpoint.ready and not checkpoint.is_pruned
    )


def _is_readable(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> bool:
    try:
        load_checkpoint(checkpoint, changes)
    except UnavailableError:
        return False
    except CheckpointError as error:
        with suppress(CheckpointError):
            load_checkpoint(checkpoint, {})
            overrides = ", ".join(f"{key} {value}" for key, value in changes.items())
            raise UsageError(
                f"step {checkpoint.step} cannot be read with {overrides}: {error}"
            ) from error
        return False
    return True
