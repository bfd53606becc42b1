"""Which checkpoint a validator takes next, beside others that follow the same."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import HeartbeatMonitor, Owner
from mlflow_dr.tracking.following import Look
from mlflow_dr.tracking.results import State, has_record, validation_state
from mlflow_dr.tracking.validations import recorded_values
from mlflow_dr.validation.order import in_order
from mlflow_dr.validation.plan import Plan, Refines
from mlflow_dr.validation.setbacks import Setbacks
from mlflow_dr.validation.turns import Turns

LOST_TO_LOOK_AGAIN = 2  # claims
SECONDS_TO_LOSE = 0.1  # one


class Candidate(NamedTuple):
    """A checkpoint, and its validations that nobody is at."""

    checkpoint: Checkpoint
    names: Sequence[str]


class Choice:
    """What is left to do, as the last look showed it, less what was tried since.

    Args:
        plan: which checkpoints, in which order.
        token: the validator's own, in its claims.
        now_ms: the server's time, in ms since 1970.
        clock: seconds that pass.
        setbacks: which checkpoints could not be had.

    Attributes:
        unavailable: checkpoints that are left to others, because they could not be had here.
        passed_over: checkpoints that somebody else has noted as FAILED, or that were before.
    """

    def __init__(
        self,
        plan: Plan,
        token: str,
        now_ms: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        setbacks: Setbacks | None = None,
    ) -> None:
        self.unavailable: set[str] = set()
        self.passed_over: set[str] = set()
        self._setbacks = setbacks or Setbacks(plan.poll_seconds)
        self._plan = plan
        self._now_ms = now_ms
        self._watchman = HeartbeatMonitor(plan.patience_seconds)
        self._turns = Turns(token, clock)
        self._look = Look([], over=False)
        self._waiting: dict[str, list[Checkpoint]] = {}
        self._free: dict[str, dict[str, list[str]]] = {}
        self._settled: dict[str, Checkpoint] = {}
        self._refused: set[str] = set()
        self._put_off: set[str] = set()
        self._failed_here: set[tuple[str, str]] = set()
        self._only: dict[str, Sequence[str]] = {}
        self._contenders: dict[str, set[str]] = {}
        self._served: dict[str, int] = defaultdict(int)
        self._look_seconds = 0.0
        self._tried = self._lost = 0

    @property
    def is_waiting(self) -> bool:
        """Whether something remained to be done at the last look, be it by others."""
        return any(self._waiting.values())

    @property
    def has_free(self) -> bool:
        """Whether there is something left that nobody is at, as far as is known."""
        return any(self._free.values())

    @property
    def has_plenty(self) -> bool:
        """Whether more than one checkpoint for each validator at work is left."""
        return sum(len(of_run) for of_run in self._free.values()) > self.validators

    @property
    def is_stale(self) -> bool:
        """Whether others have taken what the last look showed as free."""
        return self._lost >= max(LOST_TO_LOOK_AGAIN, self._look_seconds / SECONDS_TO_LOSE)

    def why_nothing(self) -> str:
        """Why there was nothing to do at the last look; empty where it was done before."""
        ready = [one for one in self._look.checkpoints if one.ready]
        if not ready:
            return "no checkpoint is published yet"
        accepted = [one for one in ready if one.run_id not in self._refused]
        if not accepted:
            runs = len({one.run_id for one in ready})
            return f"none of {runs} runs can be validated, for the reasons above"
        if self.is_waiting:
            return "other validators are at what is left"
        names = [one.name for one in self._plan.validations]
        if any(validation_state(one, name) is not State.OPEN for one in accepted for name in names):
            return ""
        if all(one.is_pruned for one in accepted):
            return f"the files of all {len(accepted)} checkpoints were removed"
        return f"of {len(accepted)} checkpoints --every and --max-lag leave none"

    def waiting_of(self, run_id: str) -> list[Checkpoint]:
        """What remained to be done of a run at the last look, be it by others."""
        return self._waiting.get(run_id, [])

    def see(self, look: Look, seconds: float = 0.0) -> list[Checkpoint]:
        """Take in what there is now; returns what nothing remains to be done for.

        Args:
            look: what there is.
            seconds: what the look took; a dear one is worth some claims that are lost.
        """
        self._look = look
        self._look_seconds = seconds
        self._tried = self._lost = 0
        self._put_off = set()
        self.unavailable = set()
        settled: list[Checkpoint] = []
        self._waiting = defaultdict(list)
        self._free = defaultdict(dict)
        names = [one.name for one in self._plan.validations]
        self._contenders = {
            one.name: _best(look.checkpoints, one.refines)
            for one in self._plan.validations
            if one.refines
        }
        for one in look.checkpoints:
            if one.pending or self._settled.get(one.model_id) is one:
                continue
            self._turns.see(one, names)
            is_meant = self._is_meant(one) and one.run_id not in self._refused
            left = self._open(one) if is_meant else []
            if is_meant and self._has_failed(one):
                self.passed_over.add(one.model_id)
            else:
                self.passed_over.discard(one.model_id)
            if left and self._setbacks.has_given_up(one):
                self.unavailable.add(one.model_id)
                continue
            free = [name for name in left if self._watchman.is_free(one, name)]
            # what was begun in time is still to be done, by whom it was begun
            late = self._is_late(one)
            if not left or (late and free == left):
                settled.append(one)
                self._settled[one.model_id] = one
            else:
                self._waiting[one.run_id].append(one)
                if free and not late:
                    self._free[one.run_id][one.model_id] = free
        return settled

    def candidates(self) -> Iterator[Candidate]:
        """What to try, the best first: of the run that has had the least of us.

        Ends early where so much was lost to others that another look is cheaper.
        """
        for run_id in sorted(self._free, key=lambda one: self._served[one]):
            ordered = self._turns.ours_first(
                self._in_order(run_id), self._look.checkpoints, self._tried
            )
            for one in ordered:
                if run_id in self._refused | self._put_off or self.is_stale:
                    break
                if not self._is_late(one):
                    yield Candidate(one, self._free[run_id][one.model_id])

    def limit(self, run_id: str, names: Sequence[str]) -> bool:
        """Do only these validations on a run, from the next look on; whether that is a change."""
        if self._only.get(run_id) == names:
            return False
        self._only[run_id] = names
        self._settled = {}
        return True

    @property
    def validators(self) -> int:
        """How many were seen at work lately, this one included."""
        return len(self._turns.tokens())

    def refuse(self, run_id: str) -> None:
        """Pass over a run from now on."""
        self._refused.add(run_id)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Pass over a checkpoint from now on."""
        self._free[checkpoint.run_id].pop(checkpoint.model_id, None)
        self._settled[checkpoint.model_id] = checkpoint

    def put_off(self, run_id: str) -> None:
        """Pass over a run until the next look."""
        self._put_off.add(run_id)

    def tried(
        self, checkpoint: Checkpoint, names: Sequence[str], lost_to: Owner | None = None
    ) -> None:
        """These validations were claimed, or lost to another: they are not tried again now."""
        of_run = self._free[checkpoint.run_id]
        left = [name for name in of_run[checkpoint.model_id] if name not in names]
        if left:
            of_run[checkpoint.model_id] = left
        else:
            del of_run[checkpoint.model_id]
        self._tried += 1
        if lost_to is None:
            self._served[checkpoint.run_id] += 1
        else:
            self._lost += 1
            self._turns.note(lost_to)

    def ended(self, checkpoint: Checkpoint, name: str, state: State | None) -> None:
        """What came of a validation that was claimed; None if nothing did."""
        self._watchman.forget(checkpoint, name)
        if state is State.FAILED:
            self._failed_here.add((checkpoint.model_id, name))

    def _is_meant(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.ready and checkpoint.step % self._plan.every == 0

    def _open(self, checkpoint: Checkpoint) -> list[str]:
        """The validations that remain to be done for a checkpoint."""
        names = [one.name for one in self._plan.validations]
        return [
            name
            for name in self._only.get(checkpoint.run_id, names)
            if self._is_open(checkpoint, name)
            and checkpoint.model_id in self._contenders.get(name, (checkpoint.model_id,))
        ]

    def _is_open(self, checkpoint: Checkpoint, name: str) -> bool:
        state = validation_state(checkpoint, name)
        if checkpoint.is_pruned and state is not State.RECORDED:
            return False
        if state is State.FAILED:
            tried = (checkpoint.model_id, name) in self._failed_here
            # what has a record that makes no sense can have no other
            return self._plan.retry_failed and not tried and not has_record(checkpoint, name)
        return state in (State.OPEN, State.RECORDED)

    def _has_failed(self, checkpoint: Checkpoint) -> bool:
        """Whether a validation of a checkpoint is FAILED, and not by this validator."""
        names = [one.name for one in self._plan.validations]
        return not checkpoint.is_pruned and any(
            validation_state(checkpoint, name) is State.FAILED
            and (checkpoint.model_id, name) not in self._failed_here
            for name in names
        )

    def _is_late(self, checkpoint: Checkpoint) -> bool:
        most = self._plan.max_lag_seconds
        return most is not None and self._now_ms() - checkpoint.ready_ms > 1000 * most

    def _in_order(self, run_id: str) -> Iterator[Checkpoint]:
        """The free checkpoints of a run, the next one first; those with setbacks are the last."""
        free = set(self._free[run_id])
        by_step: dict[int, list[Checkpoint]] = defaultdict(list)
        taken: set[int] = set()
        for one in self._look.checkpoints:
            if one.run_id != run_id:
                continue
            if one.model_id in free:
                by_step[one.step].append(one)
            elif self._is_meant(one) and not self._is_late(one):
                taken.add(one.step)
        steps = sorted(by_step)
        ordered = in_order(steps, sorted(taken - set(steps)), self._plan.order)
        last: list[Checkpoint] = []
        for one in (one for step in ordered for one in by_step[step]):
            if self._setbacks.tries(one):
                last.append(one)
            else:
                yield one
        yield from sorted(last, key=self._setbacks.tries)


def _best(checkpoints: Sequence[Checkpoint], refines: Refines) -> set[str]:
    """The model ids of each run's best checkpoints so far by a cheap validation."""
    key = refines.measure.metric
    by_run: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for one in checkpoints:
        value = recorded_values(one, refines.name).get(key)
        if value is not None:
            by_run[one.run_id].append((-value, one.step, one.model_id))
    return {
        model_id for found in by_run.values() for _, _, model_id in sorted(found)[: refines.best]
    }
