"""One piece of work of a validator: fetch a checkpoint, evaluate it, record the figures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mlflow_dr.encoder.files import encoder_defect
from mlflow_dr.errors import (
    CheckpointError,
    LostError,
    MlflowDrError,
    OverdueError,
    TrackingError,
    UnavailableError,
    one_line,
)
from mlflow_dr.files import is_full
from mlflow_dr.time_limit import TimeIsUp, TimeLimit
from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id, is_deleted
from mlflow_dr.tracking.descriptions import describe_checkpoint
from mlflow_dr.tracking.encoders import local_cause
from mlflow_dr.tracking.results import (
    State,
    failure_reason,
    mark_failed,
    record_result,
    validation_state,
    write_recorded,
)
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.server import Patience, ServerClock
from mlflow_dr.tracking.validations import recorded_values
from mlflow_dr.validation.config import FollowConfig
from mlflow_dr.validation.kinds import CheckpointKind, ResolvedValidation
from mlflow_dr.validation.loading import ModelLoader
from mlflow_dr.validation.report import Report, metric_values
from mlflow_dr.validation.resolve import ResolvedMean

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """A checkpoint, and the validations of it that this process has claimed."""

    checkpoint: Checkpoint
    run: TrackedRun
    validations: Sequence[ResolvedValidation]


class JobResult(NamedTuple):
    """What was computed for the validations of a job.

    Attributes:
        results: validation name -> its report; the error that makes the checkpoint FAILED; or None
            where figures were recorded already. What is put off is missing.
        setback: why the others are put off, if that is this validator's trouble.
        seconds: what fetching and evaluating took.
    """

    results: Mapping[str, Report | CheckpointError | None]
    setback: UnavailableError | None
    seconds: float

    @property
    def report(self) -> Report | None:
        """One of the reports, if there is any."""
        reports = (result for result in self.results.values() if isinstance(result, Report))
        return next(reports, None)


@dataclass
class Counts:
    """How many checkpoints were validated, and how many were not.

    Attributes:
        done: validated.
        validations: of these checkpoints, all together.
        nothing: why nothing could be done; empty if something was done, now or before.
        failed: noted as FAILED, because nothing can be read from them.
        passed_over: noted as FAILED before, or by another validator.
        unavailable: left to other validators, because they cannot be fetched or read here.
    """

    done: int = 0
    validations: int = 0
    nothing: str = ""
    failed: int = 0
    passed_over: int = 0
    unavailable: int = 0

    @property
    def checkpoints(self) -> str:
        """How much was validated, for a log line."""
        several = f" ({self.validations} validations)" if self.validations > self.done else ""
        return f"{self.done} checkpoints{several}"

    @property
    def are_good(self) -> bool:
        """Whether everything that was to be done is done."""
        return not (self.failed or self.passed_over or self.unavailable or self.nothing)

    def __str__(self) -> str:
        text = f"{self.failed} failed"
        if self.passed_over:
            text += f", {self.passed_over} passed over that had FAILED (--retry-failed)"
        if self.unavailable:
            text += f", {self.unavailable} left that cannot be read here"
        return text


class Worker:
    """Evaluates jobs and records what came of them.

    Args:
        config: how long an evaluation may take.
        kind: reads and evaluates checkpoints.
        patiently: repeats requests while the server is away.
        names_runs: whether log lines name the run, because there may be several.
        models: loads checkpoints.
    """

    def __init__(
        self,
        config: FollowConfig,
        kind: CheckpointKind,
        patiently: Patience,
        names_runs: bool,
        models: ModelLoader,
    ) -> None:
        self._kind = kind
        self._models = models
        self._config = config
        self._patiently = patiently
        self._names_runs = names_runs
        self._clock = ServerClock()
        TimeLimit(config.max_seconds)  # refuses early

    def now_ms(self) -> int:
        """The server's time, in ms since 1970."""
        return self._clock.now_ms()

    def evaluate(self, job: Job, on_loaded: Callable[[], None]) -> JobResult:
        """Fetch the checkpoint and evaluate it, for validations without recorded figures.

        Args:
            job: what is evaluated.
            on_loaded: called when the checkpoint is in memory.

        Raises:
            OSError: the disk is full.
        """
        start = time.monotonic()
        results: dict[str, Report | CheckpointError | None] = {}
        left: list[ResolvedValidation] = []
        setback: UnavailableError | None = None
        limit = TimeLimit(self._config.max_seconds)
        for validation in job.validations:
            if validation_state(job.checkpoint, validation.name) is State.RECORDED:
                results[validation.name] = None
            else:
                left.append(validation)
        if left:
            try:
                results |= self._evaluate(job, left, limit, on_loaded)
            except UnavailableError as error:
                setback = error
        return JobResult(results, setback, time.monotonic() - start)

    def record(self, job: Job, result: JobResult) -> dict[str, State]:
        """Record what was computed; returns what has become of each validation.

        Raises:
            TrackingError: the server refuses the figures.
        """
        states = {
            validation.name: self._record(job, validation, result.results[validation.name])
            for validation in job.validations
            if validation.name in result.results
        }
        if State.DONE in states.values():
            self._patiently(partial(describe_checkpoint, job.run, job.checkpoint.model_id))
        return states

    def _evaluate(
        self,
        job: Job,
        validations: Sequence[ResolvedValidation],
        limit: TimeLimit,
        on_loaded: Callable[[], None],
    ) -> Mapping[str, Report | CheckpointError]:
        """A report of each validation, or why there is none; nothing where it is put off.

        Raises:
            UnavailableError: this validator cannot have the checkpoint, for now or at all.
        """
        if isinstance(validations[0], ResolvedMean):
            mean = self._mean(job, validations[0])
            return {} if mean is None else {validations[0].name: mean}
        checkpoint, names = job.checkpoint, [validation.name for validation in validations]

        def load() -> Any:
            with limit:
                return self._models.model(checkpoint)

        try:
            model = self._patiently(load, UnavailableError)
            on_loaded()
            with _evaluation_errors():
                reports = self._kind.evaluate(model, checkpoint, validations, limit)
            return dict(zip(names, reports, strict=True))
        except TimeIsUp:
            error = OverdueError(f"it took longer than {limit.seconds:g} s (--max-seconds)")
            return dict.fromkeys(names, error)
        except CheckpointError as error:
            if self._is_deleted(job):
                log.warning("%s is passed over: it was deleted", self._shown(job))
                return {}
            if not isinstance(error, UnavailableError):
                return dict.fromkeys(names, _without_frames(error))
            if checkpoint.directory and encoder_defect(Path(checkpoint.directory)):
                log.warning("%s is passed over: %s", self._shown(job), error)
                return {}
            if isinstance(error, LostError):
                return dict.fromkeys(names, _without_frames(error))
            raise

    def _mean(self, job: Job, mean: ResolvedMean) -> Report | CheckpointError | None:
        """The mean of what is recorded for a suite's validations; None if one is missing."""
        find = partial(checkpoint_by_id, job.run.client, job.checkpoint.model_id)
        checkpoint = self._patiently(find)
        values: list[dict[str, float]] = []
        for member in mean.members:
            if validation_state(checkpoint, member.name) is State.FAILED:
                reason = failure_reason(checkpoint, member.name)
                return CheckpointError(f"{member.name} has failed: {reason}")
            values.append(recorded_values(checkpoint, member.name))
        if not all(values):
            return None
        seconds = [each["seconds"] for each in values]
        passages = sum(each["seconds"] * each["passages_per_second"] for each in values)
        measures = {
            measure: fmean(each[measure.metric] for each in values)
            for measure in mean.settings.measures
        }
        return Report(measures, {}, {}, sum(seconds), round(passages), mean.settings.dtype)

    def _is_deleted(self, job: Job) -> bool:
        """Whether the files of a checkpoint, or all of it, were deleted in the meantime."""
        client, model_id = job.run.client, job.checkpoint.model_id
        try:
            return self._patiently(partial(checkpoint_by_id, client, model_id)).is_pruned
        except TrackingError:
            if not is_deleted(client, model_id):
                raise
            return True

    def _record(
        self, job: Job, validation: ResolvedValidation, result: Report | CheckpointError | None
    ) -> State:
        """Record what came of a validation: the values of each query, then the figures."""
        checkpoint, run, name = job.checkpoint, job.run, validation.name
        dataset = validation.shown_dataset
        if isinstance(result, CheckpointError):
            if isinstance(result, OverdueError):
                text = "%s is stopped and recorded as failed: %s; --retry-failed tries it again"
                log.warning(text, self._shown(job), result)
            else:
                log.error("%s cannot be validated: %s", self._shown(job), result)
            self._patiently(partial(mark_failed, run, checkpoint, name, str(result)))
            return State.FAILED
        if result is None:
            write = partial(write_recorded, run, checkpoint, name, dataset)
        else:
            per_query, texts = result.per_query, validation.query_texts
            log_values = partial(log_per_query_values, run, checkpoint, name, per_query, texts)
            if per_query:  # a mean has none
                self._patiently(log_values)
            values, now_ms = _figures(result), self.now_ms()
            write = partial(record_result, run, checkpoint, name, values, dataset, now_ms)
        figures = self._patiently(write)
        prefix = f"{name}: " if len(self._config.all_validations) > 1 else ""
        shown = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
        log.info("%s: %s%s", self._shown(job), prefix, shown)
        return State.DONE

    def _shown(self, job: Job) -> str:
        """The step, and the run if there may be several."""
        run = f"{job.run.label} " if self._names_runs else ""
        return f"{run}step {job.checkpoint.step}"


@contextmanager
def _evaluation_errors() -> Iterator[None]:
    """Turn what breaks an evaluation into an error that puts the checkpoint off.

    Raises:
        UnavailableError: something broke that may be this machine's fault as well.
        OSError: the disk is full.
        MlflowDrError: as it was raised.
    """
    try:
        yield
    except MlflowDrError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_full(error, Path()):
            raise
        log.debug("an evaluation has broken off", exc_info=True)
        reason = f"it cannot be evaluated here: {one_line(error)}"
        raise UnavailableError(reason, lasting=local_cause(error) is None) from error


def _without_frames(error: CheckpointError) -> CheckpointError:
    """An error whose traceback does not keep the encoder in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _figures(report: Report) -> dict[str, float]:
    """A report as metrics, named as MLflow allows."""
    return {
        **metric_values(report),
        "seconds": report.seconds,
        "passages_per_second": report.passages / report.seconds,
    }
