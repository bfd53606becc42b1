"""One job of a validator: fetch a checkpoint, evaluate it, and record what was found."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.encoder.files import encoder_defect
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import (
    CheckpointError,
    LostError,
    MlflowDrError,
    TrackingError,
    UnavailableError,
    one_line,
)
from mlflow_dr.files import is_full
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id, is_deleted
from mlflow_dr.tracking.clock import ServerClock
from mlflow_dr.tracking.encoders import encoder_errors, local_cause
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.patience import Patience
from mlflow_dr.tracking.results import (
    State,
    mark_failed,
    record_result,
    validation_state,
    write_recorded,
)
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.binding import Bound
from mlflow_dr.validation.evaluate import Report, evaluate_all
from mlflow_dr.validation.loading import check_vectors, encoder_of, loaded
from mlflow_dr.validation.pace import Speed
from mlflow_dr.validation.plan import Plan

log = logging.getLogger(__name__)

Outcome = Report | CheckpointError | None
"""What came of a validation; None where figures were recorded already."""


class Job(NamedTuple):
    """A checkpoint, and the validations that this process has claimed of it.

    Attributes:
        checkpoint: which.
        run: whose.
        bound: the validations.
        files: the checkpoint's, where they were fetched ahead.
    """

    checkpoint: Checkpoint
    run: TrackedRun
    bound: Sequence[Bound]
    files: Files | None = None

    def with_files(self) -> Job:
        """The same, its files fetched; without where they cannot be had now."""
        try:
            return self._replace(files=Files(self.checkpoint))
        except (CheckpointError, OSError):
            return self  # that is asked again, and told, when its turn comes

    def drop_files(self) -> None:
        """Remove what was fetched ahead."""
        if self.files:
            self.files.close()


class Files:
    """A checkpoint's files, had before their turn.

    Args:
        checkpoint: published, or found in a directory.

    Attributes:
        directory: where they are until they are closed.

    Raises:
        CheckpointError: they cannot be had.
        OSError: the disk is full.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        with ExitStack() as ending:
            self.directory: Path = ending.enter_context(checkpoint_files(checkpoint))
            self._ending = ending.pop_all()

    def close(self) -> None:
        """Remove them, if they were copied."""
        self._ending.close()


class Found(NamedTuple):
    """What came of the validations of a job; nothing of those that are put off.

    Attributes:
        job: which.
        outcomes: what came of each.
        setback: why the others are put off, where that is this validator's trouble.
    """

    job: Job
    outcomes: Sequence[tuple[Bound, Outcome]]
    setback: UnavailableError | None = None


