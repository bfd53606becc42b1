"""The rule that makes negatives of a ranking."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.mining.rule import (
    HOLDS_ANSWER,
    OUT_OF_RANGE,
    POSITIVE_OR_SAME,
    TOO_CLOSE,
    Rule,
    choose,
)

ROWS = [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]
SCORES = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, -0.5]


def chosen(
    rule: Rule,
    positive: float = 0.9,
    excluded: Collection[int] = (),
    answers: Collection[int] = (),
    query_id: str = "q",
    left_out: Counter[str] | None = None,
) -> list[int]:
    return choose(
        rule,
        query_id,
        ROWS,
        SCORES,
        [row in excluded for row in ROWS],
        positive,
        lambda row: row in answers,
        Counter() if left_out is None else left_out,
    )


def rule(negatives: int = 10, depth: int = 10, **others: Any) -> Rule:
    return Rule(negatives, max(depth, negatives + others.get("range_min", 0)), **others)


def test_the_best_come_first_up_to_the_requested_number() -> None:
    assert chosen(rule(4)) == [0, 1, 2, 3]
    assert chosen(rule(40)) == list(range(10))


def test_excluded_passages_do_not_count_as_ranks() -> None:
    assert chosen(rule(4), excluded={50, 52}) == [1, 3, 4, 5]
    assert chosen(rule(3, range_min=2), excluded={50, 52}) == [4, 5, 6]
    assert chosen(Rule(3, 3), excluded={50, 52}) == [1, 3, 4]
    assert chosen(Rule(2, 5, range_min=3), excluded={50}) == [4, 5]


@pytest.mark.parametrize(
    ("others", "positive", "expected"),
    [
        # at least so much below: a score on the border is a negative
        ({"margin": 0.0}, 0.9, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"margin": 0.25}, 1.05, [4, 5, 6, 7, 8, 9]),
        ({"margin": -0.1}, 0.85, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"relative_margin": 0.0}, 0.9, [2, 3, 4, 5, 6, 7, 8, 9]),
        ({"relative_margin": 0.5}, 1.0, [7, 8, 9]),
        # below 0 too, a share of the size is taken off
        ({"relative_margin": 0.5}, -0.3, [9]),
        ({"relative_margin": 0.5}, -0.4, []),
        ({"relative_margin": 0.05}, 1e9, list(range(10))),
        ({"margin": 0.1, "relative_margin": 0.5}, 1.0, [7, 8, 9]),
        ({"margin": 0.6, "relative_margin": 0.05}, 1.0, [8, 9]),
        ({"max_score": 0.6}, 0.9, [6, 7, 8, 9]),
        ({"min_score": 0.9}, 0.9, [0, 1, 2]),
        ({"min_score": 0.5, "max_score": 0.7}, 0.9, [5, 6, 7]),
        ({"margin": 9.0}, 0.9, []),
    ],
)
def test_scores_that_a_negative_may_have(
    others: dict[str, float], positive: float, expected: list[int]
) -> None:
    assert chosen(rule(**others), positive) == expected


def test_passages_below_the_depth_are_ignored() -> None:
    assert chosen(Rule(2, 4, max_score=0.9)) == [2, 3]
    assert chosen(Rule(2, 4, max_score=0.85)) == [3]
    assert chosen(Rule(2, 4, max_score=0.85), excluded={50, 51}) == [3, 4]


def test_ranks_are_skipped_before_scores_are_compared() -> None:
    assert chosen(rule(3, range_min=2, max_score=0.9)) == [2, 3, 4]


def test_passages_with_an_answer_are_replaced_by_others() -> None:
    assert chosen(rule(3), answers={50, 52}) == [1, 3, 4]
    assert chosen(rule(3), answers=ROWS) == []


def test_each_query_has_its_own_random_sample() -> None:
    some = rule(4, sample="random", seed=3)
    assert chosen(some) == chosen(some) == sorted(set(chosen(some)))
    assert len(chosen(some)) == 4
    samples = {tuple(chosen(some, query_id=str(number))) for number in range(50)}
    assert len(samples) > 40
    assert chosen(rule(4, sample="random", seed=4)) != chosen(some)


def test_a_random_sample_is_drawn_from_all_possible_negatives() -> None:
    some = rule(3, sample="random", range_min=1, max_score=0.9)
    counts: Counter[int] = Counter()
    for number in range(3000):
        counts.update(chosen(some, query_id=str(number), excluded={51}, answers={53, 58}))
    # the first rank is skipped, and 51, 53 and 58 are no candidates: 52, 54, 55, 56, 57 and 59
    assert sorted(counts) == [2, 4, 5, 6, 7, 9]
    for number in counts.values():  # each in half of the samples
        assert abs(number - 1500) < 150


def test_all_candidates_are_taken_when_too_few_are_left() -> None:
    assert chosen(rule(9, sample="random", min_score=0.9)) == [0, 1, 2]


def test_excluded_passages_are_counted_by_reason() -> None:
    left_out: Counter[str] = Counter()
    chosen(
        rule(3, margin=0.05, min_score=-0.1),
        excluded={50, 59},
        answers={53, 54, 58},
        left_out=left_out,
    )
    # 58 is not asked for an answer any more: three negatives are found before it
    assert left_out == {POSITIVE_OR_SAME: 2, TOO_CLOSE: 2, HOLDS_ANSWER: 2}
    chosen(rule(9, min_score=0.75), left_out=left_out)
    assert left_out[OUT_OF_RANGE] == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 20}, "30 negatives from ranks 0 to 20: there are 20"),
        ({"range_min": 71}, "30 negatives from ranks 71 to 100: there are 29"),
        ({"range_min": 200}, "there are 0"),
        ({"negatives": 0}, "at least 1"),
        ({"range_min": -1}, "at least 0"),
        ({"sample": "best"}, "sample 'best': expected top or random"),
        ({"margin": float("nan")}, "margin nan: expected a number"),
        ({"max_score": float("inf")}, "max_score inf: expected a number"),
        ({"relative_margin": 1.5}, "relative_margin 1.5: expected 0 to 1"),
        ({"relative_margin": -0.1}, "relative_margin -0.1: expected 0 to 1"),
        ({"min_score": 2.0, "max_score": 1.0}, "min_score 2.0 is above max_score 1.0"),
    ],
)
def test_contradictory_rules_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rule(**wrong)


def test_rules_at_their_limits_are_accepted() -> None:
    assert Rule(30, 100, 70).negatives == 30
    assert Rule(min_score=1.0, max_score=1.0).min_score == 1.0
