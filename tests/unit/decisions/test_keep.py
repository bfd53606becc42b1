import json
from dataclasses import replace

import pytest

from mlflow_dr.decisions.keep import Own, Policy, parse_policy, select
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import Owner
from mlflow_dr.tracking.validations import Metric

MRR = Metric("val", "mrr_at_10")
ELSEWHERE = Owner("far", 7, "another boot", 1, "token")
CLAIM = {"mlflow_dr.validation.val.claim.1": json.dumps(vars(ELSEWHERE))}


def checkpoint(step: int, value: float | None = None, **more: object) -> Checkpoint:
    """Validated where it has a value."""
    record = json.dumps({"values": {MRR.key: value}})
    plain = Checkpoint(
        model_id=f"m-{step}",
        run_id="run",
        step=step,
        ready=True,
        pending=False,
        created_ms=step,
        ready_ms=step,
        location=f"/artifacts/m-{step}",
        manifest="",
        params={} if value is None else {"mlflow_dr.validation.val": record},
        tags={},
        metrics=frozenset([] if value is None else [str(MRR)]),
    )
    return replace(plain, **more)  # type: ignore[arg-type]


VALUES = {0: 0.1, 10: 0.4, 20: 0.6, 30: 0.5, 40: 0.3, 50: float("nan")}
DONE = [checkpoint(step, value) for step, value in VALUES.items()]


def said(
    checkpoints: list[Checkpoint],
    policy: str = "last:1",
    validations: tuple[str, ...] = ("val",),
    unvalidated: bool = False,
    own: Own | None = None,
    taken: dict[str, int] | None = None,
    **registered: str,
) -> dict[int, str]:
    """Step -> why it stays, or `goes: ` and why."""
    verdicts = select(
        checkpoints, parse_policy(policy), MRR, validations, registered, unvalidated, own, taken
    )
    return {one.checkpoint.step: "goes: " * one.goes + one.reason for one in verdicts}


def test_the_rules() -> None:
    assert parse_policy("best:3,last:2,every:10000") == Policy(3, 2, 10_000)
    assert parse_policy(" last:1 ") == Policy(last=1)
    assert str(parse_policy("every:5,best:1")) == "best:1,every:5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing says what to keep; rules are best:3"),
        ("worst:1", "no rule 'worst:1' of what to keep; rules are best:3"),
        ("best", "'best': expected best:N with a number from 1 on"),
        ("best:x", "'best:x': expected best:N"),
        ("last:0", "'last:0': expected last:N"),
        ("last:-1", "'last:-1': expected last:N"),
        ("best:1,best:2", "two rules 'best'"),
    ],
)
def test_rules_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_policy(text)
    assert message in str(raised.value)


def test_each_rule_says_what_it_keeps() -> None:
    policy = "best:2,last:1,every:20"
    assert said(list(reversed(DONE)), policy) == {
        0: "every 20",
        10: "goes: none of best:2,last:1,every:20",
        20: "best 1 of val/mrr_at_10, every 20",
        30: "best 2 of val/mrr_at_10",
        40: "every 20",
        50: "last",
    }


def test_of_equal_ones_the_earlier_is_the_better() -> None:
    there = [checkpoint(2, 0.5), checkpoint(1, 0.5), checkpoint(3, 0.1)]
    assert said(there, "best:1")[1] == "best 1 of val/mrr_at_10"


def test_what_is_on_its_way_stays() -> None:
    """Announced, claimed by another or by somebody who cannot be read, or found in a directory."""
    there = [
        checkpoint(1, ready=False, pending=True),
        checkpoint(2, params=CLAIM),
        checkpoint(3, params={"mlflow_dr.validation.other.claim.2": "?"}),
        checkpoint(4, 0.5, directory="/output/checkpoint-4"),
        checkpoint(5, 0.5),
        checkpoint(6, 0.5),
    ]
    assert said(there, unvalidated=True) == {
        1: "pending",
        2: "being validated by far:7",
        3: "being validated by somebody",
        4: "found in /output/checkpoint-4",
        5: "goes: none of last:1",
        6: "last",
    }


