"""Which checkpoint comes next, beside others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import Owner
from mlflow_dr.tracking.following import Snapshot
from mlflow_dr.tracking.results import State
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.scheduler import Scheduler, in_order

OWNER = Owner("elsewhere", 7, "another boot", 1, "token")


def checkpoint(
    step: int, params: Mapping[str, str] | None = None, run_id: str = "run", **more: object
) -> Checkpoint:
    plain = Checkpoint(
        model_id=f"{run_id}-{step}",
        run_id=run_id,
        step=step,
        ready=True,
        pending=False,
        created_ms=step,
        ready_ms=1000 * step,
        location="",
        manifest="",
        params=params or {},
        tags={},
        metrics=frozenset(),
    )
    return replace(plain, **more)  # type: ignore[arg-type]


def claimed(step: int, token: str) -> Checkpoint:
    owner = json.dumps(vars(replace(OWNER, token=token)))
    return checkpoint(step, {"mlflow_dr.validation.val.claim.1": owner})


def scheduler(token: str = "a", now_ms: int = 0, **fields: Any) -> Scheduler:
    return Scheduler(ValidateConfig(**fields), token, lambda: now_ms)


def seen(scheduler: Scheduler, checkpoints: Sequence[Checkpoint]) -> list[int]:
    """The steps that are tried if no claim is won."""
    scheduler.see(Snapshot(list(checkpoints), over=False))
    return [candidate.step for candidate, _ in scheduler.candidates()]


def test_a_single_validator_keeps_the_order() -> None:
    checkpoints = [checkpoint(step) for step in range(40)]
    assert seen(scheduler(), checkpoints) == list(range(40))
    assert seen(scheduler(order="newest"), checkpoints) == list(reversed(range(40)))


def test_one_of_several_validators_starts_among_the_next_few() -> None:
    tokens = [f"token {number}" for number in range(8)]
    claimed_ones = [claimed(step, token) for step, token in enumerate(tokens)]
    checkpoints = [*claimed_ones, *(checkpoint(step) for step in range(8, 100))]
    schedulers = [scheduler(token) for token in tokens]
    orders = [seen(each, checkpoints) for each in schedulers]
    assert {each.validators for each in schedulers} == {8}
    firsts = {order[0] for order in orders}
    assert len(firsts) > 2
    assert max(firsts) < 8 + 2 * 8
    for order in orders:
        assert sorted(order) == list(range(8, 100))


def test_finished_or_released_claims_are_not_active_validators() -> None:
    given_back = {"mlflow_dr.validation.val.heartbeat": "1: given back"}
    checkpoints = [replace(claimed(1, "b"), tags=given_back), claimed(2, "c"), checkpoint(3)]
    queue = scheduler("a")
    seen(queue, checkpoints)
    assert queue.validators == 2


@pytest.mark.parametrize(("seconds", "losses"), [(0.0, 2), (0.1, 2), (0.5, 5)])
def test_after_some_lost_claims_a_new_snapshot_is_taken(seconds: float, losses: int) -> None:
    """After two, or more if a snapshot takes long."""
    checkpoints = [checkpoint(step) for step in range(10)]
    queue = scheduler("b")
    queue.see(Snapshot(checkpoints, over=False), seconds)
    tried = []
    for candidate, names in queue.candidates():
        tried.append(candidate.step)
        queue.note_tried(candidate, names, is_lost=True)
    assert len(tried) == losses
    assert queue.is_stale
    queue.see(Snapshot(checkpoints, over=False))
    assert not queue.is_stale


def test_a_tried_checkpoint_is_not_retried_before_the_next_snapshot() -> None:
    queue = scheduler()
    queue.see(Snapshot([checkpoint(1), checkpoint(2)], over=False))
    candidate, names = next(queue.candidates())
    queue.note_tried(candidate, names, is_lost=False)
    assert [left.step for left, _ in queue.candidates()] == [2]
    assert queue.is_waiting
    assert seen(queue, [checkpoint(1), checkpoint(2)]) == [1, 2]


def test_validations_of_a_checkpoint_are_tried_separately() -> None:
    queue = scheduler(validations={"val": {}, "other": {}})
    queue.see(Snapshot([checkpoint(1)], over=False))
    candidate, names = next(queue.candidates())
    assert names == ["val", "other"]
    queue.note_tried(candidate, ["val"], is_lost=False)
    assert next(queue.candidates())[1] == ["other"]


def test_the_least_served_run_comes_first() -> None:
    checkpoints = [
        checkpoint(step, run_id=run_id) for run_id in ("first", "second") for step in (1, 2)
    ]
    queue = scheduler()
    queue.see(Snapshot(checkpoints, over=False))
    order = []
    for _ in range(4):
        candidate, names = next(queue.candidates())
        queue.note_tried(candidate, names, is_lost=False)
        order.append(candidate.run_id)
    assert order == ["first", "second", "first", "second"]
    queue.see(Snapshot(checkpoints, over=False))
    queue.refuse("first")
    assert {candidate.run_id for candidate, _ in queue.candidates()} == {"second"}
    done_now = queue.see(Snapshot(checkpoints, over=False))
    assert {done.run_id for done in done_now} == {"first"}
    assert queue.see(Snapshot(checkpoints, over=False)) == []


def test_finished_checkpoints_are_reported_once() -> None:
    """Unselected steps, steps of a killed trainer and steps that failed here are finished."""
    queue = scheduler(every=2, retry_failed=True)
    lost = checkpoint(4, ready=False)
    failed = checkpoint(6, tags={"mlflow_dr.validation.val.failed": "why"})
    checkpoints = [checkpoint(1), checkpoint(2, ready=False, pending=True), lost, failed]
    assert [done.step for done in queue.see(Snapshot(checkpoints, over=False))] == [1, 4]
    candidate, names = next(queue.candidates())
    assert candidate.step == 6
    queue.note_tried(candidate, names, is_lost=False)
    queue.note_ended(candidate, "val", State.FAILED)
    assert [done.step for done in queue.see(Snapshot(checkpoints, over=False))] == [6]
    assert queue.see(Snapshot(checkpoints, over=False)) == []
    assert not queue.is_waiting


def test_only_the_best_by_the_cheap_validation_are_refined() -> None:
    """Of equal values the earliest step counts; checkpoints without a value do not."""
    values = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3, 5: 0.3}
    checkpoints = [checkpoint(6)]
    for step, value in values.items():
        record = {"mlflow_dr.validation.val-random_5": json.dumps({"values": {"mrr_at_10": value}})}
        checkpoints.append(checkpoint(step, record, metrics=frozenset(["val-random_5/mrr_at_10"])))
    queue = scheduler(subset="random:5", refine="full@2", measures="mrr@10")
    queue.see(Snapshot(checkpoints, over=False))
    found = {step.step: list(names) for step, names in queue.candidates()}
    assert found == {2: ["val"], 4: ["val"], 6: ["val-random_5"]}


def test_a_checkpoint_claimed_by_another_validator_is_waited_for() -> None:
    """The wait ends when the claim's heartbeat stops or the claim is given back."""
    queue = scheduler(now_ms=60_000, max_lag_seconds=5.0, patience_seconds=1e-9)
    begun = claimed(1, "far")
    back = {"mlflow_dr.validation.val.heartbeat": "1: given back"}
    checkpoints = [begun, replace(claimed(2, "far"), tags=back)]
    assert [done.step for done in queue.see(Snapshot(checkpoints, over=False))] == [2]
    assert queue.waiting_of("run") == [begun]
    assert not queue.has_free
    assert list(queue.candidates()) == []
    assert queue.see(Snapshot(checkpoints, over=False)) == []  # half the patience counts at most
    assert queue.see(Snapshot(checkpoints, over=False)) == [begun]
    assert not queue.is_waiting


