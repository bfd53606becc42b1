"""Models of checkpoints in memory: the one at hand, and the next one where there is room for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mlflow_dr.background import BackgroundTask
from mlflow_dr.errors import UnavailableError, one_line
from mlflow_dr.process_tree import available_memory
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.prefetch import CheckpointFiles, CheckpointPrefetch

log = logging.getLogger(__name__)

Load = Callable[[Checkpoint, CheckpointFiles], Any]
TIMES_AVAILABLE = 4
"""Memory that has to be available, in sizes of a model's files, which may be in half precision."""


class ModelLoader:
    """Fetches and loads models, the next one in the background while another one is evaluated.

    Errors in the background are not reported: the model is then loaded again when it is needed.

    Args:
        load: loads a model from the files of a checkpoint.
        keeps_model: whether the model of a checkpoint is needed several times in a row.
    """

    def __init__(self, load: Load, keeps_model: bool) -> None:
        self._load, self._keeps_model = load, keeps_model
        self._prefetch = CheckpointPrefetch()
        self._size = 0  # bytes of the files of the largest model so far
        self._kept: tuple[str, Any] | None = None
        self._early: _EarlyLoad | None = None

    @property
    def ready_ids(self) -> list[str]:
        """The checkpoint that is kept, and the one that is or was fetched or loaded early."""
        kept = "" if self._kept is None else self._kept[0]
        return [kept, self._prefetch.model_id if self._early is None else self._early.model_id]

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to fetch a checkpoint, and to load it where there is memory; one at a time."""
        if self._early is not None:
            return
        self._prefetch.begin(checkpoint)
        may_load = self._size > 0 and not checkpoint.is_pruned
        if may_load and available_memory() >= TIMES_AVAILABLE * self._size:
            self._early = _EarlyLoad(self._load, checkpoint, self._measured_files)

    def model(self, checkpoint: Checkpoint) -> Any:
        """The model of a checkpoint; waits for it if it is being loaded.

        Raises:
            Exception: as `load` does.
        """
        if self._kept is not None and self._kept[0] == checkpoint.model_id:
            return self._kept[1]
        self._kept = None  # before another one takes memory
        model = self._early_model(checkpoint)
        if model is None:
            model = self._load(checkpoint, self._measured_files)
        if self._keeps_model:
            self._kept = checkpoint.model_id, model
        return model

    def forget(self) -> None:
        """Forget the models. What is being loaded is waited for, but nothing that is fetched."""
        self._kept = None
        if self._early is not None:
            self._early.cancel()
            self._early = None

    def close(self) -> None:
        """Forget models and files."""
        self.forget()
        self._prefetch.close()

    def _early_model(self, checkpoint: Checkpoint) -> Any:
        """What was loaded early, if it is this checkpoint."""
        if self._early is None or self._early.model_id != checkpoint.model_id:
            self.forget()
            return None
        try:
            model = self._early.task.wait()
        except Exception as error:  # noqa: BLE001 - loading it again reports it
            log.debug("step %d was not loaded early: %s", checkpoint.step, one_line(error))
            model = None
        self._early = None  # not if the wait was interrupted: the thread may still load
        return model

    @contextmanager
    def _measured_files(self, checkpoint: Checkpoint) -> Iterator[Path]:
        with self._prefetch.files(checkpoint) as directory:
            files = (path for path in directory.rglob("*") if path.is_file())
            self._size = max(self._size, sum(path.stat().st_size for path in files))
            yield directory


class _EarlyLoad:
    """A model that a thread loads.

    Attributes:
        model_id: of the checkpoint.
        task: gives the model.
    """

    def __init__(self, load: Load, checkpoint: Checkpoint, files: CheckpointFiles) -> None:
        self.model_id, self._files = checkpoint.model_id, files
        self._is_loading, self._is_cancelled = threading.Event(), threading.Event()
        self.task = BackgroundTask(partial(load, checkpoint, self._fetched), "loading")

    def cancel(self) -> None:
        """Have nothing loaded, or wait for what is being loaded, as it cannot be interrupted.

        Python would end by an abort while a thread is amid PyTorch's own code.
        """
        self._is_cancelled.set()
        if self._is_loading.is_set():
            with suppress(Exception):
                self.task.wait()

    @contextmanager
    def _fetched(self, checkpoint: Checkpoint) -> Iterator[Path]:
        with self._files(checkpoint) as directory:
            self._is_loading.set()
            if self._is_cancelled.is_set():
                raise UnavailableError(f"step {checkpoint.step} is not needed")
            yield directory
