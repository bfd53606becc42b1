"""Recording what was found while the next checkpoint is evaluated already."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mlflow_dr.tracking.results import State
from mlflow_dr.validation.jobs import Found, Job


class Writing:
    """Writes from a thread of its own, which does not hold up the end of the process.

    Args:
        found: what is written.
        write: does it.

    Attributes:
        job: whose figures they are.
        states: what has become of each validation; nothing before the end.
    """

    def __init__(self, found: Found, write: Callable[[Found], dict[str, State]]) -> None:
        self.job: Job = found.job
        self.states: dict[str, State] = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(found, write), name="writing", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Until everything is written, or for so many seconds.

        Raises:
            Exception: whatever writing has raised.
        """
        self._thread.join(seconds)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, found: Found, write: Callable[[Found], dict[str, State]]) -> None:
        try:
            self.states = write(found)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
