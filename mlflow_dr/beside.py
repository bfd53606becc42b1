"""What is done beside something else: writing figures while the next are computed, say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Beside(Generic[Result]):
    """Does something in a thread of its own, which does not hold up the end of the process.

    Args:
        act: what is done.
        name: of the thread.
    """

    def __init__(self, act: Callable[[], Result], name: str) -> None:
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()  # a join that was interrupted takes the thread for ended
        threading.Thread(target=self._run, args=(act,), name=name, daemon=True).start()

    def wait(self, seconds: float | None = None) -> Result | None:
        """Until it is done, or for so many seconds.

        Returns:
            What came of it; None where it was not done in time.

        Raises:
            Exception: whatever it has raised, once.
        """
        self._done.wait(seconds)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result

    def _run(self, act: Callable[[], Result]) -> None:
        try:
            self._result = act()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._error = error
        finally:
            self._done.set()
