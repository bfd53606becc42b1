"""Validate the checkpoints of a run as they are published, beside any number of validators.

One loop: take a snapshot of what is published, claim a checkpoint, fetch it, evaluate it, and
record the figures in the background of the next evaluation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import cast

from mlflow_dr.background import BackgroundTask
from mlflow_dr.errors import TrackingError, UnavailableError
from mlflow_dr.tracking.checkpoints import Checkpoint, is_deleted
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.following import Followed, Snapshot
from mlflow_dr.tracking.results import State
from mlflow_dr.tracking.runs import run_is_gone
from mlflow_dr.tracking.server import Patience
from mlflow_dr.tracking.status import tag_progress
from mlflow_dr.validation.config import FollowConfig, ValidateConfig
from mlflow_dr.validation.encoders import EncoderKind
from mlflow_dr.validation.kinds import CheckpointKind, ResolvedValidation
from mlflow_dr.validation.loading import ModelLoader
from mlflow_dr.validation.policies import AutoSubset, Policies, RunSummaries
from mlflow_dr.validation.resolve import RetrievalValidation, ValidationResolver
from mlflow_dr.validation.scheduler import Scheduler, Setbacks
from mlflow_dr.validation.worker import Counts, Job, JobResult, Worker

log = logging.getLogger(__name__)

SECONDS_TO_RECORD = 5.0  # when it is to end at once
SECONDS_BETWEEN_SUMMARIES = 10.0  # of a run, while there is work
# of a validator's time, while there is work; what is published now does not change the oldest
SHARE_OF_SNAPSHOTS = {"oldest": 0.02, "newest": 0.1, "bisect": 0.1}


def run_validator(
    followed: Followed,
    config: ValidateConfig,
    sleep: Callable[[float], None] = time.sleep,
    claims: Claims | None = None,
) -> Counts:
    """Validate encoders until the run has ended; see `validate_checkpoints`."""
    return validate_checkpoints(followed, config, EncoderKind(config), sleep, claims)


def validate_checkpoints(
    followed: Followed,
    config: FollowConfig,
    kind: CheckpointKind,
    sleep: Callable[[float], None] = time.sleep,
    claims: Claims | None = None,
) -> Counts:
    """Validate checkpoints until the run has ended, and write the figures to their runs.

    Other validators may follow the same run: each checkpoint is claimed before it is validated, and
    the claim of a validator that has died is taken over. If the server is away, it waits for it.

    Args:
        followed: a run, an experiment or a directory.
        config: what is done.
        kind: what the checkpoints are.
        sleep: waits; passed in by tests.
        claims: makes and renews claims; passed in by tests.

    Raises:
        UsageError: a name stands for another configuration on its run, or an unknown dataset.
        TrackingError: what is followed is gone.
        UnavailableError: checkpoint after checkpoint cannot be fetched or read on this machine.
        OSError: the disk is full.
    """
    validator = _Validator(followed, config, kind, sleep, claims or Claims(followed.client))
    try:
        return validator.run()
    finally:
        validator.close()


class _Validator:
    """The loop of one validator, and what it remembers."""

    def __init__(
        self,
        followed: Followed,
        config: FollowConfig,
        kind: CheckpointKind,
        sleep: Callable[[float], None],
        claims: Claims,
    ) -> None:
        self._claims = claims
        self._followed = followed
        self._config = config
        self._sleep = sleep
        self._patiently = Patience(followed.client, config.poll_seconds, sleep)
        self._kind = kind
        self._models = ModelLoader(kind.load, kind.keeps_model)
        names_runs = followed.run is None
        self._worker = Worker(config, kind, self._patiently, names_runs, self._models)
        self._auto_subset = (
            AutoSubset(config) if isinstance(config, ValidateConfig) and config.keep_up else None
        )
        self._setbacks = Setbacks(config.poll_seconds)
        token, now_ms = claims.owner.token, self._worker.now_ms
        self._scheduler = Scheduler(config, token, now_ms, self._setbacks, kind.model_type)
        self._resolver = ValidationResolver(followed, config, kind, self._patiently, sleep)
        self._policies = Policies(config)
        self._summaries = RunSummaries()
        self._summarize_at = -float("inf")
        self._done: set[str] = set()  # model ids
        self._counts = Counts()
        # by figures, which validations are left to do for a checkpoint
        self._chooses = config.chooses_subset or any(
            validation.refines or validation.mean_of for validation in config.all_validations
        )
        self._computed: tuple[Job, JobResult] | None = None
        self._recording: tuple[Job, BackgroundTask[dict[str, State]]] | None = None

    def run(self) -> Counts:
        self._kind.start()
        if self._followed.run is not None:
            self._resolver.resolve_ahead(self._followed.run)
        has_asked = False
        while True:
            if self._chooses or not self._scheduler.has_free:  # else it is done meanwhile
                self._finish_recording()
            snapshot, work_until = self._take_snapshot()
            if self._patiently(partial(self._choose_subset, snapshot)):
                self._followed.checkpoints.request_all()
                continue
            runs_before = len(self._resolver)
            if self._work_until(work_until) or self._scheduler.is_stale:
                continue
            if self._computed or self._recording:
                self._finish_recording()
                continue  # this snapshot is from before
            if len(self._resolver) > runs_before:
                continue
            is_waiting = self._scheduler.is_waiting
            if snapshot.over is None and not is_waiting and not has_asked:
                has_asked = True  # nothing is left: the next snapshot tells whether the run is over
                continue
            if not self._config.follow or (snapshot.over and not is_waiting):
                return self._total()
            self._models.forget()
            self._sleep(self._config.poll_seconds)
            has_asked = False

    def _take_snapshot(self) -> tuple[Snapshot, float]:
        """What is published now, and until when to work by it."""
        start = time.monotonic()
        snapshot = self._patiently(self._followed.snapshot)
        end = time.monotonic()
        for checkpoint in self._scheduler.see(snapshot, end - start):
            self._followed.checkpoints.mark_done(checkpoint)
        scheduler = self._scheduler
        # while others are at work, they do it, too
        is_last = not scheduler.has_free and (scheduler.validators == 1 or not scheduler.is_waiting)
        if is_last or start >= self._summarize_at:
            self._patiently(partial(self._summarize, snapshot))
            # several validators share this work
            self._summarize_at = start + SECONDS_BETWEEN_SUMMARIES * scheduler.validators
        # where thousands wait, a snapshot takes long, and is taken less often
        share = SHARE_OF_SNAPSHOTS[self._config.order]
        return snapshot, end + max(self._config.poll_seconds, (end - start) / share)

    def _work_until(self, deadline: float) -> bool:
        """Do what the snapshot shows as free; returns whether there was anything."""
        has_worked = False
        while job := self._patiently(self._claim_next):
            has_worked = True
            self._work(job)
            subset = self._auto_subset
            is_undecided = subset is not None and not subset.has_chosen(job.run.id)
            if self._setbacks.is_in_one or is_undecided or time.monotonic() >= deadline:
                break
        return has_worked

    def _total(self) -> Counts:
        counts = self._counts
        counts.done = len(self._done)
        counts.passed_over = len(self._scheduler.passed_over)
        counts.unavailable = len(self._scheduler.unavailable)
        if not (self._config.follow or counts.done):
            counts.nothing = self._scheduler.why_nothing()
            if counts.nothing:
                log.error("nothing was validated: %s", counts.nothing)
        log.info("validated %s of %s; %s", counts.checkpoints, self._followed.name, counts)
        return counts

    def _summarize(self, snapshot: Snapshot) -> None:
        """Show on each run how far it has come, and apply the policies, where something is new."""
        for run_id, checkpoints in snapshot.by_run().items():
            names = [validation.name for validation in self._resolver.known(run_id) or ()]
            changed = self._summaries.changed(run_id, checkpoints, names)
            if not changed:
                continue
            with self._without_deleted(run_id):
                run = self._followed.run_of(checkpoints[0])
                for name, summary in changed.items():
                    tag_progress(run, name, summary)
                self._policies.act(run, checkpoints, self._scheduler.waiting_of(run_id))
                self._summaries.note(run_id, checkpoints, changed)

    def _choose_subset(self, snapshot: Snapshot) -> bool:
        """With --keep-up, do only what there is time for; returns whether that has changed."""
        if self._auto_subset is None:
            return False
        is_changed = False
        for run_id, checkpoints in snapshot.by_run().items():
            validations = self._resolver.known(run_id)
            if not validations:
                continue
            retrieval = cast("Sequence[RetrievalValidation]", validations)
            with self._without_deleted(run_id):
                run, validators = self._followed.run_of(checkpoints[0]), self._scheduler.validators
                names = self._auto_subset.names(
                    run, retrieval, checkpoints, validators, snapshot.over
                )
                is_changed |= self._scheduler.limit(run_id, names)
        return is_changed

    @contextmanager
    def _without_deleted(self, run_id: str, checkpoint: Checkpoint | None = None) -> Iterator[None]:
        """Pass over a checkpoint, or a run of an experiment, that turns out to be deleted.

        Raises:
            TrackingError: anything else, or the only run that is followed was deleted.
        """
        try:
            yield
        except TrackingError:
            if checkpoint and is_deleted(self._followed.client, checkpoint.model_id):
                log.warning("step %d is passed over: it was deleted", checkpoint.step)
                self._scheduler.forget(checkpoint)
                return
            if self._followed.run is not None or not run_is_gone(self._followed.client, run_id):
                raise
            if self._resolver.known(run_id) != []:
                log.error("run %s is passed over: it was deleted", run_id)
            self._resolver.pass_over(run_id)
            self._scheduler.refuse(run_id)

    def _claim_next(self) -> Job | None:
        """Claim the next piece of work."""
        for checkpoint, names in self._scheduler.candidates(self._models.ready_ids):
            with self._without_deleted(checkpoint.run_id, checkpoint):
                run = self._followed.run_of(checkpoint)
                is_new = self._resolver.known(run.id) is None
                if is_new and self._resolver.is_early(run):
                    self._scheduler.put_off(run.id)
                    continue
                validations = self._resolver.resolve(run)
                if is_new and self._config.chooses_subset:
                    return None  # the next snapshot tells which of them are done
                if not validations:
                    self._scheduler.refuse(run.id)
                    continue
                free = [each for each in validations if each.name in names]
                group = [each for each in free if each.group == free[0].group]
                if claimed := self._claim(checkpoint, group):
                    return Job(checkpoint, run, claimed)
        return None

    def _claim(
        self, checkpoint: Checkpoint, validations: Sequence[ResolvedValidation]
    ) -> list[ResolvedValidation]:
        """Those of these validations that no other validator claims first.

        If the server goes away after the first claim, that one is enough to begin with.
        """
        claimed: list[ResolvedValidation] = []
        tried: list[str] = []
        for validation in validations:
            try:
                is_ours = self._claims.claim(checkpoint, validation.name)
            except TrackingError:
                if not claimed:
                    raise
                break  # else the claims would be renewed and the work never done
            tried.append(validation.name)
            if is_ours:
                claimed.append(validation)
        self._scheduler.note_tried(checkpoint, tried, is_lost=not claimed)
        return claimed

    def _work(self, job: Job) -> None:
        """Evaluate what was claimed, and record the figures of the job before in the background.

        They wait until this job is claimed, because their requests would delay that.
        """
        self._start_recording()
        try:
            result = self._worker.evaluate(job, partial(self._fetch_next, job.checkpoint))
        except BaseException:
            self._end(job, {})
            raise
        if result.report is not None and self._auto_subset is not None:
            self._auto_subset.note_speed(result.report, result.seconds)
        self._finish_recording()
        self._computed = job, result
        if result.setback is None:
            self._setbacks.note_success()
        else:
            self._put_off(job, result.setback)

    def _fetch_next(self, current: Checkpoint) -> None:
        """Fetch and load the checkpoint that is likely to be next, in the background."""
        if checkpoint := self._scheduler.likely_after(current):
            self._models.begin(checkpoint)

    def _start_recording(self) -> None:
        """Record what was computed last, in the background."""
        if self._computed is None:
            return
        (job, result), self._computed = self._computed, None
        task = BackgroundTask(partial(self._record, job, result), name="recording")
        self._recording = job, task

    def _record(self, job: Job, result: JobResult) -> dict[str, State]:
        """Record what was computed, and renew the claims of what is done no longer."""
        states = self._worker.record(job, result)
        self._claims.drop(job.checkpoint, *_done(states), finished=True)
        return states

    def _put_off(self, job: Job, setback: UnavailableError) -> None:
        """Give back a checkpoint that cannot be read here now, and wait a little.

        Raises:
            UnavailableError: that has happened too often in a row.
        """
        self._finish_recording()
        step = job.checkpoint.step
        wait = self._setbacks.note(job.checkpoint, setback)
        if self._setbacks.has_given_up(job.checkpoint):
            log.error("step %d is left to other validators: %s", step, setback)
        else:
            log.warning("step %d is given back for now: %s", step, setback)
        if wait:
            self._sleep(wait)

    def _finish_recording(self, seconds: float | None = None) -> None:
        """Wait until the last figures are recorded, and give back what was not done.

        If it is interrupted, `close` finishes them.
        """
        self._start_recording()
        if self._recording is None:
            return
        (job, recording), states = self._recording, None
        try:
            with self._without_deleted(job.run.id, job.checkpoint):
                states = recording.wait(seconds)
        except Exception:
            self._recording = None
            self._end(job, {})
            raise
        self._recording = None
        self._end(job, states or {})

    def _end(self, job: Job, states: Mapping[str, State]) -> None:
        """Drop the claims of a job, and count what has become of it."""
        names = [validation.name for validation in job.validations]
        done = _done(states)
        left = [name for name in names if name not in done]
        self._claims.drop(job.checkpoint, *done, finished=True)
        self._claims.drop(job.checkpoint, *left, finished=False)
        for name in names:
            self._scheduler.note_ended(job.checkpoint, name, states.get(name))
        has_failed = State.FAILED in states.values()
        self._counts.failed += has_failed
        if states and not has_failed:
            self._done.add(job.checkpoint.model_id)
        self._counts.validations += len(done)

    def close(self) -> None:
        """Give everything back at once, except for what is being recorded."""
        try:
            with suppress(Exception):  # another error ends this validator
                self._finish_recording(SECONDS_TO_RECORD)
        finally:
            self._models.close()
            self._claims.close()
            self._kind.close()


def _done(states: Mapping[str, State]) -> list[str]:
    return [name for name, state in states.items() if state is State.DONE]
