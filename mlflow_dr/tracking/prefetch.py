"""The files of the checkpoint that is likely to be next, fetched while another one is evaluated."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from mlflow_dr.background import BackgroundTask
from mlflow_dr.errors import one_line
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.fetching import checkpoint_files, local_directory

log = logging.getLogger(__name__)

SECONDS_TO_REMOVE = 2.0  # files, until a thread is left alone with it

CheckpointFiles = Callable[[Checkpoint], AbstractContextManager[Path]]
"""A local directory with a checkpoint's verified files inside a `with` block; raises as
`checkpoint_files` does."""


class CheckpointPrefetch:
    """Fetches one checkpoint at a time in the background, and keeps its files until they are used.

    An error is not reported here: who needs the files then fetches them, and reports it.
    """

    def __init__(self) -> None:
        self._fetch: _Fetch | None = None

    @property
    def model_id(self) -> str:
        """Of the checkpoint that is or was fetched; empty if there is none."""
        return "" if self._fetch is None else self._fetch.model_id

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to fetch a checkpoint, in place of one that was fetched and not used.

        Nothing is done if its files are on this machine, or while another one is being fetched.
        """
        if checkpoint.directory or checkpoint.is_pruned or local_directory(checkpoint.location):
            return
        if self._fetch is not None:
            if self._fetch.model_id == checkpoint.model_id or not self._fetch.is_over:
                return
            self._fetch.remove()
        self._fetch = _Fetch(checkpoint)

    @contextmanager
    def files(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """See `CheckpointFiles`; waits for them if they are being fetched."""
        fetch = self._fetch
        if fetch is not None and fetch.model_id == checkpoint.model_id:
            self._fetch = None
            try:
                directory = fetch.wait()
                if directory is not None:
                    yield directory
                    return
            finally:
                fetch.remove()
        with checkpoint_files(checkpoint) as directory:
            yield directory

    def close(self) -> None:
        """Remove what was fetched and not used. What is being fetched is not waited for."""
        if self._fetch is not None:
            self._fetch.remove()
            self._fetch = None


class _Fetch:
    """A checkpoint's files, fetched and at last removed by a thread.

    Attributes:
        model_id: of the checkpoint.
        task: ends when the files are removed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model_id = checkpoint.model_id
        self._directory: Path | None = None
        self._is_over, self._is_released = threading.Event(), threading.Event()
        self.task = BackgroundTask(partial(self._hold, checkpoint), "prefetch")

    @property
    def is_over(self) -> bool:
        """Whether the files are there, or cannot be fetched."""
        return self._is_over.is_set()

    def wait(self) -> Path | None:
        """The directory of the files; None if they cannot be fetched."""
        self._is_over.wait()
        return self._directory

    def remove(self) -> None:
        """Remove the files; while they are being fetched, this is left to the thread."""
        self._is_released.set()
        if self.is_over:
            self.task.wait(SECONDS_TO_REMOVE)

    def _hold(self, checkpoint: Checkpoint) -> None:
        try:
            with checkpoint_files(checkpoint) as directory:
                self._directory = directory
                self._is_over.set()
                self._is_released.wait()
        except Exception as error:  # noqa: BLE001 - the next fetch reports it
            log.debug("step %d was not fetched ahead: %s", checkpoint.step, one_line(error))
        finally:
            self._is_over.set()
