"""What is compared: a run's best checkpoint, the one of a step, a published one, or an encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mlflow_dr.decisions.best import find_best
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.retrieval.measures import Measure, parse_measures
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_of_step
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.encoders import MODEL_SCHEME
from mlflow_dr.tracking.registry import checkpoint_by_uri
from mlflow_dr.tracking.runs import TrackedRun, find_run, resolve_run
from mlflow_dr.tracking.validations import run_validations

RUN = re.compile(r"([^/\\]+?)(?:@(\d+))?")
RUN_ID = re.compile(r"[0-9a-f]{32}")
# of a validation's configuration, what replaces what the checkpoint says
ENCODER_CHANGES = ("pooling", "normalize", "query_max_length", "passage_max_length", "tokenizer")


@dataclass(frozen=True)
class Operand:
    """One of what is compared.

    Attributes:
        given: what the user wrote.
        run: where it was published; None for an encoder.
        checkpoint: likewise.
        config: the validation's configuration on that run; empty where it has none.
    """

    given: str
    run: TrackedRun | None = None
    checkpoint: Checkpoint | None = None
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called."""
        if self.run is None or self.checkpoint is None:
            return self.given
        return f"{self.run.name} step {self.checkpoint.step}, {self.checkpoint.uri}"

    @property
    def encoder_changes(self) -> dict[str, Any]:
        """What the validation replaces of what the checkpoint says."""
        return {key: self.config[key] for key in ENCODER_CHANGES if key in self.config}


def find_operands(
    words: Sequence[str], name: str, measure: Measure | None, tracking_uri: str | None = None
) -> list[Operand]:
    """What the words stand for; a server is asked only if one of them may be on it.

    Args:
        words: `RUN` (an id, the beginning of one, or a name), `RUN@STEP`, what
            `checkpoint_by_uri` takes, or an encoder's directory or hub name.
        name: the validation by which a run's best checkpoint is chosen.
        measure: likewise; the validation's first when None.
        tracking_uri: where runs and checkpoints are looked up.

    Raises:
        UsageError: a run has no such step, validation or measure.
        TrackingError: no such run or checkpoint, nothing was measured, or no server.
    """
    connected = cache(lambda: connect(tracking_uri, may_create=False))

    def found_run(text: str) -> TrackedRun | None:
        """The run that is meant; None where the text can only be an encoder's name."""
        try:
            return resolve_run(connected(), text)
        except UsageError:  # several runs
            raise
        except TrackingError:
            if RUN_ID.fullmatch(text):
                raise
            return None

    def found(word: str) -> Operand:
        if word.startswith(MODEL_SCHEME):
            checkpoint = checkpoint_by_uri(connected(), word)
            if not checkpoint.run_id:
                return Operand(word)
            run = find_run(connected(), checkpoint.run_id)
            return Operand(word, run, checkpoint, run_validations(run).get(name, {}))
        match = RUN.fullmatch(word)
        named = found_run(match[1]) if match and not Path(word).is_dir() else None
        if match is None or named is None:
            return Operand(word)
        run = named
        config = run_validations(run).get(name, {})
        if match[2] is not None:
            return Operand(word, run, checkpoint_of_step(run, int(match[2])), config)
        if not config:
            raise UsageError(
                f"run {run.id} has no validation {name!r} to choose its best checkpoint by; give "
                "another --name, or RUN@STEP"
            )
        chosen = measure or parse_measures(str(config["measures"]))[0]
        return Operand(word, run, find_best(run, f"{name}/{chosen.metric}").checkpoint, config)

    return [found(word) for word in words]
