import json
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest

from mlflow_dr.decisions.stop import plateau, stop_if_plateau
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.results import mark_failed, record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import clear_stop_request, request_stop, stop_request
from mlflow_dr.tracking.validations import Metric

MRR = Metric("val", "mrr_at_10")
NAN = float("nan")


def points(*values: float) -> list[tuple[int, float]]:
    """At steps 10, 20, ..."""
    return [(10 * index, value) for index, value in enumerate(values, start=1)]


def test_the_reason_in_words() -> None:
    reason = plateau(points(0.1, 0.2341, 0.2, 0.2345, 0.2297), 3, 0.001, metric=str(MRR))
    assert reason == (
        "val/mrr_at_10 has not risen by more than 0.001 for 3 checkpoints: "
        "best 0.2345 at step 40, last 0.2297 at step 50"
    )
    assert (plateau(points(0.2, 0.1), 1) or "").startswith(
        "the measure has not risen for 1 checkpoint: "
    )


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "stops"),
    [
        ([0.5, 0.4, 0.4], 2, 0.0, True),
        ([0.5, 0.4, 0.6], 2, 0.0, False),
        ([0.5, 0.5, 0.5], 2, 0.0, True),
        ([0.4, 0.5], 2, 0.0, False),  # too few
        ([], 1, 0.0, False),
        ([0.5, 0.51, 0.509], 2, 0.02, True),
        ([0.5, 0.509, 0.518, 0.527], 3, 0.02, False),  # slow, but more than that in the end
        ([0.5, 0.3, 0.3, 0.45, 0.51], 3, 0.0, False),  # it has risen after a plateau
        ([NAN, 0.5, NAN, NAN], 2, 0.0, True),
        ([NAN, NAN, NAN], 2, 0.0, False),
        ([NAN, 0.5, 0.4], 2, 0.0, False),
    ],
)
def test_training_stops_when_no_recent_value_is_better_than_the_earlier_ones(
    values: Sequence[float], patience: int, min_delta: float, stops: bool
) -> None:
    curve = points(*values)
    assert (plateau(curve, patience, min_delta) is not None) is stops
    random.Random(0).shuffle(curve)
    assert (plateau(curve, patience, min_delta) is not None) is stops


def test_a_step_with_two_values_counts_once() -> None:
    assert plateau([(10, 0.5), (20, 0.4), (20, 0.3)], 2) is None


@pytest.mark.parametrize(("waiting", "stops"), [([35], False), ([15, 25, 60], True)])
def test_a_recent_checkpoint_without_a_value_is_waited_for(waiting: list[int], stops: bool) -> None:
    curve = points(0.5, 0.4, 0.4, 0.3)
    assert (plateau(curve, 2, waiting=waiting) is not None) is stops


def test_a_stop_holds_for_all_possible_missing_values() -> None:
    """Every subset of five checkpoints is done, with every combination of the missing values."""
    grid, steps = (0.0, 1.0, 1.5, 2.0), range(1, 6)
    stops = 0
    for done in product([True, False], repeat=5):
        measured = [step for step in steps if done[step - 1]]
        for values in product(grid, repeat=len(measured)):
            curve = list(zip(measured, values, strict=True))
            missing = [step for step in steps if step not in measured]
            if plateau(curve, 2, 0.5, waiting=missing) is None:
                continue
            stops += 1
            due = [step for step in missing if step < measured[-1]]
            for others in product(grid, repeat=len(due)):
                filled = curve + list(zip(due, others, strict=True))
                assert plateau(filled, 2, 0.5), (curve, others)
    assert stops > 100


@pytest.mark.parametrize(
    ("patience", "min_delta"), [(0, 0.0), (-1, 0.0), (1, -0.1), (1, NAN), (1, float("inf"))]
)
def test_senseless_values_are_refused(patience: int, min_delta: float) -> None:
    with pytest.raises(UsageError, match=r"(patience|min_delta) is .*; it must be"):
        plateau(points(0.1), patience, min_delta)


