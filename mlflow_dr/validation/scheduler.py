"""Chooses the checkpoint that a validator takes next; others may follow the same run."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from mlflow_dr.errors import UnavailableError
from mlflow_dr.tracking.checkpoints import MODEL_TYPE, Checkpoint
from mlflow_dr.tracking.claims import HeartbeatMonitor, latest_claim
from mlflow_dr.tracking.following import Snapshot
from mlflow_dr.tracking.results import State, has_record, is_finished, validation_state
from mlflow_dr.tracking.validations import recorded_values, sign_of
from mlflow_dr.validation.config import FollowConfig
from mlflow_dr.validation.validations import Refines

LOST_CLAIMS = 2  # after so many the server is asked again
SECONDS_PER_LOST_CLAIM = 0.1
CHOSEN_AMONG = 2  # checkpoints for each validator at work

TRIES = 5  # to fetch one checkpoint
TRIES_IN_A_ROW = 12  # to fetch any
LONGEST_WAIT = 60.0
OTHER_COMMAND = "`mlflow-dr validate` is for encoders, `mlflow-dr reader-validate` for readers"


class Scheduler:
    """The work that is left by the last snapshot, without what was tried since.

    Args:
        config: which checkpoints, in which order.
        token: the validator's own, in its claims.
        now_ms: the server's time, in ms since 1970.
        setbacks: which checkpoints could not be fetched.
        model_type: of the checkpoints that are validated; others are skipped.

    Attributes:
        unavailable: checkpoints that are left to others, because they could not be fetched here.
        passed_over: checkpoints that another validator, or an earlier one, has recorded as FAILED.
        validators: how many are at work, this one included.
    """

    def __init__(
        self,
        config: FollowConfig,
        token: str,
        now_ms: Callable[[], int],
        setbacks: Setbacks | None = None,
        model_type: str = MODEL_TYPE,
    ) -> None:
        self._model_type = model_type
        self.unavailable: set[str] = set()
        self.passed_over: set[str] = set()
        self.validators = 1
        self._setbacks = setbacks or Setbacks(config.poll_seconds)
        self._config = config
        self._names = [validation.name for validation in config.all_validations]
        self._mean_of = {
            validation.name: validation.mean_of for validation in config.all_validations
        }
        self._token = token
        self._at_work = [token]
        self._now_ms = now_ms
        self._heartbeats = HeartbeatMonitor(config.patience_seconds)
        self._snapshot = Snapshot([], over=False)
        self._waiting: dict[str, list[Checkpoint]] = {}
        self._free: dict[str, dict[str, list[str]]] = {}
        self._done: dict[str, Checkpoint] = {}
        self._refused: set[str] = set()
        self._put_off: set[str] = set()
        self._failed_here: set[tuple[str, str]] = set()
        self._only: dict[str, Sequence[str]] = {}
        self._contenders: dict[str, set[str]] = {}
        self._served: Counter[str] = Counter()
        self._most_lost = LOST_CLAIMS
        self._lost = 0

    @property
    def is_waiting(self) -> bool:
        """Whether the last snapshot left work for this validator or another."""
        return any(self._waiting.values())

    @property
    def has_free(self) -> bool:
        """Whether work is left that no known validator has claimed."""
        return any(self._free.values())

    @property
    def is_stale(self) -> bool:
        """Whether other validators have claimed the work that the last snapshot showed as free."""
        return self._lost >= self._most_lost

    def why_nothing(self) -> str:
        """Why the last snapshot left no work; empty if everything is done."""
        ready = [checkpoint for checkpoint in self._snapshot.checkpoints if checkpoint.ready]
        if not ready:
            return "no checkpoint is published yet"
        ready = [checkpoint for checkpoint in ready if checkpoint.model_type == self._model_type]
        if not ready:
            return f"no checkpoint is a {self._model_type} ({OTHER_COMMAND})"
        accepted = [checkpoint for checkpoint in ready if checkpoint.run_id not in self._refused]
        if not accepted:
            runs = len({checkpoint.run_id for checkpoint in ready})
            return f"none of {runs} runs can be validated, for the reasons above"
        if self.is_waiting:
            return "other validators are working on what is left"
        states = {
            validation_state(checkpoint, name) for checkpoint in accepted for name in self._names
        }
        if states != {State.OPEN}:
            return ""
        if all(checkpoint.is_pruned for checkpoint in accepted):
            return f"the files of all {len(accepted)} checkpoints were deleted"
        return f"--every and --max-lag leave none of {len(accepted)} checkpoints"

    def waiting_of(self, run_id: str) -> list[Checkpoint]:
        """The checkpoints of a run for which the last snapshot left work."""
        return self._waiting.get(run_id, [])

    def see(self, snapshot: Snapshot, seconds: float = 0.0) -> list[Checkpoint]:
        """Take in a snapshot; returns the checkpoints that are done.

        Args:
            snapshot: the checkpoints that are published now.
            seconds: what the request took; a slow one is worth some claims that are lost.
        """
        self._snapshot = snapshot
        self._most_lost = max(LOST_CLAIMS, int(seconds / SECONDS_PER_LOST_CLAIM))
        self._lost = 0
        self._put_off = set()
        self.unavailable = set()
        self._waiting, self._free = defaultdict(list), defaultdict(dict)
        self._contenders = {
            validation.name: _best(snapshot.checkpoints, validation.refines)
            for validation in self._config.all_validations
            if validation.refines
        }
        at_work = {self._token}
        done: list[Checkpoint] = []
        for checkpoint in snapshot.checkpoints:
            if checkpoint.pending or self._done.get(checkpoint.model_id) is checkpoint:
                continue
            left = self._left(checkpoint)
            if left and self._setbacks.has_given_up(checkpoint):
                self.unavailable.add(checkpoint.model_id)
                continue
            free = [name for name in left if self._heartbeats.is_free(checkpoint, name)]
            at_work |= {_owner(checkpoint, name) for name in left if name not in free}
            # a validation that began in time is finished by its validator
            is_late = self._is_late(checkpoint)
            if not left or (is_late and free == left):
                done.append(checkpoint)
                self._done[checkpoint.model_id] = checkpoint
            else:
                self._waiting[checkpoint.run_id].append(checkpoint)
                if free and not is_late:
                    self._free[checkpoint.run_id][checkpoint.model_id] = free
        self._at_work = sorted(at_work - {""})
        self.validators = len(self._at_work)
        return done

    def candidates(
        self, ready_ids: Sequence[str] = ()
    ) -> Iterator[tuple[Checkpoint, Sequence[str]]]:
        """Checkpoints to try, with their free validations; the run that was served least is first.

        If other validators are at work, it begins with those of the next few that a hash gives to
        this one, so that they rarely claim the same checkpoint. It ends early when so many claims
        were lost that asking the server again is cheaper.

        Args:
            ready_ids: model ids of checkpoints that are here, which come first among these, in this
                order.
        """
        for run_id in sorted(self._free, key=lambda run_id: self._served[run_id]):
            ordered = self._in_order(run_id)
            if self.validators > 1:
                few = list(islice(ordered, CHOSEN_AMONG * self.validators))
                random.shuffle(few)
                few.sort(key=self._is_for_another)
                for model_id in reversed(ready_ids):
                    few.sort(key=lambda checkpoint: checkpoint.model_id != model_id)
                ordered = chain(few, ordered)
            for checkpoint in ordered:
                if run_id in self._refused | self._put_off or self.is_stale:
                    break
                if not self._is_late(checkpoint):
                    yield checkpoint, self._free[run_id][checkpoint.model_id]

    def likely_after(self, current: Checkpoint) -> Checkpoint | None:
        """The checkpoint that is likely to come after one; None if none is published that may."""
        if self._config.order == "newest" and not self._snapshot.over:
            return None  # it is not published yet
        means = {name for name, members in self._mean_of.items() if members}
        for checkpoint, names in self.candidates():
            if checkpoint.model_id != current.model_id and not means.issuperset(names):
                return checkpoint
        return None

    def _is_for_another(self, checkpoint: Checkpoint) -> bool:
        """Whether another validator at work has the higher hash with a checkpoint."""
        model_id = checkpoint.model_id
        highest = max(self._at_work, key=lambda token: random.Random(token + model_id).random())
        return highest != self._token

    def limit(self, run_id: str, names: Sequence[str]) -> bool:
        """Do only these validations on a run from now on; returns whether that is a change."""
        if self._only.get(run_id) == names:
            return False
        self._only[run_id] = names
        self._done = {}
        return True

    def refuse(self, run_id: str) -> None:
        """Pass over a run from now on."""
        self._refused.add(run_id)

    def forget(self, checkpoint: Checkpoint) -> None:
        """Pass over a checkpoint from now on."""
        self._free[checkpoint.run_id].pop(checkpoint.model_id, None)
        self._done[checkpoint.model_id] = checkpoint

    def put_off(self, run_id: str) -> None:
        """Pass over a run until the next snapshot."""
        self._put_off.add(run_id)

    def note_tried(self, checkpoint: Checkpoint, names: Sequence[str], is_lost: bool) -> None:
        """These validations were claimed by this validator or, if lost, by another one."""
        free = self._free[checkpoint.run_id]
        left = [name for name in free[checkpoint.model_id] if name not in names]
        if left:
            free[checkpoint.model_id] = left
        else:
            del free[checkpoint.model_id]
        if is_lost:
            self._lost += 1
        else:
            self._served[checkpoint.run_id] += 1

    def note_ended(self, checkpoint: Checkpoint, name: str, state: State | None) -> None:
        """The result of a claimed validation; None if it has none yet."""
        self._heartbeats.forget(checkpoint, name)
        if state is State.FAILED:
            self._failed_here.add((checkpoint.model_id, name))

    def _left(self, checkpoint: Checkpoint) -> list[str]:
        """The validations that are left for a checkpoint; records if it has FAILED before."""
        is_selected = self._is_selected(checkpoint) and checkpoint.run_id not in self._refused
        if is_selected and self._has_failed(checkpoint):
            self.passed_over.add(checkpoint.model_id)
        else:
            self.passed_over.discard(checkpoint.model_id)
        if not is_selected:
            return []
        return [
            name
            for name in self._only.get(checkpoint.run_id, self._names)
            if self._is_open(checkpoint, name)
            and checkpoint.model_id in self._contenders.get(name, (checkpoint.model_id,))
        ]

    def _is_selected(self, checkpoint: Checkpoint) -> bool:
        is_of_kind = checkpoint.model_type == self._model_type
        return is_of_kind and checkpoint.ready and checkpoint.step % self._config.every == 0

    def _is_open(self, checkpoint: Checkpoint, name: str) -> bool:
        state, mean_of = validation_state(checkpoint, name), self._mean_of[name]
        if not all(is_finished(checkpoint, other) for other in mean_of):
            return False
        if checkpoint.is_pruned and state is not State.RECORDED and not mean_of:
            return False
        if state is State.FAILED:
            is_tried = (checkpoint.model_id, name) in self._failed_here
            # a malformed record cannot be replaced
            return self._config.retry_failed and not is_tried and not has_record(checkpoint, name)
        return state in (State.OPEN, State.RECORDED)

    def _has_failed(self, checkpoint: Checkpoint) -> bool:
        """Whether a validation of a checkpoint is FAILED, and not by this validator."""
        return not checkpoint.is_pruned and any(
            validation_state(checkpoint, name) is State.FAILED
            and (checkpoint.model_id, name) not in self._failed_here
            for name in self._names
        )

    def _is_late(self, checkpoint: Checkpoint) -> bool:
        longest = self._config.max_lag_seconds
        return longest is not None and self._now_ms() - checkpoint.ready_ms > 1000 * longest

    def _in_order(self, run_id: str) -> Iterator[Checkpoint]:
        """The free checkpoints of a run, the next one first; those with setbacks come last."""
        free = set(self._free[run_id])
        by_step: dict[int, list[Checkpoint]] = defaultdict(list)
        taken: set[int] = set()
        for checkpoint in self._snapshot.checkpoints:
            if checkpoint.run_id != run_id:
                continue
            if checkpoint.model_id in free:
                by_step[checkpoint.step].append(checkpoint)
            elif self._is_selected(checkpoint) and not self._is_late(checkpoint):
                taken.add(checkpoint.step)
        steps = sorted(by_step)
        last: list[Checkpoint] = []
        for step in in_order(steps, sorted(taken - set(steps)), self._config.order):
            for checkpoint in by_step[step]:
                if self._setbacks.tries(checkpoint):
                    last.append(checkpoint)
                else:
                    yield checkpoint
        yield from sorted(last, key=self._setbacks.tries)


class Setbacks:
    """Counts the failed tries to fetch and read checkpoints, with growing waits between them.

    A missing module, credentials or a store that does not answer are this validator's trouble. It
    gives the claim back, and takes other checkpoints first. After five tries it leaves a checkpoint
    to other validators; after twelve in a row, of any checkpoints, it ends.

    Args:
        seconds: to wait after the first failure; each further wait is twice as long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tries: Counter[str] = Counter()
        self._in_a_row = 0

    def note(self, checkpoint: Checkpoint, error: UnavailableError) -> float:
        """A checkpoint could not be fetched or read; returns how many seconds to wait.

        Raises:
            UnavailableError: that has happened too often in a row.
        """
        weight = TRIES if error.lasting else 1
        self._tries[checkpoint.model_id] += weight
        self._in_a_row += weight
        if self._in_a_row >= TRIES_IN_A_ROW:
            raise UnavailableError(
                f"this validator cannot read checkpoints, last step {checkpoint.step}: {error}; "
                "fix that and start it again, other validators continue with what is left"
            ) from error
        if error.lasting:
            return 0.0
        return min(self._seconds * 2.0 ** (self._in_a_row - 1), LONGEST_WAIT)

    def note_success(self) -> None:
        """A checkpoint could be read."""
        self._in_a_row = 0

    @property
    def is_in_one(self) -> bool:
        """Whether the last checkpoint could not be read."""
        return self._in_a_row > 0

    def tries(self, checkpoint: Checkpoint) -> int:
        """How often a checkpoint could not be read."""
        return self._tries[checkpoint.model_id]

    def has_given_up(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is left to other validators."""
        return self._tries[checkpoint.model_id] >= TRIES


def in_order(waiting: Sequence[int], taken: Sequence[int], order: str) -> Iterator[int]:
    """The steps that wait, the next one first.

    Args:
        waiting: steps, ascending.
        taken: steps that are validated, or that another validator is working on; ascending.
        order: `oldest`, `newest`, or `bisect`: the newest, and then the step that is farthest from
            all that are taken, so that a slow validator refines the curve evenly.
    """
    if order != "bisect":
        yield from waiting if order == "oldest" else reversed(waiting)
        return
    left, points = list(waiting), list(taken)
    while left:
        step = left[-1]
        if points:
            step = max(left, key=lambda step: (_distance(step, points), step))
        yield step
        left.remove(step)
        points.insert(bisect_left(points, step), step)


def _distance(step: int, points: Sequence[int]) -> int:
    """The distance to the nearest of some ascending points."""
    index = bisect_left(points, step)
    return min(abs(step - point) for point in points[max(0, index - 1) : index + 1])


def _owner(checkpoint: Checkpoint, name: str) -> str:
    """The token of the validator that is working on a validation; empty if none is known."""
    claim = latest_claim(checkpoint, name)
    return claim.owner.token if claim and claim.owner else ""


def _best(checkpoints: Sequence[Checkpoint], refines: Refines) -> set[str]:
    """The model ids of each run's best checkpoints so far by a cheap validation."""
    ranked: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    sign = sign_of(refines.measure)
    for checkpoint in checkpoints:
        value = recorded_values(checkpoint, refines.name).get(refines.measure.metric)
        if value is not None:
            ranked[checkpoint.run_id].append((-sign * value, checkpoint.step, checkpoint.model_id))
    return {
        model_id for scored in ranked.values() for _, _, model_id in sorted(scored)[: refines.best]
    }
