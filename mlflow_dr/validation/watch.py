"""Follow checkpoints, among any number of validators, and validate each of them once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from mlflow_dr.background import BackgroundTask
from mlflow_dr.errors import TrackingError, UnavailableError
from mlflow_dr.tracking.checkpoints import Checkpoint, is_deleted
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.clock import ServerClock
from mlflow_dr.tracking.following import Followed, Look
from mlflow_dr.tracking.patience import Patience
from mlflow_dr.tracking.results import State
from mlflow_dr.tracking.runs import run_is_gone
from mlflow_dr.tracking.status import progress_summary, tag_progress
from mlflow_dr.validation.binding import Bound
from mlflow_dr.validation.bound_runs import BoundRuns
from mlflow_dr.validation.choice import Choice
from mlflow_dr.validation.counts import Counts
from mlflow_dr.validation.jobs import Job, Jobs
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.pace import Pacer
from mlflow_dr.validation.plan import Plan
from mlflow_dr.validation.policies import Policies
from mlflow_dr.validation.setbacks import Setbacks

log = logging.getLogger(__name__)

SECONDS_TO_WRITE = 5.0  # when it is to end at once
SECONDS_BETWEEN_NOTES = 10.0  # while there is work
# of a validator's time at most, while there is work; the oldest do not change by what is published
SHARE_OF_LOOKS = {Order.OLDEST: 0.01, Order.NEWEST: 0.1, Order.BISECT: 0.1}


def watch(
    followed: Followed,
    plan: Plan,
    sleep: Callable[[float], None] = time.sleep,
    claims: Claims | None = None,
) -> Counts:
    """Validate checkpoints until the run has ended, and write the figures to their runs.

    Other validators may follow the same: each checkpoint is claimed before it is validated, and a
    claim whose owner has died is taken over. A server that is away is waited for.

    Args:
        followed: a run, an experiment or a directory.
        plan: what is done.
        sleep: waits; passed in by tests.
        claims: likewise.

    Raises:
        UsageError: a name stands for another configuration on its run, or an unknown dataset.
        TrackingError: what is followed is gone.
        UnavailableError: checkpoint after checkpoint cannot be fetched or read on this machine.
        OSError: the disk is full.
    """
    worker = _Worker(followed, plan, sleep, claims or Claims(followed.client))
    try:
        return worker.run()
    finally:
        worker.close()


class _Worker:
    """One validator."""

    def __init__(
        self,
        followed: Followed,
        plan: Plan,
        sleep: Callable[[float], None],
        claims: Claims,
    ) -> None:
        self.claims = claims
        self._followed = followed
        self._plan = plan
        self._sleep = sleep
        self._patiently = Patience(followed.client, plan.poll_seconds, sleep)
        self._clock = ServerClock()
        self._jobs = Jobs(plan, self._patiently, self._clock, names_runs=followed.run is None)
        self._pacer = Pacer(plan)
        self._setbacks = Setbacks(plan.poll_seconds)
        self._choice = Choice(plan, claims.owner.token, self._clock.now_ms, setbacks=self._setbacks)
        self._bound = BoundRuns(followed, plan, self._patiently, sleep)
        self._policies = Policies(plan.wishes, plan.deciding)
        self._noted: dict[str, dict[str, str]] = {}
        self._seen: dict[str, list[Checkpoint]] = {}  # when that was noted
        self._counts = Counts()
        self._done: set[str] = set()  # model ids
        self._writing: tuple[Job, BackgroundTask[dict[str, State]]] | None = None
        self._ahead: BackgroundTask[Job | None] | None = None

    def run(self) -> Counts:
        if self._followed.run is not None:
            self._bound.bind_ahead(self._followed.run)
        note_at, asked = -float("inf"), False
        while True:
            self._finish()
            start = time.monotonic()
            look = self._patiently(self._followed.look)
            took = time.monotonic() - start
            next_look = time.monotonic() + self._seconds_to_work(took)
            if self._plan.keep_up and self._patiently(partial(self._keep_pace, look)):
                self._followed.ask_again()
                continue
            for one in self._choice.see(look, took):
                self._followed.settle(one)
            if start >= note_at or not self._choice.has_free:
                self._patiently(partial(self._note, look))
                note_at = start + SECONDS_BETWEEN_NOTES
            found, bound_before = False, len(self._bound)
            while job := self._next():
                found = True
                self._work(job)
                if self._setbacks.is_in_one:
                    break
                unpaced = self._plan.keep_up and not self._pacer.has_chosen(job.run.id)
                if time.monotonic() >= next_look or unpaced:
                    break
            if found or self._choice.is_stale or len(self._bound) > bound_before:
                continue
            if look.over is None and not self._choice.is_waiting and not asked:
                asked = True  # nothing is left: whether that is all is asked now, not after a wait
                continue
            if not self._plan.follow or (look.over and not self._choice.is_waiting):
                break
            self._sleep(self._plan.poll_seconds)
            asked = False
        counts = self._counts
        counts.passed_over = len(self._choice.passed_over)
        counts.unavailable = len(self._choice.unavailable)
        if not (self._plan.follow or counts.done):
            counts.nothing = self._choice.why_nothing()
            if counts.nothing:
                log.error("nothing was validated: %s", counts.nothing)
        log.info("validated %s of %s; %s", counts.checkpoints, self._followed.name, counts)
        return counts

    def _seconds_to_work(self, look_seconds: float) -> float:
        """How long to work by what a look has shown; long ones, where many wait, are rare."""
        return max(self._plan.poll_seconds, look_seconds / SHARE_OF_LOOKS[self._plan.order])

    def _note(self, look: Look) -> None:
        """Where there is something new on a run, show it there, and do what follows from it."""
        for run_id, of_run in look.by_run().items():
            bound = self._bound.known(run_id)
            if not bound or self._seen.get(run_id) == of_run:
                continue
            summaries = {one.name: progress_summary(of_run, one.name) for one in bound}
            before = self._noted.get(run_id, {})
            if summaries == before:
                self._seen[run_id] = of_run
                continue
            with self._going_on_without(run_id):
                run = self._followed.run_of(of_run[0])
                for name, summary in summaries.items():
                    if before.get(name) != summary:
                        tag_progress(run, name, summary)
                self._policies.act(run, of_run, self._choice.waiting_of(run_id))
                self._noted[run_id], self._seen[run_id] = summaries, of_run

    def _keep_pace(self, look: Look) -> bool:
        """Do only what there is the time for; returns whether that has changed."""
        changed = False
        for run_id, of_run in look.by_run().items():
            bound = self._bound.known(run_id)
            if not bound:
                continue
            with self._going_on_without(run_id):
                run = self._followed.run_of(of_run[0])
                names = self._pacer.names(
                    run, bound, of_run, self._jobs.speed, self._choice.validators, look.over
                )
                changed |= self._choice.limit(run_id, names)
        return changed

    @contextmanager
    def _going_on_without(
        self, run_id: str, checkpoint: Checkpoint | None = None
    ) -> Iterator[None]:
        """Pass over a checkpoint, or a run of an experiment, that turns out to be deleted.

        Raises:
            TrackingError: it is another trouble, or the one run that is followed.
        """
        try:
            yield
        except TrackingError:
            if checkpoint and is_deleted(self._followed.client, checkpoint.model_id):
                log.warning("step %d is passed over: it was deleted", checkpoint.step)
                self._choice.forget(checkpoint)
                return
            if self._followed.run is not None or not run_is_gone(self._followed.client, run_id):
                raise
            if self._bound.known(run_id) != []:
                log.error("run %s is passed over: it was deleted", run_id)
            self._bound.pass_over(run_id)
            self._choice.refuse(run_id)

    def _claimed(self) -> Job | None:
        """The next piece of work that is ours."""
        for checkpoint, names in self._choice.candidates():
            with self._going_on_without(checkpoint.run_id, checkpoint):
                run = self._followed.run_of(checkpoint)
                is_new = self._bound.known(run.id) is None
                if is_new and self._bound.is_early(run):
                    self._choice.put_off(run.id)
                    continue
                bound = self._bound.of(run)
                if is_new and self._plan.keep_up:
                    return None  # which of them are done is known at the next look
                if not bound:
                    self._choice.refuse(run.id)
                    continue
                group = next(one.group for one in bound if one.name in names)
                wanted = [one for one in bound if one.name in names and one.group == group]
                if mine := self._ours(checkpoint, wanted):
                    return Job(checkpoint, run, mine)
        return None

    def _ours(self, checkpoint: Checkpoint, wanted: Sequence[Bound]) -> list[Bound]:
        """Those of these validations that can be claimed.

        Where the server goes away after the first, that one is enough to begin with.
        """
        mine: list[Bound] = []
        tried: list[str] = []
        for one in wanted:
            try:
                is_ours = self.claims.claim(checkpoint, one.name)
            except TrackingError:
                if not mine:
                    raise
                break  # else what was claimed would be renewed and never done
            tried.append(one.name)
            if is_ours:
                mine.append(one)
        self._choice.tried(checkpoint, tried, None if mine else self.claims.faster)
        return mine

    def _next(self) -> Job | None:
        """The next piece of work: what was claimed ahead, or what can be claimed now."""
        if self._ahead is None:
            return self._patiently(self._claimed)
        ahead, self._ahead = self._ahead, None
        return ahead.wait() or self._patiently(self._claimed)

    def _go_ahead(self) -> None:
        """Claim and fetch the next checkpoint beside the evaluation of this one.

        Only where another validator would not be done with it sooner: evaluations are short, and
        there is enough for all.
        """
        seconds = self._jobs.seconds
        is_short = seconds is not None and seconds < self._plan.poll_seconds
        is_sound = not self._setbacks.is_in_one
        if is_short and is_sound and not self._plan.keep_up and self._choice.has_plenty:
            self._ahead = BackgroundTask(self._claimed_ahead, name="ahead")

    def _claimed_ahead(self) -> Job | None:
        job = self._patiently(self._claimed)
        return job and job.with_files()

    def _work(self, job: Job) -> None:
        """Evaluate what was claimed; its figures are written beside the next evaluation."""
        self._go_ahead()
        try:
            found = self._jobs.evaluated(job)
        except BaseException:
            self._ended(job, {})
            raise
        finally:
            job.drop_files()
        self._finish()
        self._writing = job, BackgroundTask(partial(self._jobs.written, found), name="writing")
        if self._ahead:
            self._ahead.wait()
        if found.setback is None:
            self._setbacks.note_success()
        else:
            self._put_off(job, found.setback)

    def _put_off(self, job: Job, setback: UnavailableError) -> None:
        """Give a checkpoint back that cannot be had here now, and wait a little.

        Raises:
            UnavailableError: that was too often in a row.
        """
        self._finish()
        step = job.checkpoint.step
        wait = self._setbacks.note(job.checkpoint, setback)
        if self._setbacks.has_given_up(job.checkpoint):
            log.error("step %d is left to other validators: %s", step, setback)
        else:
            log.warning("step %d is given back for now: %s", step, setback)
        if wait:
            self._sleep(wait)

    def _finish(self, seconds: float | None = None) -> None:
        """Wait until the last figures are written, and give back what was not done.

        Interrupted, it leaves them to `close`.
        """
        if self._writing is None:
            return
        (job, writing), states = self._writing, None
        try:
            with self._going_on_without(job.run.id, job.checkpoint):
                states = writing.wait(seconds)
        except Exception:
            self._writing = None
            self._ended(job, {})
            raise
        self._writing = None
        self._ended(job, states or {})

    def _ended(self, job: Job, states: Mapping[str, State]) -> None:
        names = [one.name for one in job.bound]
        done = [name for name in names if states.get(name) is State.DONE]
        self.claims.drop(job.checkpoint, *done, finished=True)
        left = [name for name in names if name not in done]
        self.claims.drop(job.checkpoint, *left, finished=False)
        for name in names:
            self._choice.ended(job.checkpoint, name, states.get(name))
        failed = State.FAILED in states.values()
        self._counts.failed += failed
        if states and not failed:
            self._done.add(job.checkpoint.model_id)
            self._counts.done = len(self._done)
        self._counts.validations += len(done)

    def close(self) -> None:
        """Give everything back, at once but for what is being written."""
        try:
            with suppress(Exception):  # another error ends this validator
                self._finish(SECONDS_TO_WRITE)
            with suppress(Exception):
                if self._ahead and (job := self._ahead.wait(SECONDS_TO_WRITE)):
                    job.drop_files()
        finally:
            self.claims.close()
