import json
from dataclasses import replace

import pytest

from mlflow_dr.decisions.pruning import KeepRules, ValidatorScope, parse_keep_rules, select
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


def decided(
    checkpoints: list[Checkpoint],
    rules: str = "last:1",
    validations: tuple[str, ...] = ("val",),
    unvalidated: bool = False,
    scope: ValidatorScope | None = None,
    steps: dict[str, int] | None = None,
    **registered: str,
) -> dict[int, str]:
    """Step -> why it is kept, or `delete: ` and why."""
    taken = {name: (steps or {}).get(name, 1) for name in validations}
    verdicts = select(
        checkpoints, parse_keep_rules(rules), MRR, taken, registered, unvalidated, scope
    )
    return {
        verdict.checkpoint.step: "delete: " * verdict.deletes + verdict.reason
        for verdict in verdicts
    }


def test_the_rules() -> None:
    assert parse_keep_rules("best:3,last:2,every:10000") == KeepRules(3, 2, 10_000)
    assert parse_keep_rules(" last:1 ") == KeepRules(last=1)
    assert str(parse_keep_rules("every:5,best:1")) == "best:1,every:5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule says what to keep; write rules such as best:3"),
        ("worst:1", "unknown rule 'worst:1'; write rules such as best:3"),
        ("best", "'best': expected best:N with a number N from 1 on"),
        ("best:x", "'best:x': expected best:N"),
        ("last:0", "'last:0': expected last:N"),
        ("last:-1", "'last:-1': expected last:N"),
        ("best:1,best:2", "rule 'best' is given twice"),
    ],
)
def test_wrong_rules(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_keep_rules(text)
    assert message in str(raised.value)


def test_each_rule_says_what_it_keeps() -> None:
    policy = "best:2,last:1,every:20"
    assert decided(list(reversed(DONE)), policy) == {
        0: "every 20",
        10: "delete: no rule of best:2,last:1,every:20 keeps it",
        20: "best 1 of val/mrr_at_10, every 20",
        30: "best 2 of val/mrr_at_10",
        40: "every 20",
        50: "last",
    }


def test_the_earlier_of_two_equal_checkpoints_is_kept() -> None:
    checkpoints = [checkpoint(2, 0.5), checkpoint(1, 0.5), checkpoint(3, 0.1)]
    assert decided(checkpoints, "best:1")[1] == "best 1 of val/mrr_at_10"


def test_checkpoints_in_use_are_kept() -> None:
    """Announced, claimed by another, claimed by an unreadable owner, or found in a directory."""
    checkpoints = [
        checkpoint(1, ready=False, pending=True),
        checkpoint(2, params=CLAIM),
        checkpoint(3, params={"mlflow_dr.validation.other.claim.2": "?"}),
        checkpoint(4, 0.5, directory="/output/checkpoint-4"),
        checkpoint(5, 0.5),
        checkpoint(6, 0.5),
    ]
    assert decided(checkpoints, unvalidated=True) == {
        1: "pending",
        2: "being validated by far:7",
        3: "being validated by an unknown validator",
        4: "found in /output/checkpoint-4",
        5: "delete: no rule of last:1 keeps it",
        6: "last",
    }


def test_finished_claims_protect_no_checkpoint() -> None:
    """Given back, done, or made by a process of this machine that has ended."""
    back = {"mlflow_dr.validation.val.heartbeat": "1: given back"}
    gone = json.dumps(vars(replace(Owner.me(), started=1)))
    done = checkpoint(2, 0.5)
    checkpoints = [
        checkpoint(1, params=CLAIM, tags=back),
        replace(done, params={**done.params, **CLAIM}),
        checkpoint(3, params={"mlflow_dr.validation.val.claim.1": gone}),
        checkpoint(4, 0.5),
    ]
    assert [
        decision.startswith("delete")
        for decision in decided(checkpoints, unvalidated=True).values()
    ] == [
        *(True, True, True),
        False,
    ]


def test_unvalidated_checkpoints_are_kept_by_default() -> None:
    failed = {"mlflow_dr.validation.val.failed": "NaN"}
    recorded = checkpoint(3, 0.5, metrics=frozenset())
    checkpoints = [checkpoint(1), checkpoint(2, tags=failed), recorded, checkpoint(4, 0.5)]
    assert decided(checkpoints) == {
        1: "not validated yet by val",
        2: "delete: no rule of last:1 keeps it",
        3: "not validated yet by val",
        4: "last",
    }
    assert decided(checkpoints, validations=("val", "test")) == {
        1: "not validated yet by test, val",
        2: "not validated yet by test",
        3: "not validated yet by test, val",
        4: "not validated yet by test",
    }
    assert decided(checkpoints, validations=())[4] == "not validated yet"
    freely = decided(checkpoints, unvalidated=True)
    assert [step for step, why in freely.items() if why.startswith("delete")] == [1, 2, 3]


def test_a_validator_waits_for_its_own_open_validations() -> None:
    """`dear` keeps only waiting checkpoints.

    Others' validations keep all they have not finished.
    """
    failed = {"mlflow_dr.validation.val.failed": "out of memory"}
    checkpoints = [
        checkpoint(1),
        checkpoint(2, tags=failed),
        checkpoint(3, 0.5),
        checkpoint(4, 0.5),
    ]
    checkpoints += [checkpoint(5, tags=failed)]
    scope = ValidatorScope({"val": "val", "dear": "val"}, waiting={"m-2", "m-3"})
    assert decided(checkpoints, validations=("val", "dear"), scope=scope) == {
        1: "not validated yet by dear, val",
        2: "not validated yet by dear",
        3: "not validated yet by dear",
        4: "delete: no rule of last:1 keeps it",
        5: "last",
    }
    elsewhere = decided(checkpoints, validations=("val", "dear", "other"), scope=scope)
    assert elsewhere[1] == "not validated yet by dear, other, val"
    assert elsewhere[4] == elsewhere[5] == "not validated yet by other"


def test_a_validation_of_some_steps_keeps_only_these_checkpoints() -> None:
    """`some` takes each sixth step; `dear` chooses its checkpoints itself."""
    checkpoints = [checkpoint(step, 0.5) for step in (5, 6, 7)]
    names, steps = ("val", "some", "dear"), {"val": 1, "some": 6, "dear": 0}
    assert decided(checkpoints, validations=names, steps=steps) == {
        5: "delete: no rule of last:1 keeps it",
        6: "not validated yet by some",
        7: "last",
    }


def test_checkpoints_without_the_deciding_validation_are_kept() -> None:
    """Each checkpoint is validated on one of several subsets, and another one decides."""
    record = {"mlflow_dr.validation.small": json.dumps({"values": {}})}
    checkpoints = [
        checkpoint(1, params=record),
        checkpoint(2, 0.5, params=record),
        checkpoint(3, 0.5),
    ]
    scope = ValidatorScope({"val": "val", "small": "small"}, waiting=())
    assert (
        decided(checkpoints, validations=("val", "small"), scope=scope)[1]
        == "not validated yet by val"
    )
    by_small = MRR._replace(validation="small")
    (first, *_) = select(
        checkpoints, parse_keep_rules("last:1"), by_small, {"val": 1, "small": 1}, scope=scope
    )
    assert first.deletes


def test_best_and_registered_checkpoints_are_kept() -> None:
    checkpoints = [
        checkpoint(1, 0.1, tags={"mlflow_dr.best.val/mrr_at_10": "0.1"}),
        checkpoint(2, 0.1),
        checkpoint(3, 0.1),
    ]
    decisions = decided(checkpoints, **{"m-2": "registered as retriever version 3"})
    assert decisions == {
        1: "tagged as best by val/mrr_at_10",
        2: "registered as retriever version 3",
        3: "last",
    }


def test_deleted_checkpoints_are_not_counted_and_interrupted_deletions_are_finished() -> None:
    checkpoints = [
        checkpoint(1, 0.1),
        checkpoint(2, 0.9, tags={"mlflow_dr.pruned": "begun"}),
        checkpoint(3, 0.9, tags={"mlflow_dr.pruned": "2026-11-21T20:30:00+00:00"}),
        checkpoint(4, ready=False),
    ]
    assert decided(checkpoints, "best:1,last:1") == {
        1: "best 1 of val/mrr_at_10, last",
        2: "delete: its deletion was interrupted",
        4: "delete: its upload was never completed",
    }
