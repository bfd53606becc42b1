import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking import following
from mlflow_dr.tracking.checkpoints import Checkpoint, announce_checkpoint, publish
from mlflow_dr.tracking.following import FollowedExperiment, FollowedRun
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_text("1")
    return tmp_path


def test_finished_checkpoints_are_not_requested_again(
    client: MlflowClient, run: TrackedRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(3):
        publish(run, directory, step)
    followed = FollowedRun(run)
    answers: list[int] = []
    real = client.search_logged_models

    def counted(*args: object, **more: object) -> object:
        page = real(*args, **more)  # type: ignore[arg-type]
        answers.append(len(page))
        return page

    monkeypatch.setattr(client, "search_logged_models", counted)
    seen = followed.snapshot().checkpoints
    for checkpoint in seen[:2]:
        followed.checkpoints.mark_done(checkpoint)
    followed.snapshot()
    followed.checkpoints.mark_done(seen[2])
    publish(run, directory, 3)
    assert [checkpoint.step for checkpoint in followed.snapshot().checkpoints] == [0, 1, 2, 3]
    assert answers[0] == 3
    assert answers[1] <= 2  # those of the same millisecond come again
    assert answers[2] <= 3


def test_a_pending_checkpoint_is_seen_when_it_is_ready(run: TrackedRun, directory: Path) -> None:
    from mlflow_dr.tracking.checkpoints import upload_checkpoint
    from mlflow_dr.tracking.manifest import write_manifest

    model_id = announce_checkpoint(run, 1, write_manifest(directory))
    publish(run, directory, 2)
    followed = FollowedRun(run)
    seen = followed.snapshot().checkpoints
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in seen] == [(1, False), (2, True)]
    followed.checkpoints.mark_done(seen[1])
    upload_checkpoint(run, model_id, directory, 1)
    assert [
        (checkpoint.step, checkpoint.ready) for checkpoint in followed.snapshot().checkpoints
    ] == [
        (1, True),
        (2, True),
    ]


def test_checkpoints_of_a_killed_trainer_are_not_requested_forever(
    run: TrackedRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LONGEST_UPLOAD_MS", 50)
    announce_checkpoint(run, 1, "")
    time.sleep(0.1)
    publish(run, directory, 2)
    bounds: list[int] = []
    real = following.find_checkpoints

    def noted(*args: Any, since_ms: int) -> list[Checkpoint]:
        bounds.append(since_ms)
        return real(*args, since_ms=since_ms)

    monkeypatch.setattr(following, "find_checkpoints", noted)
    followed = FollowedRun(run)
    pending, ready = followed.snapshot().checkpoints
    followed.checkpoints.mark_done(ready)
    assert [checkpoint.step for checkpoint in followed.snapshot().checkpoints] == [1, 2]
    assert bounds == [0, ready.created_ms]
    run.client.finalize_logged_model(pending.model_id, "READY")
    run.client.set_terminated(run.id)
    assert [checkpoint.ready for checkpoint in followed.snapshot().checkpoints] == [True, True]


def test_all_checkpoints_are_requested_from_time_to_time(
    client: MlflowClient, run: TrackedRun, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with a slow clock writes checkpoints that seem old."""
    model_id = publish(run, directory, 1)
    followed = FollowedRun(run)
    followed.checkpoints.mark_done(followed.snapshot().checkpoints[0])
    client.delete_logged_model(model_id)
    assert [checkpoint.step for checkpoint in followed.snapshot().checkpoints] == [1]
    monkeypatch.setattr(following, "SECONDS_BETWEEN_FULL_SNAPSHOTS", 0.0)
    assert followed.snapshot().checkpoints == []


def test_following_a_run_ends_and_following_an_experiment_does_not(
    client: MlflowClient, directory: Path
) -> None:
    run = TrackedRun(client, client.create_run(client.create_experiment("with an end")))
    publish(run, directory, 1)
    alone, together = FollowedRun(run), FollowedExperiment(client, "with an end")
    (checkpoint,), over = alone.snapshot()
    assert over is False
    client.set_terminated(run.id)
    assert alone.snapshot().over is None  # there is something to do first
    alone.checkpoints.mark_done(checkpoint)
    assert alone.snapshot().over is True
    look = together.snapshot()
    assert not look.over
    assert together.run_of(look.checkpoints[0]).id == run.id
    client.delete_run(run.id)
    with pytest.raises(TrackingError, match="was deleted"):
        alone.snapshot()


def test_no_such_experiment(client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match="no experiment 'nowhere'"):
        FollowedExperiment(client, "nowhere")


def test_an_experiment_that_is_deleted_while_it_is_followed(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client.create_experiment("to be deleted")
    monkeypatch.setattr(following, "SECONDS_BETWEEN_STATES", 0.0)
    followed = FollowedExperiment(client, "to be deleted")
    assert followed.snapshot().checkpoints == []
    client.delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"experiments restore --experiment-id {experiment}`"):
        followed.snapshot()
