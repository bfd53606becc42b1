"""Checkpoints that another library's trainer writes into a directory on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.encoder.files import encoder_defect, signature_of, step_of
from mlflow_dr.errors import UsageError
from mlflow_dr.files import digest_of
from mlflow_dr.tracking.checkpoints import (
    DIRECTORY_TAG,
    MODEL_TYPE,
    READY,
    STEP_TAG,
    Checkpoint,
    checkpoint_by_id,
    link_to_run,
)
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.following import OpenCheckpoints, Snapshot
from mlflow_dr.tracking.runs import TrackedRun, check_alive, is_over

log = logging.getLogger(__name__)

NOT_UTF8 = "its name is not UTF-8"
NO_STEP = "neither its name nor a trainer_state.json says a step"


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
        for path in sorted(self._directory.iterdir()):
            if not path.is_dir() or path.name.startswith("."):
                continue
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
    for path in sorted(directory.absolute().iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        step, lacks = step_of(path), encoder_defect(path)
        if step is None or lacks:
            log.info("%s is passed over: %s", path, NO_STEP if step is None else lacks)
            continue
        checkpoints.append(_unregistered(path, step))
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


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


class _Seen(NamedTuple):
    """A directory at the last snapshot, and what it lacks to be complete."""

    signature: tuple[tuple[str, int, int], ...]
    step: int | None
    lacks: str


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
