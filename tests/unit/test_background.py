"""Work in the background: what is computed ahead comes in order, with its errors."""

import threading
from collections.abc import Iterator

import pytest

from mlflow_dr.background import ahead


def test_results_come_in_order_and_few_are_begun_ahead() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            begun.append(number)
            yield number

    for number, (item, result) in enumerate(ahead(lambda item: item * item, items())):
        assert (item, result()) == (number, number * number)
        assert len(begun) == min(10, number + 3)


def test_no_items_are_no_results() -> None:
    assert list(ahead(str, [])) == []


def test_an_error_is_raised_where_the_result_is_asked_for() -> None:
    results = [result for _, result in ahead(lambda item: 1 // item, [1, 0, 2])]
    assert (results[0](), results[2]()) == (1, 0)
    with pytest.raises(ZeroDivisionError):
        results[1]()


def test_an_error_of_the_items_is_raised_after_what_was_before_it() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2, 3)
        raise OSError("the disk is gone")

    seen: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        for item, _ in ahead(str, items()):
            seen.append(item)
    assert seen == [1]


def test_the_thread_ends_if_the_loop_stops_early() -> None:
    before = threading.active_count()
    for item, _ in ahead(str, range(100)):
        if item == 3:
            break
    assert threading.active_count() == before
