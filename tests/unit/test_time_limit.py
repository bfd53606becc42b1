"""A limit that ends work in the middle."""

import signal
import threading
from collections.abc import Iterator

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.time_limit import TimeIsUp, TimeLimit


@pytest.fixture
def other_timer() -> Iterator[list[int]]:
    """Somebody else's timer, and the signals that it has sent."""
    sent: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _: sent.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 10_000)
    yield sent
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def forever() -> None:
    while True:
        pass


def test_work_is_stopped_in_the_middle() -> None:
    with pytest.raises(TimeIsUp), TimeLimit(0.01):
        forever()


def test_handlers_of_errors_do_not_catch_it() -> None:
    with pytest.raises(TimeIsUp), TimeLimit(0.01):
        try:
            forever()
        except Exception:  # noqa: BLE001 - as libraries do
            pytest.fail("it was caught")


def test_all_blocks_count_together() -> None:
    limit = TimeLimit(0.05)
    with pytest.raises(TimeIsUp):
        while True:
            with limit:
                sum(range(1000))
    with pytest.raises(TimeIsUp), limit:
        pytest.fail("nothing is left")


def test_nothing_is_left_behind_when_the_time_is_up_as_a_block_begins_or_ends() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for _ in range(100):
        limit = TimeLimit(0.002)
        with pytest.raises(TimeIsUp):
            while True:
                with limit:
                    sum(range(10))
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL)[1] == 0
        with pytest.raises(TimeIsUp), limit:
            pytest.fail("nothing is left")


def test_what_is_between_blocks_is_not_stopped(other_timer: list[int]) -> None:
    limit = TimeLimit(1000)
    with limit:
        pass
    signal.raise_signal(signal.SIGALRM)
    assert other_timer == [signal.SIGALRM]
    with pytest.raises(TimeIsUp), limit:
        signal.raise_signal(signal.SIGALRM)  # as if the time were up


@pytest.mark.parametrize("seconds", [None, 1000])
def test_a_timer_of_somebody_else_goes_on(other_timer: list[int], seconds: float | None) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with TimeLimit(seconds):
        assert (signal.getsignal(signal.SIGALRM) is handler) == (seconds is None)
    assert signal.getsignal(signal.SIGALRM) is handler
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 5000 < left <= 10_000
    assert interval == 0


def test_a_timer_of_somebody_else_that_became_due_comes_after_the_block(
    other_timer: list[int],
) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    with pytest.raises(TimeIsUp), TimeLimit(0.01):
        forever()
    while not other_timer:
        pass


def test_other_threads_cannot_have_a_limit() -> None:
    raised: list[Exception] = []

    def make() -> None:
        try:
            TimeLimit(None)
            TimeLimit(1)
        except UsageError as error:
            raised.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