def test_claims_that_keep_nothing() -> None:
    """Given back, done, or of a process of this machine that is gone."""
    back = {"mlflow_dr.validation.val.heartbeat": "1: given back"}
    gone = json.dumps(vars(replace(Owner.me(), started=1)))
    done = checkpoint(2, 0.5)
    there = [
        checkpoint(1, params=CLAIM, tags=back),
        replace(done, params={**done.params, **CLAIM}),
        checkpoint(3, params={"mlflow_dr.validation.val.claim.1": gone}),
        checkpoint(4, 0.5),
    ]
    assert [one.startswith("goes") for one in said(there, unvalidated=True).values()] == [
        *(True, True, True),
        False,
    ]


def test_what_is_not_validated_yet_stays_unless_it_is_asked_for() -> None:
    failed = {"mlflow_dr.validation.val.failed": "NaN"}
    recorded = checkpoint(3, 0.5, metrics=frozenset())
    there = [checkpoint(1), checkpoint(2, tags=failed), recorded, checkpoint(4, 0.5)]
    assert said(there) == {
        1: "not validated yet by val",
        2: "goes: none of last:1",
        3: "not validated yet by val",
        4: "last",
    }
    assert said(there, validations=("val", "test")) == {
        1: "not validated yet by test, val",
        2: "not validated yet by test",
        3: "not validated yet by test, val",
        4: "not validated yet by test",
    }
    assert said(there, validations=())[4] == "not validated yet"
    freely = said(there, unvalidated=True)
    assert [step for step, why in freely.items() if why.startswith("goes")] == [1, 2, 3]


def test_a_validator_knows_what_it_has_still_to_do_itself() -> None:
    """Of `dear` nothing, but for what waits; of others' validations what is not done."""
    failed = {"mlflow_dr.validation.val.failed": "out of memory"}
    there = [checkpoint(1), checkpoint(2, tags=failed), checkpoint(3, 0.5), checkpoint(4, 0.5)]
    there += [checkpoint(5, tags=failed)]
    own = Own({"val": "val", "dear": "val"}, waiting={"m-2", "m-3"})
    assert said(there, validations=("val", "dear"), own=own) == {
        1: "not validated yet by dear, val",
        2: "not validated yet by dear",
        3: "not validated yet by dear",
        4: "goes: none of last:1",
        5: "last",
    }
    elsewhere = said(there, validations=("val", "dear", "other"), own=own)
    assert elsewhere[1] == "not validated yet by dear, other, val"
    assert elsewhere[4] == elsewhere[5] == "not validated yet by other"


def test_a_validation_that_takes_some_steps_only_is_waited_for_on_these_alone() -> None:
    """Of `some` each sixth step; `dear` chooses by itself."""
    there = [checkpoint(step, 0.5) for step in (5, 6, 7)]
    names, taken = ("val", "some", "dear"), {"val": 1, "some": 6, "dear": 0}
    assert said(there, validations=names, taken=taken) == {
        5: "goes: none of last:1",
        6: "not validated yet by some",
        7: "last",
    }


def test_what_the_metric_knows_nothing_of_stays() -> None:
    """One of several subsets is done of each checkpoint, and another one decides."""
    record = {"mlflow_dr.validation.small": json.dumps({"values": {}})}
    there = [checkpoint(1, params=record), checkpoint(2, 0.5, params=record), checkpoint(3, 0.5)]
    own = Own({"val": "val", "small": "small"}, waiting=())
    assert said(there, validations=("val", "small"), own=own)[1] == "not validated yet by val"
    by_small = MRR._replace(validation="small")
    (first, *_) = select(there, parse_policy("last:1"), by_small, ("val", "small"), {}, own=own)
    assert first.goes


def test_what_is_called_the_best_or_registered_stays() -> None:
    there = [
        checkpoint(1, 0.1, tags={"mlflow_dr.best.val/mrr_at_10": "0.1"}),
        checkpoint(2, 0.1),
        checkpoint(3, 0.1),
    ]
    words = said(there, **{"m-2": "registered as retriever version 3"})
    assert words == {
        1: "called the best by val/mrr_at_10",
        2: "registered as retriever version 3",
        3: "last",
    }


def test_what_was_removed_is_not_counted_and_what_was_begun_is_finished() -> None:
    there = [
        checkpoint(1, 0.1),
        checkpoint(2, 0.9, tags={"mlflow_dr.pruned": "begun"}),
        checkpoint(3, 0.9, tags={"mlflow_dr.pruned": "2026-11-21T20:30:00+00:00"}),
        checkpoint(4, ready=False),
    ]
    assert said(there, "best:1,last:1") == {
        1: "best 1 of val/mrr_at_10, last",
        2: "goes: begun before",
        4: "goes: never published whole",
    }
