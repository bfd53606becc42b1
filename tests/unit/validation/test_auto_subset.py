"""Which subset `--keep-up` chooses."""

from types import SimpleNamespace

import pytest

from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.policies import (
    AutoSubset,
    Speed,
    largest_that_keeps_up,
    publishing_interval,
)

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
def test_the_largest_subset_that_keeps_up_is_chosen(
    interval: float, validators: int, expected: str
) -> None:
    subset, _ = largest_that_keeps_up(SIZES, SPEED, interval, validators)
    assert subset == expected


def test_the_reason_names_the_subset_the_interval_and_the_seconds() -> None:
    assert largest_that_keeps_up(SIZES, SPEED, 60.0)[1] == (
        "middle keeps up with a checkpoint every 60.0 s: 12.0 s a checkpoint for 10000 passages"
    )
    assert "too slow for a checkpoint every 1.0 s" in largest_that_keeps_up(SIZES, SPEED, 1.0)[1]


def test_the_interval_is_the_median_of_at_least_three() -> None:
    assert publishing_interval([1_000, 9_000]) is None
    assert publishing_interval([100_000, 0, 10_000, 21_000]) == 11.0


def test_the_largest_subset_is_chosen_for_a_finished_run(run: TrackedRun) -> None:
    config = ValidateConfig(subset=["random:5", "random:10"], keep_up=True)
    sizes = {"val-random_5": 5, "val-random_10": 10}
    validations = [
        SimpleNamespace(name=name, data=SimpleNamespace(n_passages=size))
        for name, size in sizes.items()
    ]
    assert AutoSubset(config).names(run, validations, [], 1) == ["val-random_5"]
    assert AutoSubset(config).names(run, validations, [], 1, is_over=True) == ["val-random_10"]
