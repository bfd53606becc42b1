"""Checkpoints that somebody else's trainer writes into a directory on this machine."""

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

NO_TEXT = "its name is not UTF-8"
NO_STEP = "neither its name nor a trainer_state.json says a step"


class FollowedDirectory:
    """The checkpoints that a trainer writes into a directory on this machine.

    A checkpoint counts when it is whole by its own files and as it was at the last look. What else
    lies there is passed over, and so is what the trainer has removed. Each is registered with the
    run, without its files, so that claims and figures are as those of published ones.

    Args:
        run: where figures go.
        directory: Trainer's `output_dir`, for example.
        is_mine: whether the run was made for this; else its end is the end.

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
        self._list = OpenCheckpoints(run.client, run.experiment_id, run.id, str(self._directory))
        self._seen: dict[Path, _Seen] = {}
        self._registered: set[Path] = set()
        self._told: set[tuple[Path, str]] = set()
        self._whole()

    def look(self) -> Snapshot:
        """See what there is now, and register what is new.

        Raises:
            TrackingError: the server does not answer, or the run was deleted.
        """
        state = self._run.fetch()
        check_alive(state)
        whole = self._whole()
        for path, step in whole.items():
            if path not in self._registered:
                with tracking_errors(f"registering {path}"):
                    register_directory(self._run, path, step)
                self._registered.add(path)
        over = not self._is_mine and is_over(state)
        there = [one for one in self._list.look(for_good=over) if Path(one.directory) in whole]
        return Snapshot(there, over)

    def mark_done(self, checkpoint: Checkpoint) -> None:
        """Ask for this one no more."""
        self._list.mark_done(checkpoint)

    def ask_again(self) -> None:
        """Nothing is settled any more."""
        self._list.ask_again()

    def run_of(self, checkpoint: Checkpoint) -> TrackedRun:
        """The run."""
        return self._run

    def _whole(self) -> dict[Path, int]:
        """Checkpoints that are whole and have not changed since the last look, with their steps."""
        before, self._seen = self._seen, {}
        found: dict[Path, int] = {}
        for path in sorted(self._directory.iterdir()):
            if not path.is_dir() or path.name.startswith("."):
                continue
            if not _is_text(path):  # MLflow could not be told of it
                self._tell(path, NO_TEXT)
                continue
            signature, known = signature_of(path), before.get(path)
            if known is None or known.signature != signature:
                self._seen[path] = _Seen(signature, step_of(path), encoder_defect(path))
                continue
            self._seen[path] = known
            if known.step is None:
                self._tell(path, NO_STEP)
            elif known.lacks:
                self._tell(path, known.lacks)
            else:
                found[path] = known.step
        return found

    def _tell(self, path: Path, reason: str) -> None:
        if (path, reason) not in self._told:
            self._told.add((path, reason))
            log.info("%s is passed over for now: %s", _shown(path), reason)


def found_checkpoints(directory: Path) -> list[Checkpoint]:
    """The whole checkpoints that lie in a directory now, by step; no run knows of them.

    Args:
        directory: Trainer's `output_dir`, for example.

    Raises:
        UsageError: there is no such directory.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory")
    found: list[Checkpoint] = []
    for path in sorted(directory.absolute().iterdir()):
        if not path.is_dir() or path.name.startswith("."):
            continue
        step, lacks = step_of(path), encoder_defect(path)
        if step is None or lacks:
            log.info("%s is passed over: %s", path, NO_STEP if step is None else lacks)
            continue
        found.append(_unregistered(path, step))
    return sorted(found, key=lambda one: one.step)


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
    """A directory as it was at a look; what it lacks to be whole."""

    signature: tuple[tuple[str, int, int], ...]
    step: int | None
    lacks: str


def register_directory(run: TrackedRun, directory: Path, step: int) -> str:
    """Make a checkpoint of a run stand for a directory on this machine, whose files stay there.

    Of several validators that do so at the same time, one decides.

    Returns:
        The model id.
    """
    key = f"{DIRECTORY_TAG}.{digest_of(directory)}"
    known = run.fetch().data.params.get(key)
    if known is None:
        known = _registered(run, directory, step, key)
    if checkpoint_by_id(run.client, known).pending:
        link_to_run(run, known, step)
        run.client.finalize_logged_model(known, READY)
    return known


def _registered(run: TrackedRun, directory: Path, step: int, key: str) -> str:
    model_id = str(
        run.client.create_logged_model(
            run.experiment_id,
            name=f"step-{step}",
            source_run_id=run.id,
            tags={STEP_TAG: str(step), DIRECTORY_TAG: str(directory)},
            model_type=MODEL_TYPE,
        ).model_id
    )
    known = run.set_param_once(key, model_id)
    if known != model_id:
        run.client.delete_logged_model(model_id)
    return known
