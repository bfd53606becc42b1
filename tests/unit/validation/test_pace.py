"""Which subset there is the time for."""

import pytest

from mlflow_dr.validation.pace import Speed, largest_that_keeps_up, publishing_interval

SIZES = {"small": 1_000, "middle": 10_000, "large": 100_000}
SPEED = Speed(passages_per_second=1_000.0, overhead=2.0)


@pytest.mark.parametrize(
    ("interval", "validators", "expected"),
    [
        (60.0, 1, "middle"),
        (12.0, 1, "middle"),
        (11.9, 1, "small"),
        (51.0, 2, "large"),
        (102.0, 1, "large"),
        (1.0, 1, "small"),
    ],
)
def test_the_largest_that_keeps_up(interval: float, validators: int, expected: str) -> None:
    chosen = largest_that_keeps_up(SIZES, SPEED, interval, validators)
    assert chosen.subset == expected


def test_the_choice_is_said_in_words() -> None:
    assert largest_that_keeps_up(SIZES, SPEED, 60.0).why == (
        "middle keeps up with a checkpoint every 60.0 s: 12.0 s a checkpoint for 10000 passages"
    )
    assert "too slow for a checkpoint every 1.0 s" in largest_that_keeps_up(SIZES, SPEED, 1.0).why


def test_the_interval_is_the_median_and_known_after_three() -> None:
    assert publishing_interval([1_000, 9_000]) is None
    assert publishing_interval([100_000, 0, 10_000, 21_000]) == 11.0
