"""Registered models by their names, over a real store."""

from pathlib import Path

import pytest

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.registry import checkpoint_by_uri, register
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def checkpoints(run: TrackedRun, tmp_path: Path) -> list[Checkpoint]:
    for step in (1, 2):
        (tmp_path / str(step)).mkdir()
        publish(run, tmp_path / str(step), step)
    return run_checkpoints(run)


def test_a_checkpoint_is_found_by_its_mlflow_names(
    run: TrackedRun, checkpoints: list[Checkpoint]
) -> None:
    first, second = checkpoints
    register(run, first, "by name")
    register(run, second, "by name")
    register(run, first, "by name")
    for uri, expected in {
        first.uri: first,
        "models:/by name/1": first,
        "models:/by name/2": second,
        "models:/by name/latest": second,
        "models:/by name@best": first,
    }.items():
        assert checkpoint_by_uri(run.client, uri).model_id == expected.model_id, uri


def test_a_version_registered_by_location_is_found(
    run: TrackedRun, checkpoints: list[Checkpoint]
) -> None:
    run.client.create_registered_model("by place")
    run.client.create_model_version("by place", checkpoints[0].location, run.id)
    assert checkpoint_by_uri(run.client, "models:/by place/1").step == 1
    assert register(run, checkpoints[0], "by place") == "1"
    assert register(run, checkpoints[1], "by place") == "2"


def test_names_of_other_models_are_refused(run: TrackedRun, tmp_path: Path) -> None:
    run.client.create_registered_model("other")
    run.client.create_model_version("other", f"{run.fetch().info.artifact_uri}/model", run.id)
    with pytest.raises(
        UsageError, match=r"models:/other/1 is not a published checkpoint; .*/model$"
    ):
        checkpoint_by_uri(run.client, "models:/other/1")
    for uri in ("models:/other/2", "models:/nobody@best", "models:/other@best", "models:/m-0"):
        with pytest.raises(TrackingError):
            checkpoint_by_uri(run.client, uri)
