"""Validating the checkpoints of readers by the loop that validates encoders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.devices import AUTO, resolve_device, resolve_dtype
from mlflow_dr.files import file_sha256
from mlflow_dr.reader.config import ReaderValidateConfig
from mlflow_dr.reader.data import ReaderData
from mlflow_dr.reader.model import load_reader
from mlflow_dr.reader.prediction import (
    check_counts,
    find_answers,
    measure_names,
    prediction_data,
    question_measures,
)
from mlflow_dr.reader.sequences import SequenceBuilder
from mlflow_dr.retrieval.measures import mean_values
from mlflow_dr.time_limit import TimeLimit
from mlflow_dr.tracking.checkpoints import READER_TYPE, Checkpoint
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.encoders import encoder_errors
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.prefetch import CheckpointFiles
from mlflow_dr.tracking.runs import TrackedRun, resolve_run
from mlflow_dr.tracking.server import Patience
from mlflow_dr.tracking.validations import bind_name, check_same_config
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validator import validate_checkpoints
from mlflow_dr.validation.worker import Counts

log = logging.getLogger(__name__)

DIGITS = 16
SETTINGS = ("passages_per_question", "max_answer_length", "sequence_length")
"""What figures depend on, beside the results, the measures and the number format."""


def validate_reader(
    config: ReaderValidateConfig, sleep: Callable[[float], None] = time.sleep
) -> Counts:
    """Validate the checkpoints of a reader until its run has ended; see `validate_checkpoints`.

    Args:
        config: what is done.
        sleep: waits; passed in by tests.

    Raises:
        UsageError: as `check_counts`.
        DataError: the results cannot be read.
    """
    check_counts(config)
    state_of(config.results)  # refuses a missing file
    client = connect(config.tracking_uri, may_create=False)
    patiently = Patience(client, config.poll_seconds)
    run = patiently(partial(resolve_run, client, config.run_id))
    return validate_checkpoints(FollowedRun(run), config, ReaderKind(config), sleep)


class ResolvedReading(NamedTuple):
    """A validation of readers on a run.

    Attributes:
        name: prefixes the metrics.
        shown_dataset: name and digest of the results.
        config: with the number format that the name stands for.
        query_texts: the questions by their index; filled when they are read.
    """

    name: str
    shown_dataset: tuple[str, str]
    config: ReaderValidateConfig
    query_texts: Mapping[str, str]

    @property
    def group(self) -> str:
        """The name, because each is evaluated alone."""
        return self.name


class ReaderKind:
    """Readers, which are evaluated by their answers; see `CheckpointKind`.

    Args:
        config: of the results, and of how they are read.
    """

    model_type = READER_TYPE
    awaited_steps: frozenset[int] = frozenset()
    keeps_model = False

    def __init__(self, config: ReaderValidateConfig) -> None:
        self._config = config
        self._dataset = (config.results.name, file_sha256(config.results)[:DIGITS])
        self._data: dict[str, ReaderData] = {}
        self._texts: dict[str, str] = {}

    def start(self) -> None:
        """Refuse a device or number format that this machine does not have."""
        resolve_dtype(self._config.dtype, resolve_device(self._config.device))

    def has_data(self, params: Mapping[str, str]) -> bool:
        """Yes: the configuration names the results."""
        return True

    def resolve(self, run: TrackedRun, is_ahead: bool) -> list[ResolvedReading]:
        """The validation on a run; `auto` is the number format that its name has."""
        config, device = self._config, resolve_device(self._config.device)
        gold = config.gold_passages and file_sha256(config.gold_passages)[:DIGITS]
        wanted: dict[str, object] = {
            "results": self._dataset[1],
            "gold_passages": gold or "none",
            "measures": " ".join(measure_names(config)),
            "dtype": resolve_dtype(config.dtype, device),
            **{name: getattr(config, name) for name in SETTINGS},
        }
        bound = bind_name(run, config.name, wanted)
        if config.dtype == AUTO:
            wanted["dtype"] = resolve_dtype(str(bound.get("dtype", AUTO)), device)
        check_same_config(run, config.name, bound, wanted)
        log.info("validation %r of run %s: %s", config.name, run.id, config.results)
        config = config.replaced(dtype=wanted["dtype"])
        return [ResolvedReading(config.name, self._dataset, config, self._texts)]

    def load(self, checkpoint: Checkpoint, files: CheckpointFiles) -> tuple[Any, Any]:
        """The reader of a checkpoint, and its tokenizer."""
        with files(checkpoint) as directory, encoder_errors(checkpoint.uri):
            return load_reader(str(directory))

    def evaluate(
        self,
        model: tuple[Any, Any],
        checkpoint: Checkpoint,
        validations: Sequence[ResolvedReading],
        limit: TimeLimit,
    ) -> list[Report]:
        """Answer the questions and measure the answers."""
        (reader, tokenizer), (validation,) = model, validations
        config, data = validation.config, self._prepared(tokenizer)
        start = time.perf_counter()
        with limit:
            found = find_answers(reader, tokenizer, config, data)
        values = question_measures(found)
        seconds = time.perf_counter() - start
        most = config.passages_per_question
        passages = sum(min(most, len(data[index].others)) for index in range(len(data)))
        return [Report(mean_values(values), values, {}, seconds, passages, config.dtype)]

    def close(self) -> None:
        """Nothing is held."""

    def _prepared(self, tokenizer: Any) -> ReaderData:
        """The questions and passages, made once for each tokenizer."""
        key = SequenceBuilder(tokenizer).digest
        if key not in self._data:
            self._data[key] = prediction_data(tokenizer, self._config)
            self._texts |= {str(row): text for row, text in enumerate(self._data[key].texts())}
        return self._data[key]