@pytest.fixture
def falling_run(run: TrackedRun, tmp_path: Path) -> TrackedRun:
    """Four checkpoints, each worse than the one before."""
    (tmp_path / "weights").write_text("1")
    for step in (10, 20, 30, 40):
        add(run, tmp_path, step, 1 / step)
    return run


def add(
    run: TrackedRun, directory: Path, step: int, value: float | None, error: float = 0.0
) -> None:
    model_id = publish(run, directory, step)
    (checkpoint,) = [
        checkpoint for checkpoint in run_checkpoints(run) if checkpoint.model_id == model_id
    ]
    if value is not None:
        ends = {f"{MRR.key}/low": value - error, f"{MRR.key}/high": value + error} if error else {}
        record_result(run, checkpoint, "val", {MRR.key: value, **ends}, ("sea", "0"))


def stop_reason(run: TrackedRun, patience: int = 3) -> str | None:
    return stop_if_plateau(run, run_checkpoints(run), MRR, patience)


def test_the_request_is_made_once(falling_run: TrackedRun) -> None:
    reason = stop_reason(falling_run)
    assert reason is not None
    assert stop_request(falling_run) == reason
    request_stop(falling_run, "somebody else's")
    assert stop_reason(falling_run) is None
    assert stop_request(falling_run) == "somebody else's"


@pytest.mark.parametrize(("error", "stops"), [(0.0, False), (0.01, False), (0.03, True)])
def test_a_rise_of_an_estimate_must_exceed_its_error(
    run: TrackedRun, tmp_path: Path, error: float, stops: bool
) -> None:
    (tmp_path / "weights").write_text("1")
    for step, value in ((10, 0.3), (20, 0.31), (30, 0.32)):
        add(run, tmp_path, step, value, error)
    reason = stop_reason(run, patience=2)
    assert (reason is not None) is stops
    assert not stops or "has not risen by more than 0.03 for 2 checkpoints" in str(reason)


def test_a_finished_run_gets_no_stop_request(falling_run: TrackedRun) -> None:
    falling_run.finish("FINISHED")
    assert stop_reason(falling_run) is None
    assert stop_request(falling_run) is None


def test_a_cleared_request_returns_only_after_new_checkpoints(
    falling_run: TrackedRun, tmp_path: Path
) -> None:
    assert stop_reason(falling_run)
    clear_stop_request(falling_run)
    for step in (50, 60):
        add(falling_run, tmp_path, step, 0.01)
        assert stop_reason(falling_run) is None
    add(falling_run, tmp_path, 70, 0.01)
    assert stop_reason(falling_run)


def test_checkpoints_that_will_be_validated_are_waited_for(
    falling_run: TrackedRun, tmp_path: Path
) -> None:
    add(falling_run, tmp_path, 35, None)
    assert stop_reason(falling_run) is None
    checkpoints = run_checkpoints(falling_run)
    assert stop_if_plateau(falling_run, checkpoints, MRR, 3, waiting=checkpoints) is None
    assert stop_if_plateau(falling_run, checkpoints, MRR, 3, waiting=[])


def test_a_failed_checkpoint_is_neither_waited_for_nor_counted(
    falling_run: TrackedRun, tmp_path: Path
) -> None:
    add(falling_run, tmp_path, 35, None)
    (failed,) = [checkpoint for checkpoint in run_checkpoints(falling_run) if checkpoint.step == 35]
    mark_failed(falling_run, failed, "val", "NaN")
    assert stop_reason(falling_run, patience=4) is None
    assert stop_reason(falling_run)


def test_a_nan_value_does_not_count(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    for step, value in ((1, 0.5), (2, NAN), (3, NAN)):
        add(run, tmp_path, step, value)
    assert json.loads(run_checkpoints(run)[1].params["mlflow_dr.validation.val"])
    reason = stop_reason(run, patience=2)
    assert reason is not None
    assert reason.endswith("best 0.5000 at step 1, last nan at step 3")
