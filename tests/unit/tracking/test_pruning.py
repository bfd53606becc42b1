import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.errors import CheckpointError, TrackingError
from mlflow_dr.tracking.checkpoints import (
    Checkpoint,
    announce_checkpoint,
    mark_upload_failed,
    publish,
    ready_steps,
    run_checkpoints,
)
from mlflow_dr.tracking.claims import Claims, Owner
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.following import register_directory
from mlflow_dr.tracking.pruning import (
    RunState,
    Stored,
    delete_files,
    orphans,
    registered_versions,
    stored_files,
)
from mlflow_dr.tracking.results import State, record_result, validation_state
from mlflow_dr.tracking.runs import TrackedRun

ELSEWHERE = Owner("far", 7, "another boot", 1, "token")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "encoder"
    (directory / "1_Pooling").mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")
    (directory / "1_Pooling" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def published(run: TrackedRun, directory: Path) -> TrackedRun:
    """Three checkpoints; the second one is done."""
    for step in (1, 2, 3):
        publish(run, directory, step)
    record_result(run, at(run, 2), "val", {"mrr_at_10": 0.5}, ("sea", "0"))
    return run


def at(run: TrackedRun, step: int) -> Checkpoint:
    (found,) = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step]
    return found


def directory_of(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.location)


def tree(folder: Path) -> Mapping[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_are_deleted(published: TrackedRun) -> None:
    before = at(published, 2)
    folder = directory_of(before)
    beside = tree(folder.parents[2])
    size = sum(len(beside.pop(name)) for name in tree(folder))
    (folder.parent / "neighbour").write_text("1")
    beside[str(folder.parent / "neighbour")] = b"1"

    stored = stored_files(published.client, before)
    removal = delete_files(published.client, before)
    assert removal.stored == stored
    assert stored.bytes == size
    assert removal.kept == ""
    assert tree(folder.parents[2]) == beside

    after = at(published, 2)
    assert (after.is_pruned, after.is_fully_pruned) == (True, True)
    assert after.tags["mlflow_dr.pruned"].startswith("20")
    assert (after.params, after.metrics) == (before.params, before.metrics)
    assert validation_state(after, "val") is State.DONE
    history = published.client.get_metric_history(published.id, "val/mrr_at_10")
    assert [point.step for point in history] == [2]
    with pytest.raises(CheckpointError, match="its files were deleted"), checkpoint_files(after):
        pass
    assert delete_files(published.client, before).stored == Stored(0, 0)


def test_a_training_that_is_resumed_has_the_step(published: TrackedRun) -> None:
    delete_files(published.client, at(published, 2))
    assert ready_steps(published) == {1, 2, 3}


@pytest.mark.parametrize("by", ["claim", "tag"])
def test_a_checkpoint_that_came_into_use_meanwhile_is_kept(published: TrackedRun, by: str) -> None:
    seen = at(published, 1)
    if by == "claim":
        assert Claims(published.client, ELSEWHERE).claim(seen, "val")
    else:
        tags = {"mlflow_dr.best.val/mrr_at_10": "0.5"}
        published.client.set_logged_model_tags(seen.model_id, tags)
    removal = delete_files(published.client, seen)
    assert (
        removal.kept
        == {
            "claim": "being validated by far:7",
            "tag": "tagged as best by val/mrr_at_10",
        }[by]
    )
    assert not at(published, 1).is_pruned
    with checkpoint_files(at(published, 1)) as copy:
        assert (copy / "model.safetensors").exists()


def test_a_claim_after_the_first_phase_stops_the_deletion(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = published.client.set_logged_model_tags

    def tag_and_be_late(model_id: str, tags: dict[str, str]) -> None:
        real(model_id, tags)
        assert Claims(MlflowClient(), ELSEWHERE).claim(at(published, 1), "val")

    monkeypatch.setattr(published.client, "set_logged_model_tags", tag_and_be_late)
    assert delete_files(published.client, at(published, 1)).kept == "being validated by far:7"
    assert not at(published, 1).is_pruned
    with checkpoint_files(at(published, 1)):
        pass
    Claims(published.client).claim(at(published, 1), "val")
    monkeypatch.undo()
    validated = at(published, 1)
    record_result(published, validated, "val", {"mrr_at_10": 0.5}, ("sea", "0"))
    assert delete_files(published.client, validated).kept == ""
    assert at(published, 1).is_fully_pruned


def test_an_interrupted_deletion_is_finished(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_one(store: LocalArtifactRepository, path: str | None = None) -> None:
        (Path(store.artifact_dir) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LocalArtifactRepository, "delete_artifacts", remove_one)
        with pytest.raises(KeyboardInterrupt):
            delete_files(published.client, at(published, 1))
    left = at(published, 1)
    assert (left.is_pruned, left.is_fully_pruned) == (True, False)
    with pytest.raises(CheckpointError, match="its files were deleted"), checkpoint_files(left):
        pass
    removal = delete_files(published.client, left)
    assert removal.stored.files == stored_files(published.client, at(published, 2)).files - 1
    assert at(published, 1).is_fully_pruned
    assert not directory_of(left).exists()


def test_a_claim_after_an_interrupted_deletion_is_respected(
    published: TrackedRun,
) -> None:
    """The tag stays, the claim is respected, and a later deletion finishes."""
    checkpoint = at(published, 1)
    published.client.set_logged_model_tags(checkpoint.model_id, {"mlflow_dr.pruned": "begun"})
    claims = Claims(published.client, ELSEWHERE)
    assert claims.claim(checkpoint, "val")
    assert delete_files(published.client, checkpoint).kept == "being validated by far:7"
    assert (at(published, 1).is_pruned, directory_of(checkpoint).exists()) == (True, True)
    claims.drop(checkpoint, "val", finished=False)
    assert delete_files(published.client, checkpoint).kept == ""
    assert at(published, 1).is_fully_pruned


def test_a_store_that_cannot_delete_is_reported(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: LocalArtifactRepository, path: str | None = None) -> None:
        raise MlflowException("not\nimplemented")

    monkeypatch.setattr("mlflow_dr.tracking.pruning.SECONDS_BETWEEN_ATTEMPTS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(LocalArtifactRepository, "delete_artifacts", refuse)
        with pytest.raises(
            TrackingError, match=r"deleting the files of step 1 .*: not implemented"
        ):
            delete_files(published.client, at(published, 1))
        patched.setattr(LocalArtifactRepository, "delete_artifacts", lambda store: None)
        with pytest.raises(TrackingError, match="left 7 files undeleted"):
            delete_files(published.client, at(published, 1))
    assert not at(published, 1).is_pruned
    with checkpoint_files(at(published, 1)):
        pass
    assert delete_files(published.client, at(published, 1)).kept == ""


def test_two_simultaneous_deletions_remove_once(published: TrackedRun) -> None:
    checkpoint = at(published, 1)
    start = threading.Barrier(4)
    ended: list[str] = []

    def race() -> None:
        start.wait()
        ended.append(delete_files(published.client, checkpoint).kept)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [""] * 4
    assert at(published, 1).is_fully_pruned


def test_pending_checkpoints_are_kept_and_failed_ones_are_deleted(
    run: TrackedRun, directory: Path
) -> None:
    announce_checkpoint(run, 1, "0")
    run.client.log_model_artifacts(at(run, 1).model_id, str(directory))
    assert delete_files(run.client, at(run, 1)).kept == "pending"
    assert stored_files(run.client, at(run, 1)).files == 2
    mark_upload_failed(run, at(run, 1).model_id)
    assert delete_files(run.client, at(run, 1)).stored.files == 2


def test_a_registered_directory_is_not_deleted(run: TrackedRun, directory: Path) -> None:
    register_directory(run, directory, 1)
    before = tree(directory)
    assert delete_files(run.client, at(run, 1)).kept == f"found in {directory}"
    assert tree(directory) == before


@pytest.mark.parametrize("folder", ["proj#3", "what?now", "100%25 sure"])
def test_a_store_in_a_folder_of_any_name(
    client: MlflowClient, directory: Path, tmp_path: Path, folder: str
) -> None:
    """MLflow stores a path as the artifact location unchanged, without URL encoding."""
    experiment = client.create_experiment(f"{tmp_path}/{folder}", str(tmp_path / folder))
    run = TrackedRun(client, client.create_run(experiment))
    for step in (1, 2):
        publish(run, directory, step)
    assert (
        delete_files(client, at(run, 1)).stored.files == stored_files(client, at(run, 2)).files > 0
    )
    assert at(run, 1).is_fully_pruned
    with checkpoint_files(at(run, 2)) as found:
        assert (found / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("outside", ["", "..", "models"])
def test_a_location_that_is_not_the_checkpoints_own_is_refused(
    published: TrackedRun, client: MlflowClient, outside: str
) -> None:
    """The root of the store, a path that leaves the checkpoint, and the folder of all models."""
    checkpoint = at(published, 1)
    whole = tree(directory_of(checkpoint).parents[2])
    above = directory_of(checkpoint).parents[2]
    two_up = f"{checkpoint.location}/../.."
    elsewhere = {"": above, "..": two_up, "models": above / "models"}[outside]
    with sqlite3.connect(str(client.tracking_uri).removeprefix("sqlite:///")) as database:
        database.execute(
            "UPDATE logged_models SET artifact_location = ? WHERE model_id = ?",
            (str(elsewhere), checkpoint.model_id),
        )
    with pytest.raises(TrackingError, match="not a directory of their own"):
        delete_files(client, checkpoint)
    assert tree(above) == whole
    assert not at(published, 1).is_pruned


def test_versions_of_registered_models(published: TrackedRun, directory: Path) -> None:
    """Versions by id, by location, a copy of a version, and a version of another run."""
    client = published.client
    publish(published, directory, 4)
    by_id, by_place, copied, free = (at(published, step) for step in (1, 2, 3, 4))
    name = f"retriever-{published.id}"
    for model_name in (name, f"{name}-copy"):
        client.create_registered_model(model_name)
    client.create_model_version(name, f"models:/{by_id.model_id}")
    client.create_model_version(name, by_place.location)
    version = client.create_model_version(name, f"models:/{copied.model_id}")
    client.copy_model_version(f"models:/{name}/{version.version}", f"{name}-copy")
    client.delete_model_version(name, version.version)
    assert registered_versions(client, run_checkpoints(published)) == {
        by_id.model_id: f"registered as {name} version 1",
        by_place.model_id: f"registered as {name} version 2",
        copied.model_id: f"registered as {name}-copy version 1",
    }
    assert registered_versions(client, [free]) == {}


def test_checkpoints_of_runs_that_were_deleted(
    client: MlflowClient, directory: Path, tmp_path: Path
) -> None:
    name = f"orphans-{tmp_path.name}"
    experiment = client.create_experiment(name, str(tmp_path / "artifacts"))
    active, deleted, gone = (TrackedRun(client, client.create_run(experiment)) for _ in range(3))
    for run in (active, deleted, gone):
        publish(run, directory, 1)
    client.create_logged_model(experiment, "of nobody")
    for run in (deleted, gone):
        client.delete_run(run.id)
    hard_delete(client)(gone.id)

    def states() -> dict[str, RunState]:
        return {checkpoint.run_id: state for checkpoint, state in orphans(client, name)}

    assert states() == {deleted.id: RunState.DELETED, gone.id: RunState.GONE}
    client.restore_run(deleted.id)
    assert states() == {gone.id: RunState.GONE}
    client.delete_experiment(experiment)
    everywhere = {checkpoint.run_id for checkpoint, _ in orphans(client)}
    assert {active.id, deleted.id, gone.id} <= everywhere
    with pytest.raises(TrackingError, match="no experiment 'nowhere'"):
        orphans(client, "nowhere")


def test_a_server_that_refuses_to_describe_a_run(
    client: MlflowClient, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may still exist."""
    name = f"refused-{tmp_path.name}"
    run = TrackedRun(client, client.create_run(client.create_experiment(name)))
    announce_checkpoint(run, 1, "0")
    client.delete_run(run.id)

    def refuse(run_id: str) -> None:
        raise MlflowException("no permission", 7)

    monkeypatch.setattr(client, "get_run", refuse)
    with pytest.raises(TrackingError, match="no permission"):
        orphans(client, name)


def hard_delete(client: MlflowClient) -> Callable[[str], None]:
    """What `mlflow gc` calls for each deleted run."""
    function: Callable[[str], None] = client._tracking_client.store._hard_delete_run
    return function
