from pathlib import Path

import pytest

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import (
    Metric,
    bind_name,
    chosen_metric,
    metric_points,
    metric_value,
)


def bind(run: TrackedRun, name: str, measures: str) -> None:
    bind_name(run, name, {"measures": measures})


def test_val_decides_by_its_first_measure_unless_another_is_given(run: TrackedRun) -> None:
    bind(run, "all", "recall@100")
    assert str(chosen_metric(run)) == "all/recall_at_100"
    bind(run, "val", "ndcg@10 mrr@10")
    assert str(chosen_metric(run)) == "val/ndcg_at_10"
    for asked in ("mrr_at_10", "mrr@10", "val/mrr_at_10", "val/mrr@10"):
        assert chosen_metric(run, asked) == Metric("val", "mrr_at_10")
    assert chosen_metric(run, "all/recall@100").validation == "all"


@pytest.mark.parametrize("asked", ["seconds", "all/mrr_at_10", "val/", "/mrr_at_10", ""])
def test_a_metric_that_the_run_does_not_have(run: TrackedRun, asked: str) -> None:
    bind(run, "val", "mrr@10 ndcg@10")
    with pytest.raises(UsageError, match="it has: "):
        chosen_metric(run, asked)


def test_a_run_that_nobody_validates(run: TrackedRun) -> None:
    with pytest.raises(TrackingError, match="has no validation yet"):
        chosen_metric(run)


def test_the_recorded_values(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    for step in (2, 1):
        publish(run, tmp_path, step)
    _, second = run_checkpoints(run)
    record_result(run, second, "val", {"mrr_at_10": 0.5}, ("sea", "0"))
    checkpoints = run_checkpoints(run)
    assert metric_points(checkpoints, Metric("val", "mrr_at_10")) == [(2, 0.5)]
    assert metric_value(checkpoints[0], Metric("val", "mrr_at_10")) is None
    assert metric_value(checkpoints[1], Metric("val", "ndcg_at_10")) is None
