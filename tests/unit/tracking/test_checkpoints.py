from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import (
    STEP_TAG,
    announce_checkpoint,
    checkpoint_by_id,
    fail_pending_checkpoints,
    mark_upload_failed,
    publish,
    ready_steps,
    run_checkpoints,
)
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def left_by_a_killed_trainer(run: TrackedRun, tmp_path: Path) -> TrackedRun:
    """Steps 0 and 5 are complete, 10 failed, 15 and 20 are pending; a second 20 is complete."""
    (tmp_path / "weights").write_text("1")
    publish(run, tmp_path, 0)
    publish(run, tmp_path, 5)
    mark_upload_failed(run, announce_checkpoint(run, 10, "abc"))
    announce_checkpoint(run, 15, "abc")
    announce_checkpoint(run, 20, "abc")
    publish(run, tmp_path, 20)
    return run


def test_the_complete_steps(left_by_a_killed_trainer: TrackedRun) -> None:
    assert ready_steps(left_by_a_killed_trainer) == {0, 5, 20}


def test_pending_checkpoints_are_marked_failed(left_by_a_killed_trainer: TrackedRun) -> None:
    run = left_by_a_killed_trainer
    pending = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.pending]
    assert [checkpoint.step for checkpoint in pending] == [15, 20]
    assert fail_pending_checkpoints(run) == [15, 20]
    assert not any(checkpoint.pending for checkpoint in run_checkpoints(run))
    assert ready_steps(run) == {0, 5, 20}
    models = run.client.search_logged_models([run.experiment_id], f"source_run_id = '{run.id}'")
    failed = [model.name for model in models if model.status == LoggedModelStatus.FAILED]
    assert sorted(failed) == ["step-10", "step-15", "step-20"]
    assert fail_pending_checkpoints(run) == []


def test_another_runs_checkpoints_and_other_models_are_left_alone(
    left_by_a_killed_trainer: TrackedRun,
) -> None:
    run = left_by_a_killed_trainer
    other = TrackedRun(run.client, run.client.create_run(run.experiment_id))
    announce_checkpoint(other, 15, "abc")
    theirs = run.client.create_logged_model(run.experiment_id, "classifier", source_run_id=run.id)
    fail_pending_checkpoints(run)
    assert [checkpoint.pending for checkpoint in run_checkpoints(other)] == [True]
    assert run.client.get_logged_model(theirs.model_id).status == LoggedModelStatus.PENDING


@pytest.mark.parametrize("step", ["abc", "-1", "1.5", "", "9" * 4900, "\u0661"], ids=len)
def test_a_model_whose_step_is_malformed_is_passed_over_with_one_warning(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    (tmp_path / "weights").write_text("1")
    model_id = publish(run, tmp_path, 5)
    publish(run, tmp_path, 6)
    run.client.set_logged_model_tags(model_id, {STEP_TAG: step})
    for _ in range(2):
        assert [checkpoint.step for checkpoint in run_checkpoints(run)] == [6]
    assert caplog.text.count(f"model {model_id} is skipped") == 1
    with pytest.raises(TrackingError, match="is not a step"):
        checkpoint_by_id(run.client, model_id)
