"""Validating the checkpoints of a reader's run, while it is trained or later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.errors import CheckpointError, UnavailableError
from mlflow_dr.files import file_sha256
from mlflow_dr.reader.config import ReaderValidateConfig
from mlflow_dr.reader.model import load_reader
from mlflow_dr.reader.prediction import (
    check_counts,
    find_answers,
    measure_names,
    reader_measures,
)
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import Claims, HeartbeatMonitor
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import (
    State,
    is_finished,
    mark_failed,
    record_result,
    validation_state,
    write_recorded,
)
from mlflow_dr.tracking.runs import TrackedRun, resolve_run
from mlflow_dr.tracking.server import Patience, ServerClock
from mlflow_dr.tracking.validations import bind_name, check_same_config

log = logging.getLogger(__name__)

PATIENCE = 60.0
SETTINGS = (
    *("eval_top_docs", "passages_per_question", "max_answer_length", "sequence_length"),
    *("gold_passages", "dtype"),
)
"""What figures depend on, beside the results themselves."""


class ReaderCounts(NamedTuple):
    """How many checkpoints were validated, and how many could not be."""

    done: int
    failed: int


def validate_reader(
    config: ReaderValidateConfig, sleep: Callable[[float], None] = time.sleep
) -> ReaderCounts:
    """Validate the checkpoints of a reader's run until it has ended, newest first.

    Other validators may do the same: each checkpoint is claimed first, and the claim of a validator
    that has died is taken over.

    Args:
        config: what is done.
        sleep: waits; passed in by tests.

    Raises:
        UsageError: the name stands for another configuration on this run, or as
            `check_counts`.
        DataError: the results cannot be read.
        TrackingError: there is no such run, or the server refuses the figures.
        UnavailableError: a checkpoint cannot be fetched or read on this machine.
    """
    check_counts(config)
    state_of(config.results)  # refuses a missing file
    run = resolve_run(connect(config.tracking_uri, may_create=False), config.run_id)
    claims = Claims(run.client)
    try:
        return _ReaderValidator(run, config, claims, sleep).work()
    finally:
        claims.close()


class _ReaderValidator:
    """The loop of one validator."""

    def __init__(
        self,
        run: TrackedRun,
        config: ReaderValidateConfig,
        claims: Claims,
        sleep: Callable[[float], None],
    ) -> None:
        self._run = run
        self._config = config
        self._claims = claims
        self._sleep = sleep
        self._followed = FollowedRun(run)
        self._heartbeats = HeartbeatMonitor(PATIENCE)
        self._patiently = Patience(run.client, config.poll_seconds, sleep)
        self._clock = ServerClock()
        self._dataset = (config.results.name, file_sha256(config.results)[:16])
        settings = {name: str(getattr(config, name)) for name in SETTINGS}
        measures = " ".join(measure_names(config))
        wanted = {"results": self._dataset[1], "measures": measures, **settings}
        bound = self._patiently(partial(bind_name, run, config.name, wanted))
        check_same_config(run, config.name, bound, wanted)

    def work(self) -> ReaderCounts:
        """Validate what is there and what comes."""
        counts = {State.DONE: 0, State.FAILED: 0}
        has_asked = False
        while True:
            snapshot = self._patiently(self._followed.snapshot)
            left = [checkpoint for checkpoint in snapshot.checkpoints if self._is_left(checkpoint)]
            free = [c for c in left if self._heartbeats.is_free(c, self._config.name)]
            if self._work_on(reversed(free), counts):
                has_asked = False
            elif not self._config.follow or (snapshot.over and not left):
                return ReaderCounts(counts[State.DONE], counts[State.FAILED])
            elif not left and snapshot.over is None and not has_asked:
                has_asked = True  # nothing is left: the next snapshot tells whether the run is over
            else:
                self._sleep(self._config.poll_seconds)
                has_asked = False

    def _work_on(self, free: Iterable[Checkpoint], counts: dict[State, int]) -> bool:
        """Validate the first checkpoint that can be claimed; returns whether there was one."""
        for checkpoint in free:
            if self._patiently(partial(self._claims.claim, checkpoint, self._config.name)):
                counts[self._validate(checkpoint)] += 1
                return True
        return False

    def _is_left(self, checkpoint: Checkpoint) -> bool:
        if is_finished(checkpoint, self._config.name) or checkpoint.is_pruned:
            self._followed.checkpoints.mark_done(checkpoint)
            return False
        return checkpoint.has_all_files

    def _validate(self, checkpoint: Checkpoint) -> State:
        """Evaluate a claimed checkpoint and write its figures."""
        name = self._config.name
        is_finished_now = False
        run, dataset = self._run, self._dataset
        try:
            if validation_state(checkpoint, name) is State.RECORDED:
                written = self._patiently(lambda: write_recorded(run, checkpoint, name, dataset))
            else:
                values = self._evaluate(checkpoint)
                now_ms = self._clock.now_ms()
                written = self._patiently(
                    lambda: record_result(run, checkpoint, name, values, dataset, now_ms)
                )
            is_finished_now = True
            figures = ", ".join(f"{key} {value:.4f}" for key, value in written.items())
            log.info("step %d: %s", checkpoint.step, figures)
            return State.DONE
        except UnavailableError:
            raise
        except CheckpointError as error:
            self._patiently(partial(mark_failed, self._run, checkpoint, name, str(error)))
            is_finished_now = True
            log.warning("step %d: %s", checkpoint.step, error)
            return State.FAILED
        finally:
            self._claims.drop(checkpoint, name, finished=is_finished_now)

    def _evaluate(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Figures by the name of their metric."""
        start = time.monotonic()

        def load() -> tuple[object, object]:
            with checkpoint_files(checkpoint) as directory:
                return load_reader(str(directory))

        found = find_answers(*self._patiently(load, UnavailableError), self._config)
        values = {key.replace("@", "_at_"): value for key, value in reader_measures(found).items()}
        return {**values, "seconds": time.monotonic() - start}
