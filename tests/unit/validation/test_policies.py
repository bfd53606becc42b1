"""What follows from the curve while it grows."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import ForbiddenError, TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import stop_request
from mlflow_dr.tracking.validations import bind_name
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.policies import Policies

Measuring = Callable[[int, float], None]
TAG = "mlflow_dr.best.val"


@pytest.fixture
def measured(run: TrackedRun, tmp_path: Path) -> Measuring:
    """Publishes a step that has a value."""
    bind_name(run, "val", {"measures": "mrr@10"})
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "weights").write_text("1")

    def measure(step: int, value: float) -> None:
        publish(run, tmp_path / "published", step)
        record_result(run, run_checkpoints(run)[-1], "val", {"mrr_at_10": value}, ("c", "0"))

    return measure


def act(run: TrackedRun, policies: Policies) -> None:
    policies.act(run, run_checkpoints(run), [])


def marked(run: TrackedRun) -> list[int]:
    return [checkpoint.step for checkpoint in run_checkpoints(run) if TAG in checkpoint.tags]


def unpruned(run: TrackedRun) -> list[int]:
    return [checkpoint.step for checkpoint in run_checkpoints(run) if not checkpoint.is_pruned]


def test_only_one_checkpoint_is_tagged_as_best(run: TrackedRun, measured: Measuring) -> None:
    first, second = Policies(ValidateConfig()), Policies(ValidateConfig())
    for step, value in ((1, 0.1), (2, 0.3), (3, 0.2)):
        measured(step, value)
        for policies in (first, second):
            act(run, policies)
    assert marked(run) == [2]
    measured(4, 0.4)
    stale = run_checkpoints(run)[:3]  # as a validator sees what it has settled
    second.act(run, [*stale, run_checkpoints(run)[3]], [])
    assert marked(run) == [4]
    assert run.fetch().data.tags[TAG].startswith("step 4, models:/")


def test_policies_request_a_stop_and_prune(run: TrackedRun, measured: Measuring) -> None:
    policies = Policies(ValidateConfig(patience=2, keep="best:1,last:1"))
    for step, value in ((1, 0.1), (2, 0.3), (3, 0.2)):
        measured(step, value)
        act(run, policies)
        assert stop_request(run) is None
    measured(4, 0.3)
    act(run, policies)
    assert (stop_request(run) or "").startswith("val/mrr_at_10 has not risen")
    assert unpruned(run) == [2, 4]


def test_with_refinement_the_cheap_validation_asks_for_a_stop(
    run: TrackedRun, measured: Measuring
) -> None:
    """The expensive validation covers only the best so far and therefore always rises."""
    bind_name(run, "val-random_5", {"measures": "mrr@10"})
    for step, value in enumerate((0.1, 0.3, 0.2, 0.2), start=1):
        measured(step, step / 10)
        figures = {"mrr_at_10": value}
        record_result(run, run_checkpoints(run)[-1], "val-random_5", figures, ("c", "0"))
    refined = {"subset": "random:5", "refine": "full@1", "measures": "mrr@10", "patience": 2}
    act(run, Policies(ValidateConfig(**refined, metric="val/mrr@10")))
    assert stop_request(run) is None
    act(run, Policies(ValidateConfig(**refined)))
    assert (stop_request(run) or "").startswith("val-random_5/mrr_at_10 has not risen")
    assert marked(run) == [4]


def test_missing_permission_to_delete_does_not_end_validation(
    run: TrackedRun,
    measured: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def refused(*_: object) -> None:
        asked.append(1)
        raise ForbiddenError("no permission")

    monkeypatch.setattr("mlflow_dr.validation.policies.delete_unneeded", refused)
    policies = Policies(ValidateConfig(keep="last:1"))
    for step in (1, 2):
        measured(step, 0.1)
        act(run, policies)
    assert asked == [1]
    assert caplog.messages == ["files are not deleted from now on: no permission"]


def test_a_failed_request_is_repeated(
    run: TrackedRun,
    measured: Measuring,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, asked = type(run.client).search_model_versions, []

    def failing(*args: object, **more: object) -> object:
        asked.append(1)
        if len(asked) < 3:
            raise MlflowException("out of connections")
        return real(*args, **more)

    monkeypatch.setattr(type(run.client), "search_model_versions", failing)
    policies = Policies(ValidateConfig(keep="last:1"))
    for step in (1, 2, 3):  # the first one is called the best
        measured(step, 1 / step)
    act(run, policies)
    (told,) = caplog.messages
    assert told.startswith("files are not deleted now: ")
    assert told.endswith("out of connections")
    with monkeypatch.context() as away:
        away.setattr("mlflow_dr.validation.policies.server_responds", lambda _: False)
        with pytest.raises(TrackingError):
            act(run, policies)
    act(run, policies)
    assert unpruned(run) == [1, 3]


def test_removed_checkpoints_are_not_inspected_again(
    run: TrackedRun, measured: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed checkpoints are not counted, although finished ones are passed in as last seen."""
    policies = Policies(ValidateConfig(keep="last:1"))
    for step in (1, 2, 3):
        measured(step, 1 / step)
    seen = run_checkpoints(run)
    policies.act(run, seen, [])
    assert unpruned(run) == [1, 3]
    monkeypatch.setattr("mlflow_dr.decisions.pruning.delete_files", None)
    policies.act(run, seen[1:], [])


def test_contradictory_policies_are_refused(run: TrackedRun, measured: Measuring) -> None:
    with pytest.raises(UsageError, match="patience"):
        ValidateConfig(patience=0)
    with pytest.raises(UsageError, match="no metric 'val/ndcg@10'"):
        act(run, Policies(ValidateConfig(metric="val/ndcg@10")))
