"""Follow checkpoints, among any number of validators, and validate each of them once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from mlflow_dr.errors import (
    MlflowDrError,
    TrackingError,
)
from mlflow_dr.tracking.claims import Claims
from mlflow_dr.tracking.clock import ServerClock
from mlflow_dr.tracking.following import Followed, Look
from mlflow_dr.tracking.patience import Patience
from mlflow_dr.tracking.results import (
    State,
)
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    SPLIT_PARAM,
    TrackedRun,
    check_alive,
    is_over,
)
from mlflow_dr.tracking.status import note_summary, summary_of
from mlflow_dr.validation.beside import Beside
from mlflow_dr.validation.binding import Bound, Collections, is_early
from mlflow_dr.validation.choice import Choice
from mlflow_dr.validation.jobs import Job, Jobs
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.pace import Pacer
from mlflow_dr.validation.plan import Plan
from mlflow_dr.validation.policies import Policies

log = logging.getLogger(__name__)

SECONDS_TO_WRITE = 5.0  # when it is to end at once
SECONDS_BETWEEN_NOTES = 10.0  # while there is work
# of a validator's time at most, while there is work; the oldest do not change by what is published
SHARE_OF_LOOKS = {Order.OLDEST: 0.01, Order.NEWEST: 0.1, Order.BISECT: 0.1}


@dataclass
class Counts:
    """How many checkpoints were validated, and how many could not be."""

    done: int = 0
    failed: int = 0


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
        TrackingError: the run is gone.
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
        self._jobs = Jobs(plan, self._patiently, self._clock)
        self._pacer = Pacer(plan)
        self._choice = Choice(plan, claims.owner.token, self._clock.now_ms)
        self._collections = Collections()
        self._bound: dict[str, list[Bound]] = {}
        self._policies = Policies(plan.wishes, plan.deciding)
        self._noted: dict[str, dict[str, str]] = {}
        self._counts = Counts()
        self._writing: tuple[Job, Beside[dict[str, State]]] | None = None
        self._ahead: Beside[Job | None] | None = None

    def run(self) -> Counts:
        if self._followed.run is not None:
            self._bind_ahead(self._followed.run)
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
            found, bound_before = False, set(self._bound)
            while job := self._next():
                found = True
                self._work(job)
                unpaced = self._plan.keep_up and not self._pacer.has_chosen(job.run.id)
                if time.monotonic() >= next_look or unpaced:
                    break
            if found or self._choice.is_stale or self._bound.keys() > bound_before:
                continue
            if look.over is None and not self._choice.is_waiting and not asked:
                asked = True  # nothing is left: whether that is all is asked now, not after a wait
                continue
            if not self._plan.follow or (look.over and not self._choice.is_waiting):
                break
            self._sleep(self._plan.poll_seconds)
            asked = False
        counts = self._counts
        log.info(
            "validated %d checkpoints of %s; %d failed",
            *(counts.done, self._followed.name, counts.failed),
        )
        return counts

    def _seconds_to_work(self, look_seconds: float) -> float:
        """How long to work by what a look has shown; long ones, where many wait, are rare."""
        return max(self._plan.poll_seconds, look_seconds / SHARE_OF_LOOKS[self._plan.order])

    def _note(self, look: Look) -> None:
        """Where there is something new on a run, show it there, and do what follows from it."""
        for run_id, bound in self._bound.items():
            of_run = [one for one in look.checkpoints if one.run_id == run_id]
            summaries = {one.name: summary_of(of_run, one.name) for one in bound}
            before = self._noted.get(run_id, {})
            if not of_run or summaries == before:
                continue
            run = self._followed.run_of(of_run[0])
            for name, summary in summaries.items():
                if before.get(name) != summary:
                    note_summary(run, name, summary)
            self._policies.act(run, of_run, self._choice.waiting_of(run_id))
            self._noted[run_id] = summaries

    def _keep_pace(self, look: Look) -> bool:
        """Do only what there is the time for; returns whether that has changed."""
        changed = False
        for run_id, bound in self._bound.items():
            of_run = [one for one in look.checkpoints if one.run_id == run_id]
            if bound and of_run:
                run = self._followed.run_of(of_run[0])
                names = self._pacer.names(
                    run, bound, of_run, self._jobs.speed, self._choice.validators
                )
                changed |= self._choice.limit(run_id, names)
        return changed

    def _claimed(self) -> Job | None:
        """The next piece of work that is ours."""
        for checkpoint, names in self._choice.candidates():
            run = self._followed.run_of(checkpoint)
            if run.id not in self._bound and self._is_early(run):
                self._choice.put_off(run.id)
                continue
            if run.id not in self._bound and self._plan.keep_up:
                self._bound_to(run)
                return None  # which of them are done is known at the next look
            bound = self._bound_to(run)
            if not bound:
                self._choice.refuse(run.id)
                continue
            group = next(one.group for one in bound if one.name in names)
            wanted = [one for one in bound if one.name in names and one.group == group]
            mine = [one for one in wanted if self.claims.claim(checkpoint, one.name)]
            lost_to = None if mine else self.claims.faster
            self._choice.tried(checkpoint, [one.name for one in wanted], lost_to)
            if mine:
                return Job(checkpoint, run, mine)
        return None

    def _next(self) -> Job | None:
        """The next piece of work: what was claimed ahead, or what can be claimed now."""
        if self._ahead is None:
            return self._patiently(self._claimed)
        ahead, self._ahead = self._ahead, None
        return ahead.wait()

    def _go_ahead(self) -> None:
        """Claim and fetch the next checkpoint beside the evaluation of this one.

        Only where another validator would not be done with it sooner: evaluations are short, and
        there is enough for all.
        """
        seconds = self._jobs.seconds
        is_short = seconds is not None and seconds < self._plan.poll_seconds
        if is_short and not self._plan.keep_up and self._choice.has_plenty:
            self._ahead = Beside(self._claimed_ahead, name="ahead")

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
        self._writing = job, Beside(partial(self._jobs.written, found), name="writing")
        if self._ahead:
            self._ahead.wait()

    def _finish(self, seconds: float | None = None) -> None:
        """Wait until the last figures are written, and give back what was not done."""
        if self._writing is None:
            return
        (job, writing), states = self._writing, None
        try:
            states = writing.wait(seconds)
        finally:
            self._writing = None
            self._ended(job, states or {})

    def _ended(self, job: Job, states: Mapping[str, State]) -> None:
        for one in job.bound:
            state = states.get(one.name)
            self.claims.drop(job.checkpoint, one.name, finished=state is State.DONE)
            self._choice.ended(job.checkpoint, one.name, state)
        failed = State.FAILED in states.values()
        self._counts.failed += failed
        self._counts.done += bool(states and not failed)

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

    def _bind_ahead(self, run: TrackedRun) -> None:
        """Open the collections before the first checkpoint is there, as soon as they are known."""
        said = False
        while not self._patiently(partial(self._can_bind, run)):
            if not self._plan.follow:
                break
            if not said:
                log.info("waiting until run %s has what its validations need", run.id)
                said = True
            self._sleep(self._plan.poll_seconds)
        self._patiently(partial(self._bound_to, run))

    def _can_bind(self, run: TrackedRun) -> bool:
        """Whether dataset and split are known, or the run says no more: over, or publishing.

        And so are the checkpoints that subsets are chosen by.
        """
        state = run.fetch()
        check_alive(state)
        params = state.data.params
        known = all(
            (one.dataset or DATASET_PARAM in params) and (one.split or SPLIT_PARAM in params)
            for one in self._plan.validations
        )
        known = known or is_over(state) or bool(self._followed.look().checkpoints)
        return known and not self._is_early(run)

    def _is_early(self, run: TrackedRun) -> bool:
        return self._plan.follow and is_early(run, self._plan.validations)

    def _bound_to(self, run: TrackedRun) -> list[Bound]:
        """The validations as they are on a run; none where the run says too little for them.

        Raises:
            UsageError: the one run that is followed says too little, or something else.
        """
        if run.id not in self._bound:
            try:
                self._bound[run.id] = [
                    self._collections.bind(run, one, self._plan.encoder_changes)
                    for one in self._plan.validations
                ]
            except TrackingError:
                raise
            except MlflowDrError as error:
                if self._followed.run is not None:
                    raise
                log.error("run %s is passed over: %s", run.id, error)
                self._bound[run.id] = []
        return self._bound[run.id]
