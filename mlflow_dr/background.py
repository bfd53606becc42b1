"""Work in the background: threads, such as one that writes figures, and processes."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class BackgroundTask(Generic[Result]):
    """A function that runs in a thread of its own, which does not delay the end of the process.

    Args:
        act: the function; it starts at once.
        name: the thread's name.
    """

    def __init__(self, act: Callable[[], Result], name: str) -> None:
        self._result: Result | None = None
        self._error: BaseException | None = None
        # not Thread.join: after an interrupted join Python takes the thread for ended
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(act,), name=name, daemon=True).start()

    def wait(self, seconds: float | None = None) -> Result | None:
        """Wait until the function has returned, or for at most so many seconds.

        Returns:
            The function's result; None if it has not returned in time.

        Raises:
            Exception: the function's own error, the first time that `wait` is called.
        """
        self._done.wait(seconds)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._result

    @property
    def is_done(self) -> bool:
        """Whether the function has ended."""
        return self._done.is_set()

    def _run(self, act: Callable[[], Result]) -> None:
        try:
            self._result = act()
        except BaseException as error:  # noqa: BLE001 - raised again by wait
            self._error = error
        finally:
            self._done.set()


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], n_ahead: int = 2
) -> Iterator[tuple[Item, Callable[[], Result]]]:
    """Call a function for each item in a thread, a few items before they are used.

    Yields:
        The item, and what waits for the function's result or raises its error.
    """
    executor = ThreadPoolExecutor(1, "ahead")
    begun: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            begun.append((item, executor.submit(function, item)))
            if len(begun) > n_ahead:
                first, result = begun.popleft()
                yield first, result.result
        for first, result in begun:
            yield first, result.result
    except BaseException:
        executor.shutdown(cancel_futures=True)
        raise
    executor.shutdown()


@contextmanager
def main_module_hidden() -> Iterator[None]:
    """Keep processes that start meanwhile from running the user's script.

    A script without `if __name__ == "__main__"` would train in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
