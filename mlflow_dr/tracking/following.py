"""What validators follow: the checkpoints of a run, or of all runs of an experiment.

Checkpoints that are done are not requested again, so a snapshot of a run with a thousand
checkpoints costs as much as one with ten.
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

SECONDS_BETWEEN_FULL_SNAPSHOTS = 600.0
SECONDS_BETWEEN_STATES = 30.0
LONGEST_UPLOAD_MS = 3_600_000


class Snapshot(NamedTuple):
    """The published checkpoints at one moment.

    Attributes:
        checkpoints: all, by step; those that are done as they were seen last.
        over: whether nothing will be added; None if that was not requested.
    """

    checkpoints: list[Checkpoint]
    over: bool | None

    def by_run(self) -> dict[str, list[Checkpoint]]:
        """The checkpoints of each run that has any, by step."""
        runs: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            runs.setdefault(checkpoint.run_id, []).append(checkpoint)
        return runs


class Followed(Protocol):
    """What a validator follows; `run` is None if there may be several runs."""

    client: MlflowClient
    name: str
    run: TrackedRun | None
    checkpoints: OpenCheckpoints

    def snapshot(self) -> Snapshot:
        """What is published now."""

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run that a checkpoint belongs to."""


class FollowedRun:
    """One run; a snapshot costs two requests, and only one while something is left to do."""

    run: TrackedRun | None

    def __init__(self, run: TrackedRun) -> None:
        self.client = run.client
        self.name = f"run {run.id}"
        self.run = self._run = run
        self.checkpoints = OpenCheckpoints(run.client, run.experiment_id, run.id)
        self._ask_at = 0.0

    def snapshot(self) -> Snapshot:
        """A snapshot of what is published.

        Raises:
            TrackingError: the server does not answer, or the run was deleted.
        """
        if self.checkpoints.has_open and time.monotonic() < self._ask_at:
            # the run's end matters only when no work is left
            return Snapshot(self.checkpoints.snapshot(), over=None)
        # the run's end is read first, so that no checkpoint published in between is missed
        state = self._run.fetch()
        check_alive(state)
        self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES
        over = is_over(state)
        return Snapshot(self.checkpoints.snapshot(is_over=over), over)

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run."""
        return self._run


class FollowedExperiment:
    """All runs of an experiment, also those that begin later; a snapshot costs one request.

    Args:
        client: of the tracking server.
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
            experiment = client.get_experiment_by_name(name)
        if experiment is None or experiment.lifecycle_stage != "active":
            raise TrackingError(no_experiment(client, name))
        self._id = experiment.experiment_id
        self.checkpoints = OpenCheckpoints(client, self._id)
        self._runs: dict[str, TrackedRun] = {}
        self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES

    def snapshot(self) -> Snapshot:
        """A snapshot of what is published; an experiment is never over.

        Raises:
            TrackingError: the server does not answer, or the experiment was deleted.
        """
        if time.monotonic() >= self._ask_at:
            self._check_alive()
            self._ask_at = time.monotonic() + SECONDS_BETWEEN_STATES
        return Snapshot(self.checkpoints.snapshot(), over=False)

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
            experiment = self.client.get_experiment(self._id)
            if experiment.experiment_id != self._id:
                raise ValueError("the server's answer is not about this experiment")
        if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
            raise TrackingError(
                f"{self.name} was deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {self._id}` to go on"
            )


def no_experiment(client: MlflowClient, name: str) -> str:
    """The message for an experiment that does not exist, with the nearest name."""
    with tracking_errors(f"experiment {name!r}"):
        near = did_you_mean(name, [experiment.name for experiment in client.search_experiments()])
    return f"no experiment {name!r}{near or ';'} `mlflow experiments search` lists them"


class OpenCheckpoints:
    """The checkpoints of a run or experiment, of which only new and open ones are requested.

    The creation time of the oldest open checkpoint bounds the search. One that is still PENDING
    after an hour does not count, because its trainer may have died. Without a server the machines
    that write to the database date checkpoints, and a clock may be wrong. So everything is
    requested from time to time.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment_id: str,
        run_id: str | None = None,
        directory: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search = (client, experiment_id, run_id)
        self._directory = directory
        self._clock = clock
        self._known: dict[str, Checkpoint] = {}
        self._done: set[str] = set()
        self._full_at = -float("inf")

    @property
    def has_open(self) -> bool:
        """Whether a READY checkpoint was open at the last snapshot."""
        return any(
            checkpoint.ready and key not in self._done for key, checkpoint in self._known.items()
        )

    def snapshot(self, is_over: bool = False) -> list[Checkpoint]:
        """All known checkpoints, by step, as they are now or were when they were done.

        Args:
            is_over: whether no checkpoint will be added; old PENDING checkpoints are then
                requested, too.
        """
        full = self._clock() - self._full_at >= SECONDS_BETWEEN_FULL_SNAPSHOTS
        checkpoints = find_checkpoints(*self._search, since_ms=0 if full else self._since(is_over))
        if full:
            self._known = {}  # forget deleted checkpoints
            self._full_at = self._clock()
        self._known.update(
            {
                checkpoint.model_id: checkpoint
                for checkpoint in checkpoints
                if self._is_followed(checkpoint)
            }
        )
        return sorted(
            self._known.values(), key=lambda checkpoint: (checkpoint.step, checkpoint.created_ms)
        )

    def _is_followed(self, checkpoint: Checkpoint) -> bool:
        """Whether it is published, or found in the directory; other files are elsewhere."""
        if not checkpoint.directory:
            return not self._directory
        return str(Path(checkpoint.directory).parent) == self._directory

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Do not request this checkpoint again."""
        self._done.add(checkpoint.model_id)

    def request_all(self) -> None:
        """Request all of them for the next snapshot."""
        self._done = set()
        self._full_at = -float("inf")

    def _since(self, is_over: bool) -> int:
        newest = max((checkpoint.created_ms for checkpoint in self._known.values()), default=0)
        left = [
            checkpoint.created_ms
            for key, checkpoint in self._known.items()
            if key not in self._done
            and (
                is_over
                or not checkpoint.pending
                or checkpoint.created_ms >= newest - LONGEST_UPLOAD_MS
            )
        ]
        return min(left, default=newest)