class Jobs:
    """Does one job after another.

    Args:
        plan: how encoders are read.
        patiently: does what needs the server.
        clock: the server's time.
        names_runs: whether log lines name the run, because there may be several.

    Attributes:
        speed: how fast the last evaluation was; None before the first.
        seconds: what the last job took; None before the first.
    """

    def __init__(
        self, plan: Plan, patiently: Patience, clock: ServerClock, names_runs: bool = False
    ) -> None:
        self.speed: Speed | None = None
        self.seconds: float | None = None
        self._plan = plan
        self._names_runs = names_runs
        self._patiently = patiently
        self._clock = clock

    def evaluated(self, job: Job) -> Found:
        """Fetch the checkpoint and evaluate it, where that was not done before.

        Raises:
            OSError: the disk is full.
        """
        start = time.monotonic()
        recorded = [
            one for one in job.bound if validation_state(job.checkpoint, one.name) is State.RECORDED
        ]
        left = [one for one in job.bound if one not in recorded]
        outcomes: Sequence[Outcome] = []
        setback: UnavailableError | None = None
        try:
            outcomes = self._evaluated(job, left) if left else []
        except UnavailableError as error:
            setback = error
        self.seconds = time.monotonic() - start
        reports = [one for one in outcomes if isinstance(one, Report)]
        if reports:
            self.speed = Speed.of(reports[0], self.seconds)
        nothing: list[tuple[Bound, Outcome]] = [(one, None) for one in recorded]
        return Found(job, [*nothing, *zip(left, outcomes, strict=False)], setback)

    def written(self, found: Found) -> dict[str, State]:
        """Record what was found; what has become of each validation, nothing of one put off.

        Raises:
            TrackingError: the server refuses what it is told.
        """
        return {
            bound.name: self._written(found.job, bound, outcome)
            for bound, outcome in found.outcomes
        }

    def _evaluated(self, job: Job, bound: Sequence[Bound]) -> Sequence[Outcome]:
        """A report of each validation, or why there is none; nothing where it is put off.

        Raises:
            UnavailableError: this validator cannot have the checkpoint, for now or at all.
        """
        try:
            encoder = self._encoder(job)
            with encoder_errors(job.checkpoint.uri):
                check_vectors(encoder, bound[0].settings)
            return _reports(encoder, bound)
        except CheckpointError as error:
            if self._is_removed(job):
                log.warning("%s is passed over: it was removed", self._shown(job))
                return []
            found_at = job.checkpoint.directory
            if isinstance(error, UnavailableError) and found_at and encoder_defect(Path(found_at)):
                log.warning("%s is passed over: %s", self._shown(job), error)
                return []
            if isinstance(error, UnavailableError) and not isinstance(error, LostError):
                raise
            return [error] * len(bound)

    def _is_removed(self, job: Job) -> bool:
        """Whether the files of a checkpoint, or all of it, were removed meanwhile."""
        client, model_id = job.run.client, job.checkpoint.model_id
        try:
            return self._patiently(partial(checkpoint_by_id, client, model_id)).is_pruned
        except TrackingError:
            if not is_deleted(client, model_id):
                raise
            return True

    def _encoder(self, job: Job) -> Encoder:
        changes = self._plan.encoder_changes
        if job.files:
            return loaded(job.checkpoint, job.files.directory, changes)
        return self._patiently(partial(encoder_of, job.checkpoint, changes), UnavailableError)

    def _written(self, job: Job, bound: Bound, outcome: Outcome) -> State:
        """Record what came of a validation: the values of each query, then the figures."""
        checkpoint, run, name = job.checkpoint, job.run, bound.name
        if isinstance(outcome, CheckpointError):
            log.error("%s cannot be validated: %s", self._shown(job), outcome)
            self._patiently(partial(mark_failed, run, checkpoint, name, str(outcome)))
            return State.FAILED
        if outcome is None:
            write = partial(write_recorded, run, checkpoint, name, bound.dataset)
        else:
            self._patiently(partial(log_per_query_values, run, checkpoint, name, outcome.per_query))
            now_ms, values = self._clock.now_ms(), _figures(outcome)
            write = partial(record_result, run, checkpoint, name, values, bound.dataset, now_ms)
        figures = self._patiently(write)
        several = f"{name}: " if len(self._plan.validations) > 1 else ""
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        log.info("%s: %s%s", self._shown(job), several, shown)
        return State.DONE

    def _shown(self, job: Job) -> str:
        """The step; of several runs also which one."""
        run = f"{job.run.label} " if self._names_runs else ""
        return f"{run}step {job.checkpoint.step}"


def _reports(encoder: Encoder, bound: Sequence[Bound]) -> Sequence[Report]:
    """Evaluate an encoder that gives vectors.

    Raises:
        UnavailableError: something breaks that may be this machine's fault as well.
        OSError: the disk is full.
        MlflowDrError: as it was raised.
    """
    try:
        return evaluate_all(encoder, [(one.prepared, one.settings) for one in bound])
    except MlflowDrError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_full(error, Path()):
            raise
        log.debug("an evaluation has broken off", exc_info=True)
        reason = f"it cannot be evaluated here: {one_line(error)}"
        raise UnavailableError(reason, lasting=local_cause(error) is None) from error


def _figures(report: Report) -> dict[str, float]:
    """A report as metrics, named as MLflow allows."""
    measures = parse_measures(" ".join(report.measures))
    return {
        **{one.metric: report.measures[one] for one in measures},
        "seconds": report.seconds,
        "passages_per_second": report.passages / report.seconds,
    }