@pytest.mark.parametrize(("now_ms", "expected"), [(5_000, [1, 2, 3]), (7_500, [3])])
def test_checkpoints_published_long_ago_are_passed_over(now_ms: int, expected: list[int]) -> None:
    queue = scheduler(now_ms=now_ms, max_lag_seconds=5.0)
    checkpoints = [checkpoint(step) for step in (1, 2, 3)]
    done_now = queue.see(Snapshot(checkpoints, over=False))
    assert sorted([*expected, *(done.step for done in done_now)]) == [1, 2, 3]
    assert seen(queue, checkpoints) == expected


@pytest.mark.parametrize(
    ("order", "taken", "expected"),
    [
        ("oldest", [], [10, 20, 30]),
        ("newest", [40], [30, 20, 10]),
        ("bisect", [], [30, 10, 20]),
        ("bisect", [0, 40], [20, 30, 10]),
        ("bisect", [15], [30, 20, 10]),
    ],
)
def test_the_order_of_checkpoints(order: str, taken: list[int], expected: list[int]) -> None:
    assert list(in_order([10, 20, 30], taken, order)) == expected


def test_a_validator_that_cannot_keep_up_covers_the_run_evenly() -> None:
    """Three checkpoints are published for each that is validated: of 300 steps, 100 are done."""
    published: list[int] = []
    taken: list[int] = []
    for step in range(0, 300, 3):
        published += [step, step + 1, step + 2]
        waiting = sorted(set(published) - set(taken))
        taken.append(next(in_order(waiting, sorted(taken), "bisect")))
    taken.sort()
    gaps = [after - before for before, after in pairwise(taken)]
    assert max(gaps) <= 8
    assert taken[0] <= 8
    assert taken[-1] >= 291


def test_without_open_checkpoints_nothing_waits() -> None:
    for order in ("oldest", "newest", "bisect"):
        assert list(in_order([], [1], order)) == []


def test_checkpoints_that_are_here_come_first_beside_other_validators() -> None:
    queue = scheduler()
    seen(queue, [claimed(1, "b"), *(checkpoint(step) for step in range(2, 9))])
    assert queue.validators == 2
    for ready in (["run-4", "run-3"], ["run-3", "run-4"], ["", "run-4"], []):
        few = [each.model_id for each, _ in queue.candidates(ready)]
        named = [model_id for model_id in ready if model_id]
        assert few[: len(named)] == named
        assert set(few) == {f"run-{step}" for step in range(2, 9)}
