"""Which checkpoint comes next, beside others."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import Owner
from mlflow_dr.tracking.following import Look
from mlflow_dr.tracking.results import State
from mlflow_dr.validation.choice import Choice
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.plan import Plan, Refines, Validation

VALIDATION = Validation(Settings(parse_measures("mrr@10")))
PLAN = Plan((VALIDATION,))
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


def choice(token: str = "a", plan: Plan = PLAN, now_ms: int = 0) -> Choice:
    return Choice(plan, token, lambda: now_ms, clock=lambda: 0.0)


def seen(choice: Choice, checkpoints: Sequence[Checkpoint]) -> list[int]:
    """What is tried, when the first claim is always lost to nobody in particular."""
    choice.see(Look(list(checkpoints), over=False))
    return [one.step for one, _ in choice.candidates()]


def test_alone_it_keeps_to_the_order() -> None:
    there = [checkpoint(step) for step in range(40)]
    assert seen(choice(), there) == list(range(40))
    newest = choice(plan=Plan((VALIDATION,), order=Order.NEWEST))
    assert seen(newest, there) == list(reversed(range(40)))


def test_validators_that_have_seen_one_another_want_different_ones() -> None:
    tokens = [f"token {number}" for number in range(8)]
    there = [*(claimed(step, token) for step, token in enumerate(tokens))]
    there += [checkpoint(step) for step in range(8, 100)]
    orders = [seen(choice(token), there) for token in tokens]
    firsts = [order[0] for order in orders]
    assert len(set(firsts)) == 8
    assert max(firsts) < 8 + 8  # each takes one of the next eight
    for order in orders:
        assert sorted(order) == list(range(8, 100))


def test_it_goes_on_with_its_own_after_others_have_had_theirs() -> None:
    """By one look, ten claims in a row, of which others would have wanted none."""
    tokens = ["a", "b", "c"]
    there = [*(claimed(step, token) for step, token in enumerate(tokens))]
    there += [checkpoint(step) for step in range(3, 60)]
    one = choice("b")
    one.see(Look(there, over=False))
    taken = []
    for _ in range(10):
        candidate, names = next(one.candidates())
        one.tried(candidate, names)
        taken.append(candidate.step)
    assert {step % 3 for step in taken} == {1}
    assert taken == sorted(taken)


@pytest.mark.parametrize(("seconds", "losses"), [(0.0, 2), (0.1, 2), (0.5, 5)])
def test_after_some_losses_it_wants_another_look(seconds: float, losses: int) -> None:
    """After two, or more where a look is dear."""
    there = [checkpoint(step) for step in range(10)]
    one = choice("b")
    one.see(Look(there, over=False), seconds)
    tried = []
    for candidate, names in one.candidates():
        tried.append(candidate.step)
        one.tried(candidate, names, lost_to=replace(OWNER, token=f"c{candidate.step}"))
    assert len(tried) == losses
    assert one.is_stale
    one.see(Look(there, over=False))
    assert not one.is_stale


def test_there_is_plenty_while_each_validator_at_work_can_have_another() -> None:
    one = choice("a")
    one.see(Look([checkpoint(1), checkpoint(2)], over=False))
    assert one.has_plenty
    one.tried(checkpoint(1), ["val"])
    assert not one.has_plenty
    one.see(Look([checkpoint(1), checkpoint(2), claimed(3, "b")], over=False))
    assert not one.has_plenty


def test_what_was_tried_is_not_tried_again_before_the_next_look() -> None:
    one = choice()
    one.see(Look([checkpoint(1), checkpoint(2)], over=False))
    candidate, names = next(one.candidates())
    one.tried(candidate, names)
    assert [left.step for left, _ in one.candidates()] == [2]
    assert one.is_waiting
    assert seen(one, [checkpoint(1), checkpoint(2)]) == [1, 2]


def test_validations_of_one_checkpoint_are_tried_apart() -> None:
    other = replace(VALIDATION, name="other")
    one = choice(plan=Plan((VALIDATION, other)))
    one.see(Look([checkpoint(1)], over=False))
    candidate, names = next(one.candidates())
    assert names == ["val", "other"]
    one.tried(candidate, ["val"])
    assert next(one.candidates()).names == ["other"]


def test_the_run_that_has_had_least_comes_first() -> None:
    there = [checkpoint(step, run_id=run_id) for run_id in ("first", "second") for step in (1, 2)]
    one = choice()
    one.see(Look(there, over=False))
    order = []
    for _ in range(4):
        candidate, names = next(one.candidates())
        one.tried(candidate, names)
        order.append(candidate.run_id)
    assert order == ["first", "second", "first", "second"]
    one.see(Look(there, over=False))
    one.refuse("first")
    assert {candidate.run_id for candidate, _ in one.candidates()} == {"second"}
    settled = one.see(Look(there, over=False))
    assert {done.run_id for done in settled} == {"first"}
    assert one.see(Look(there, over=False)) == []


def test_what_nothing_remains_to_be_done_for() -> None:
    """Other steps, those whose trainer was killed, those that failed here; each is said once."""
    plan = Plan((VALIDATION,), every=2, retry_failed=True)
    one = choice(plan=plan)
    lost = checkpoint(4, ready=False)
    failed = checkpoint(6, tags={"mlflow_dr.validation.val.failed": "why"})
    there = [checkpoint(1), checkpoint(2, ready=False, pending=True), lost, failed]
    assert [done.step for done in one.see(Look(there, over=False))] == [1, 4]
    candidate, names = next(one.candidates())
    assert candidate.step == 6
    one.tried(candidate, names)
    one.ended(candidate, "val", State.FAILED)
    assert [done.step for done in one.see(Look(there, over=False))] == [6]
    assert one.see(Look(there, over=False)) == []
    assert not one.is_waiting


def test_a_dear_validation_is_for_the_best_by_the_cheap_one() -> None:
    """Of equal ones the earliest; who has no figure yet is none of them."""
    (measure,) = parse_measures("mrr@10")
    dear = Validation(VALIDATION.settings, "dear", refines=Refines("val", measure, 2))
    values = {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.3, 5: 0.3}
    there = [checkpoint(6)]
    for step, value in values.items():
        record = {"mlflow_dr.validation.val": json.dumps({"values": {"mrr_at_10": value}})}
        there.append(checkpoint(step, record, metrics=frozenset(["val/mrr_at_10"])))
    one = choice(plan=Plan((VALIDATION, dear)))
    one.see(Look(there, over=False))
    found = {step.step: list(names) for step, names in one.candidates()}
    assert found == {2: ["dear"], 4: ["dear"], 6: ["val"]}


def test_what_another_has_begun_in_time_is_waited_for() -> None:
    """Until its claim stands still, or is given back."""
    plan = Plan((VALIDATION,), max_lag_seconds=5.0, patience_seconds=1e-9)
    one = choice(plan=plan, now_ms=60_000)
    begun = claimed(1, "far")
    back = {"mlflow_dr.validation.val.heartbeat": "1: given back"}
    there = [begun, replace(claimed(2, "far"), tags=back)]
    assert [done.step for done in one.see(Look(there, over=False))] == [2]
    assert one.waiting_of("run") == [begun]
    assert not one.has_free
    assert list(one.candidates()) == []
    assert one.see(Look(there, over=False)) == []  # half the patience counts at most
    assert one.see(Look(there, over=False)) == [begun]
    assert not one.is_waiting


@pytest.mark.parametrize(("now_ms", "expected"), [(5_000, [1, 2, 3]), (7_500, [3])])
def test_what_was_ready_long_ago_is_passed_over(now_ms: int, expected: list[int]) -> None:
    plan = Plan((VALIDATION,), max_lag_seconds=5.0)
    one = choice(plan=plan, now_ms=now_ms)
    there = [checkpoint(step) for step in (1, 2, 3)]
    settled = one.see(Look(there, over=False))
    assert sorted([*expected, *(done.step for done in settled)]) == [1, 2, 3]
    assert seen(one, there) == expected
