from itertools import pairwise

import pytest

from mlflow_dr.validation.order import Order, in_order


@pytest.mark.parametrize(
    ("order", "taken", "expected"),
    [
        (Order.OLDEST, [], [10, 20, 30]),
        (Order.NEWEST, [40], [30, 20, 10]),
        (Order.BISECT, [], [30, 10, 20]),
        (Order.BISECT, [0, 40], [20, 30, 10]),
        (Order.BISECT, [15], [30, 20, 10]),
    ],
)
def test_what_comes_first(order: Order, taken: list[int], expected: list[int]) -> None:
    assert list(in_order([10, 20, 30], taken, order)) == expected


def test_a_validator_that_cannot_keep_up_covers_the_run_evenly() -> None:
    """Three checkpoints are published for each that is validated: of 300 steps, 100 are done."""
    published: list[int] = []
    taken: list[int] = []
    for step in range(0, 300, 3):
        published += [step, step + 1, step + 2]
        waiting = sorted(set(published) - set(taken))
        taken.append(next(in_order(waiting, sorted(taken), Order.BISECT)))
    taken.sort()
    gaps = [after - before for before, after in pairwise(taken)]
    assert max(gaps) <= 8
    assert taken[0] <= 8
    assert taken[-1] >= 291


def test_nothing_waits() -> None:
    for order in Order:
        assert list(in_order([], [1], order)) == []
