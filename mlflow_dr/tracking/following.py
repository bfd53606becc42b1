"""What validators follow: the checkpoints of a run, or of all runs of an experiment.

Checkpoints that nothing remains to be done for are not asked for again, so a look at a run of a
thousand costs as much as a look at one of ten.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage

from mlflow_dr.errors import TrackingError, did_you_mean
from mlflow_dr.tracking.checkpoints import Checkpoint, find_checkpoints
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun, check_alive, find_run, is_over

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FULL_LOOKS = 600.0
SECONDS_BETWEEN_STATES = 30.0
LONGEST_UPLOAD_MS = 3_600_000


class Snapshot(NamedTuple):
    """What there is to see.

    Attributes:
        checkpoints: all, by step; those that are settled as they were seen last.
        over: whether nothing will be added; None where that was not asked.
    """

    checkpoints: list[Checkpoint]
    over: bool | None

    def by_run(self) -> dict[str, list[Checkpoint]]:
        """The checkpoints of each run that has any, by step."""
        found: dict[str, list[Checkpoint]] = {}
        for one in self.checkpoints:
            found.setdefault(one.run_id, []).append(one)
        return found


class Followed(Protocol):
    """What is looked at again and again; `run` is the only run, where there is but one."""

    client: MlflowClient
    name: str
    run: TrackedRun | None

    def look(self) -> Snapshot:
        """See what there is now."""

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Ask for this one no more."""

    def ask_again(self) -> None:
        """Nothing is settled any more: something else is to be done."""

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run that a checkpoint belongs to."""


class FollowedRun:
    """One run; a look costs two requests, and one while there is something to do.

    Args:
        run: which.
    """

    run: TrackedRun | None

    def __init__(self, run: TrackedRun) -> None:
        self.client = run.client
        self.name = f"run {run.id}"
        self.run = self._run = run
        self._list = OpenCheckpoints(run.client, run.experiment_id, run.id)
        self._ask_at = 0.0

    def look(self) -> Snapshot:
        """See what there is now.

        Raises:
            TrackingError: the server does not answer, or the run was deleted.
        """
        if self._list.has_open and time.monotonic() < self._ask_at:
            return Snapshot(self._list.look(), over=None)  # that matters when nothing is left
        # the end is read before the checkpoints, so that none published in between is missed
        state = self._run.fetch()
        check_alive(state)
        self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES
        over = is_over(state)
        return Snapshot(self._list.look(for_good=over), over)

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Ask for this one no more."""
        self._list.mark_done(checkpoint)

    def ask_again(self) -> None:
        """Nothing is settled any more."""
        self._list.ask_again()

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run."""
        return self._run


class FollowedExperiment:
    """All runs of an experiment, also those that begin later; a look costs one request.

    Args:
        client: where.
        name: the experiment's name.

    Raises:
        TrackingError: there is no such experiment.
    """

    run: TrackedRun | None

    def __init__(self, client: MlflowClient, name: str) -> None:
        self.name = f"experiment {name!r}"
        self.run = None
        self.client = client
        with tracking_errors(self.name):
            found = client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(no_experiment(client, name))
        self._id = found.experiment_id
        self._list = OpenCheckpoints(client, self._id)
        self._runs: dict[str, TrackedRun] = {}
        self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES

    def look(self) -> Snapshot:
        """See what there is now; there may always come more.

        Raises:
            TrackingError: the server does not answer, or the experiment was deleted.
        """
        if time.monotonic() >= self._ask_at:
            self._check_alive()
            self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES
        return Snapshot(self._list.look(), over=False)

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Ask for this one no more."""
        self._list.mark_done(checkpoint)

    def ask_again(self) -> None:
        """Nothing is settled any more."""
        self._list.ask_again()

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run that a checkpoint belongs to.

        Raises:
            TrackingError: it was deleted.
        """
        if checkpoint.run_id not in self._runs:
            self._runs[checkpoint.run_id] = find_run(self.client, checkpoint.run_id)
        return self._runs[checkpoint.run_id]

    def _check_alive(self) -> None:
        with tracking_errors(self.name):
            found = self.client.get_experiment(self._id)
            if found.experiment_id != self._id:
                raise ValueError("the server's answer is not about this experiment")
        if found.lifecycle_stage != LifecycleStage.ACTIVE:
            raise TrackingError(
                f"{self.name} was deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {self._id}` to go on"
            )


def no_experiment(client: MlflowClient, name: str) -> str:
    """What to say of an experiment that is not there: which one was meant, perhaps."""
    with tracking_errors(f"experiment {name!r}"):
        near = did_you_mean(name, [one.name for one in client.search_experiments()])
    return f"no experiment {name!r}{near or ';'} `mlflow experiments search` lists them"


class OpenCheckpoints:
    """Checkpoints, of which those are asked for that are new or not settled.

    The oldest of these bounds the search by its time of creation; one that is still PENDING an hour
    later, whose trainer may have died, does not. Where several machines write to a database without
    a server, that time is theirs, and may be wrong: so now and then everything is asked for.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        run_id: str | None = None,
        directory: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._where = (client, experiment_id, run_id)
        self._directory = directory
        self._clock = clock
        self._known: dict[str, Checkpoint] = {}
        self._settled: set[str] = set()
        self._full_look_at = -float("inf")

    @property
    def has_open(self) -> bool:
        """Whether something READY was not settled at the last look."""
        return any(one.ready and key not in self._settled for key, one in self._known.items())

    def look(self, for_good: bool = False) -> list[Checkpoint]:
        """All that are known, by step, as they are now or were when they were settled.

        Args:
            for_good: nothing will be added: what was PENDING for long is asked for once more.
        """
        full = self._clock() - self._full_look_at >= SECONDS_BETWEEN_FULL_LOOKS
        found = find_checkpoints(*self._where, since_ms=0 if full else self._since(for_good))
        if full:
            self._known = {}  # what was deleted is gone
            self._full_look_at = self._clock()
        self._known.update({one.model_id: one for one in found if self._is_meant(one)})
        return sorted(self._known.values(), key=lambda one: (one.step, one.created_ms))

    def _is_meant(self, checkpoint: Checkpoint) -> bool:
        """Published ones, or those of the directory; of others there are no files here."""
        where = checkpoint.directory
        return str(Path(where).parent) == self._directory if where else not self._directory

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Ask for this one no more."""
        self._settled.add(checkpoint.model_id)

    def ask_again(self) -> None:
        """Ask for all of them at the next look."""
        self._settled = set()
        self._full_look_at = -float("inf")

    def _since(self, for_good: bool) -> int:
        newest = max((one.created_ms for one in self._known.values()), default=0)
        left = [
            one.created_ms
            for key, one in self._known.items()
            if key not in self._settled
            and (for_good or not one.pending or one.created_ms >= newest - LONGEST_UPLOAD_MS)
        ]
        return min(left, default=newest)
