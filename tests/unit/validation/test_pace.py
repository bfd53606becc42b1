"""Which subset there is the time for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.pace import Pacer, Speed, largest_that_keeps_up, publishing_interval
from mlflow_dr.validation.plan import Plan, Validation

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


def test_of_a_run_that_has_ended_the_largest_is_taken(run: TrackedRun) -> None:
    settings = Settings(parse_measures("mrr@10"))
    pair = [Validation(settings, "a", subset=parse_subset(f"random:{n}")) for n in (5, 10)]
    pair[1] = replace(pair[1], name="b")
    plan = Plan(tuple(pair), keep_up=True)
    sizes = {"a": 5, "b": 10}
    bound = [
        SimpleNamespace(name=name, prepared=SimpleNamespace(n_passages=size))
        for name, size in sizes.items()
    ]
    assert Pacer(plan).names(run, bound, [], None, 1) == ["a"]
    assert Pacer(plan).names(run, bound, [], None, 1, over=True) == ["b"]
