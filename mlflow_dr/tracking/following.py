"""What validators follow: checkpoints of a run, of an experiment, or in a directory.

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

from mlflow_dr.encoder.files import encoder_defect, signature_of, step_of
from mlflow_dr.errors import TrackingError, UsageError, did_you_mean
from mlflow_dr.files import digest_of
from mlflow_dr.tracking.checkpoints import (
    DIRECTORY_TAG,
    MODEL_TYPE,
    READY,
    STEP_TAG,
    Checkpoint,
    checkpoint_by_id,
    find_checkpoints,
    link_to_run,
)
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun, check_alive, find_run, is_over

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FULL_SNAPSHOTS = 600.0
SECONDS_BETWEEN_STATES = 30.0
LONGEST_UPLOAD_MS = 3_600_000
NOT_UTF8 = "its name is not UTF-8"
NO_STEP = "neither its name nor a trainer_state.json says a step"


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


class _Seen(NamedTuple):
    """A directory at the last snapshot, and what it lacks to be complete."""

    signature: tuple[tuple[str, int, int], ...]
    step: int | None
    lacks: str


class FollowedDirectory:
    """The checkpoints that a trainer writes into a directory on this machine.

    A checkpoint counts when its files are complete and have not changed since the last snapshot.
    Everything else in the directory is skipped, and so are checkpoints that the trainer has
    deleted. Each checkpoint is registered with the run without its files, so that claims and
    figures are as for published checkpoints.

    Args:
        run: gets the figures.
        directory: such as Trainer's `output_dir`.
        is_mine: whether the run was made for this directory. If not, following ends when the run
            ends.

    Raises:
        UsageError: there is no such directory.
    """

    run: TrackedRun | None

    def __init__(self, run: TrackedRun, directory: Path, is_mine: bool) -> None:
        if not directory.is_dir():
            raise UsageError(f"{directory}: no such directory")
        self.client = run.client
        self.name = f"directory {directory}"
        self.run = self._run = run
        self._directory = directory.absolute()
        self._is_mine = is_mine
        self.checkpoints = OpenCheckpoints(
            run.client, run.experiment_id, run.id, str(self._directory)
        )
        self._seen: dict[Path, _Seen] = {}
        self._registered: set[Path] = set()
        self._logged: set[tuple[Path, str]] = set()
        self._complete()

    def snapshot(self) -> Snapshot:
        """Register what is new, and take a snapshot.

        Raises:
            TrackingError: the server does not answer, or the run was deleted.
        """
        state = self._run.fetch()
        check_alive(state)
        complete = self._complete()
        for path, step in complete.items():
            if path not in self._registered:
                with tracking_errors(f"registering {path}"):
                    register_directory(self._run, path, step)
                self._registered.add(path)
        over = not self._is_mine and is_over(state)
        checkpoints = [
            checkpoint
            for checkpoint in self.checkpoints.snapshot(is_over=over)
            if Path(checkpoint.directory) in complete
        ]
        return Snapshot(checkpoints, over)

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run."""
        return self._run

    def _complete(self) -> dict[Path, int]:
        """Complete checkpoints that have not changed since the last snapshot, with their steps."""
        before, self._seen = self._seen, {}
        complete: dict[Path, int] = {}
        for path in _folders(self._directory):
            if not _is_text(path):  # MLflow cannot store it
                self._log(path, NOT_UTF8)
                continue
            signature, seen = signature_of(path), before.get(path)
            if seen is None or seen.signature != signature:
                self._seen[path] = _Seen(signature, step_of(path), encoder_defect(path))
                continue
            self._seen[path] = seen
            if seen.step is None:
                self._log(path, NO_STEP)
            elif seen.lacks:
                self._log(path, seen.lacks)
            else:
                complete[path] = seen.step
        return complete

    def _log(self, path: Path, reason: str) -> None:
        if (path, reason) not in self._logged:
            self._logged.add((path, reason))
            log.info("%s is passed over for now: %s", _shown(path), reason)


def found_checkpoints(directory: Path) -> list[Checkpoint]:
    """The complete checkpoints in a directory, by step, without a run.

    Args:
        directory: such as Trainer's `output_dir`.

    Raises:
        UsageError: there is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    checkpoints: list[Checkpoint] = []
    for path in _folders(directory.absolute()):
        step, lacks = step_of(path), encoder_defect(path)
        if step is None or lacks:
            log.info("%s is passed over: %s", path, NO_STEP if step is None else lacks)
            continue
        checkpoints.append(_unregistered(path, step))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def _folders(directory: Path) -> list[Path]:
    """The folders in a directory that may be checkpoints, by name."""
    paths = sorted(directory.iterdir())
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def _unregistered(path: Path, step: int) -> Checkpoint:
    return Checkpoint(
        model_id="",
        run_id="",
        step=step,
        ready=True,
        pending=False,
        created_ms=0,
        ready_ms=0,
        location="",
        manifest="",
        params={},
        tags={},
        metrics=frozenset(),
        directory=str(path),
    )


def _is_text(path: Path) -> bool:
    return _shown(path) == str(path)


def _shown(path: Path) -> str:
    return str(path).encode(errors="backslashreplace").decode()


def register_directory(run: TrackedRun, directory: Path, step: int) -> str:
    """Register a directory on this machine as a checkpoint of a run; its files stay there.

    If several validators register it at the same time, the first registration counts.

    Returns:
        The model id.
    """
    key = f"{DIRECTORY_TAG}.{digest_of(directory)}"
    model_id = run.fetch().data.params.get(key)
    if model_id is None:
        model_id = _create_model(run, directory, step, key)
    if checkpoint_by_id(run.client, model_id).pending:
        link_to_run(run, model_id, step)
        run.client.finalize_logged_model(model_id, READY)
    return model_id


def _create_model(run: TrackedRun, directory: Path, step: int, key: str) -> str:
    model_id = str(
        run.client.create_logged_model(
            run.experiment_id,
            name=f"step-{step}",
            source_run_id=run.id,
            tags={STEP_TAG: str(step), DIRECTORY_TAG: str(directory)},
            model_type=MODEL_TYPE,
        ).model_id
    )
    registered = run.set_param_once(key, model_id)
    if registered != model_id:
        run.client.delete_logged_model(model_id)
    return registered
