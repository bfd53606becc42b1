"""Whether checkpoints can be read with what replaces what they say, before a name stands for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mlflow_dr.errors import CheckpointError, UnavailableError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import run_validations
from mlflow_dr.validation.loading import encoder_of


def is_tried(run: TrackedRun, names: Sequence[str], changes: Mapping[str, Any]) -> bool:
    """Whether the names may be bound with these changes: one checkpoint has been read with them.

    What a name is bound to on a run is written once, so a wrong tokenizer or length would make it
    useless for good. Nothing is read where there are no changes, or all names are bound already.

    Args:
        run: whose checkpoints.
        names: of validations.
        changes: what replaces what checkpoints say.

    Returns:
        Whether there was a checkpoint that can be read.

    Raises:
        UsageError: a checkpoint can be read without the changes only.
    """
    if not changes or run_validations(run).keys() >= set(names):
        return True
    for checkpoint in run_checkpoints(run):
        if checkpoint.ready and not checkpoint.is_pruned and _is_readable(checkpoint, changes):
            return True
    return False


def _is_readable(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> bool:
    try:
        encoder_of(checkpoint, changes)
    except UnavailableError:
        return False
    except CheckpointError as error:
        with suppress(CheckpointError):
            encoder_of(checkpoint, {})
            said = ", ".join(f"{key} {value}" for key, value in changes.items())
            raise UsageError(
                f"step {checkpoint.step} cannot be read with {said}: {error}"
            ) from error
        return False
    return True
