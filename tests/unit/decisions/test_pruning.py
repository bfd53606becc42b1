"""`mlflow-dr prune`, and what validators call."""

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.cli.runs import prune_command
from mlflow_dr.decisions.pruning import delete_unneeded, parse_keep_rules
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import ForbiddenError, TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.claims import Claims, Owner
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name

VALUES = {0: 0.1, 10: 0.3, 20: 0.5, 30: 0.4, 40: 0.2}
ELSEWHERE = Owner("far", 7, "another boot", 1, "token")


@pytest.fixture
def validated(run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path) -> TrackedRun:
    """Five checkpoints, all done; the best by `val` is at step 20, by `other` at step 40."""
    bind_name(run, "val", {"measures": "mrr@10 ndcg@10"})
    bind_name(run, "other", {"measures": "recall@100"})
    save_encoder(tmp_path / "encoder", make_tiny())
    for step, value in VALUES.items():
        publish(run, tmp_path / "encoder", step)
        (checkpoint,) = [
            checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step
        ]
        figures = {"mrr_at_10": value, "ndcg_at_10": 1 - value}
        record_result(run, checkpoint, "val", figures, ("sea", "0"))
        record_result(run, checkpoint, "other", {"recall_at_100": step / 100}, ("sea", "0"))
    return run


def prune(client: MlflowClient, *argv: object) -> Result:
    flags = [*map(str, argv), "--tracking-uri", client.tracking_uri]
    return CliRunner().invoke(prune_command, flags, catch_exceptions=False, standalone_mode=False)


def lines(result: Result) -> dict[int, tuple[str, str]]:
    """Step -> `delete` or `keep`, and why."""
    form = re.compile(r"step (\d+)  models:/m-\w+  [\d.]+ MB in \d+ files  (delete|keep): (.+)")
    *each, _ = result.output.splitlines()
    found = [form.fullmatch(line) for line in each]
    assert all(found), each
    return {int(match[1]): (match[2], match[3]) for match in found if match}


def with_files(run: TrackedRun) -> list[int]:
    return [
        checkpoint.step
        for checkpoint in run_checkpoints(run)
        if list(Path(checkpoint.location).rglob("*"))
    ]


def at(run: TrackedRun, step: int) -> Checkpoint:
    (found,) = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step]
    return found


def test_a_dry_run_prints_what_pruning_does_and_the_best_still_loads(
    validated: TrackedRun,
) -> None:
    flags = ("--run-id", validated.id, "--keep", "best:1,last:1")
    result = prune(validated.client, *flags, "--dry-run")
    assert with_files(validated) == list(VALUES)
    assert not any(checkpoint.is_pruned for checkpoint in run_checkpoints(validated))
    assert lines(result) == {
        0: ("delete", "no rule of best:1,last:1 keeps it"),
        10: ("delete", "no rule of best:1,last:1 keeps it"),
        20: ("keep", "best 1 of val/mrr_at_10"),
        30: ("delete", "no rule of best:1,last:1 keeps it"),
        40: ("keep", "last"),
    }
    assert re.fullmatch(
        r"3 of 5 checkpoints would be deleted: [\d.]+ MB", result.output.splitlines()[-1]
    )

    done = prune(validated.client, *flags)
    assert done.output == result.output.replace("would be deleted", "deleted")
    assert with_files(validated) == [20, 40]
    with checkpoint_files(at(validated, 20)) as directory:
        load_encoder(directory, safetensors_only=True)
    history = validated.client.get_metric_history(validated.id, "val/mrr_at_10")
    assert {point.step: point.value for point in history} == VALUES

    again = prune(validated.client, *flags)
    assert list(lines(again)) == [20, 40]
    assert again.output.splitlines()[-1].startswith("0 of 2 checkpoints deleted: 0.0 MB")


@pytest.mark.parametrize(
    ("metric", "best"),
    [("mrr@10", 20), ("ndcg_at_10", 0), ("val/ndcg@10", 0), ("other/recall_at_100", 40)],
)
def test_the_best_by_another_metric(validated: TrackedRun, metric: str, best: int) -> None:
    prune(validated.client, "--run-id", validated.id, "--keep", "best:1", "--metric", metric)
    assert with_files(validated) == [best]


def test_claims_are_respected(validated: TrackedRun) -> None:
    claims = Claims(validated.client, ELSEWHERE)
    assert claims.claim(at(validated, 10), "later")
    flags = ("--run-id", validated.id, "--keep", "last:1", "--unvalidated")
    assert lines(prune(validated.client, *flags))[10] == ("keep", "being validated by far:7")
    assert with_files(validated) == [10, 40]
    claims.drop(at(validated, 10), "later", finished=False)
    assert lines(prune(validated.client, *flags))[10] == ("delete", "no rule of last:1 keeps it")
    assert with_files(validated) == [40]


def test_checkpoints_that_are_not_validated_yet_are_kept(validated: TrackedRun) -> None:
    bind_name(validated, "new", {"measures": "mrr@10"})
    flags = ("--run-id", validated.id, "--keep", "last:1")
    assert set(lines(prune(validated.client, *flags)).values()) == {
        ("keep", "not validated yet by new")
    }
    assert with_files(validated) == list(VALUES)
    prune(validated.client, *flags, "--unvalidated")
    assert with_files(validated) == [40]


def test_a_checkpoint_that_chooses_a_subset_is_kept(validated: TrackedRun) -> None:
    subset = "bm25@5+encoder:step-10@50, seed 3, 0123456789abcdef"
    bind_name(validated, "small", {"measures": "mrr@10", "subset": subset})
    flags = ("--run-id", validated.id, "--keep", "last:1", "--unvalidated")
    assert lines(prune(validated.client, *flags))[10] == ("keep", "chooses the subset of small")
    assert with_files(validated) == [10, 40]


def test_a_registered_checkpoint_is_kept(validated: TrackedRun) -> None:
    validated.client.create_registered_model(validated.id)
    validated.client.create_model_version(validated.id, f"models:/{at(validated, 0).model_id}")
    decisions = lines(prune(validated.client, "--run-id", validated.id, "--keep", "last:1"))
    assert decisions[0] == ("keep", f"registered as {validated.id} version 1")
    assert with_files(validated) == [0, 40]


def test_checkpoints_of_deleted_runs_are_removed(
    validated: TrackedRun, client: MlflowClient, tmp_path: Path
) -> None:
    """Deleted: the files of a restorable run, and everything of a run that was removed for good."""
    experiment = client.create_experiment(tmp_path.name, str(tmp_path / "artifacts"))
    kept, deleted, gone = (TrackedRun(client, client.create_run(experiment)) for _ in range(3))
    for run in (kept, deleted, gone):
        publish(run, tmp_path / "encoder", 7)
    assert Claims(client, ELSEWHERE).claim(at(gone, 7), "val")
    for run in (deleted, gone):
        client.delete_run(run.id)
    client._tracking_client.store._hard_delete_run(gone.id)

    flags = ("--deleted", "--experiment", tmp_path.name)
    result = prune(client, *flags, "--dry-run")
    assert sorted(why for _, why in lines_by_run(result)) == sorted(
        [f"run {deleted.id} is deleted", f"run {gone.id} is gone"]
    )
    folders = [at(run, 7).location for run in (kept, deleted, gone)]
    assert all(Path(folder).exists() for folder in folders)
    done = prune(client, *flags)
    assert done.output == result.output.replace("would be deleted", "deleted")
    assert [Path(folder).exists() for folder in folders] == [True, False, False]
    assert at(deleted, 7).is_fully_pruned
    assert run_checkpoints(gone) == []
    assert prune(client, *flags).output == "0 of 0 checkpoints deleted: 0.0 MB\n"
    assert with_files(validated) == list(VALUES)

    client._tracking_client.store._hard_delete_run(deleted.id)
    assert prune(client, *flags).output.endswith("1 of 1 checkpoints deleted: 0.0 MB\n")
    assert run_checkpoints(deleted) == []


def lines_by_run(result: Result) -> list[tuple[str, str]]:
    *each, _ = result.output.splitlines()
    return [(line.split()[1], line.rpartition(": ")[2]) for line in each]


def test_claimed_or_registered_checkpoints_of_deleted_runs_are_kept(
    client: MlflowClient, tmp_path: Path
) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "weights").write_text("1")
    experiment = client.create_experiment(tmp_path.name, str(tmp_path / "artifacts"))
    run = TrackedRun(client, client.create_run(experiment))
    for step in (1, 2, 3):
        publish(run, tmp_path / "encoder", step)
    assert Claims(client, ELSEWHERE).claim(at(run, 1), "val")
    client.create_registered_model(run.id)
    client.create_model_version(run.id, f"models:/{at(run, 2).model_id}")
    client.delete_run(run.id)
    result = prune(client, "--deleted", "--experiment", tmp_path.name)
    assert lines(result) == {
        1: ("keep", "being validated by far:7"),
        2: ("keep", f"registered as {run.id} version 1"),
        3: ("delete", f"run {run.id} is deleted"),
    }
    assert with_files(run) == [1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "pass --run-id and --keep, or pass --deleted"),
        (["--run-id", "1"], "pass --run-id and --keep, or pass --deleted"),
        (["--keep", "last:1"], "pass --run-id and --keep, or pass --deleted"),
        (["--deleted", "--keep", "last:1"], "pass --run-id and --keep, or pass --deleted"),
        (["--deleted", "--unvalidated"], "--metric and --unvalidated need --run-id"),
        (
            ["--run-id", "1", "--keep", "last:1", "--experiment", "x"],
            "--experiment needs --deleted",
        ),
    ],
)
def test_flags_that_do_not_go_together(client: MlflowClient, argv: list[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        prune(client, *argv)


def test_impossible_requests_are_refused_before_any_deletion(validated: TrackedRun) -> None:
    client = validated.client
    with pytest.raises(UsageError, match="unknown rule 'worst:1'"):
        prune(client, "--run-id", validated.id, "--keep", "worst:1")
    with pytest.raises(UsageError, match="no metric 'mrr@5' to choose by; it has: "):
        prune(client, "--run-id", validated.id, "--keep", "best:1", "--metric", "mrr@5")
    with pytest.raises(TrackingError, match="no run 'nowhere'"):
        prune(client, "--run-id", "nowhere", "--keep", "last:1")
    assert with_files(validated) == list(VALUES)


def test_a_validator_keeps_only_the_checkpoints_of_its_policy(
    validated: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy uses the state that the validator saw last, whatever has happened since."""
    seen = run_checkpoints(validated)
    tags = {"mlflow_dr.best.val/mrr_at_10": "0.3"}
    validated.client.set_logged_model_tags(at(validated, 10).model_id, tags)
    with caplog.at_level("INFO", "mlflow_dr"):
        removed = delete_unneeded(validated, seen, parse_keep_rules("best:1,last:1"))
    assert [removal.checkpoint.step for removal in removed] == [0, 30]
    assert with_files(validated) == [10, 20, 40]
    assert caplog.text.count("deleted the files of step ") == 2
    assert (
        delete_unneeded(validated, run_checkpoints(validated), parse_keep_rules("best:1,last:1"))
        == []
    )


def test_removed_checkpoints_are_reported_once(
    validated: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The validator passes in an earlier state; another validator may have removed checkpoints."""
    seen, policy = run_checkpoints(validated), parse_keep_rules("best:1,last:1")
    mine, another = set[str](), set[str]()
    with caplog.at_level("INFO", "mlflow_dr"):
        assert len(delete_unneeded(validated, seen, policy, deleted=mine)) == 3
        assert delete_unneeded(validated, seen, policy, deleted=another) == []
    assert caplog.text.count("deleted the files of step ") == 3
    assert mine == another == {at(validated, step).model_id for step in (0, 10, 30)}
    monkeypatch.setattr("mlflow_dr.decisions.pruning.delete_files", None)
    assert delete_unneeded(validated, seen, policy, deleted=mine) == []


def test_a_checkpoint_that_cannot_be_removed_is_left_for_the_next_call(
    validated: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, refused = LocalArtifactRepository.delete_artifacts, at(validated, 0).model_id

    def refuse(store: LocalArtifactRepository, path: str | None = None) -> None:
        if refused in store.artifact_dir:
            raise OSError("input/output error")
        real(store, path)

    monkeypatch.setattr("mlflow_dr.tracking.pruning.SECONDS_BETWEEN_ATTEMPTS", 0)
    with monkeypatch.context() as broken:
        broken.setattr(LocalArtifactRepository, "delete_artifacts", refuse)
        delete_unneeded(validated, run_checkpoints(validated), parse_keep_rules("last:1"))
    assert with_files(validated) == [0, 40]
    (told,) = caplog.messages
    assert told.endswith("input/output error; this is tried again")
    delete_unneeded(validated, run_checkpoints(validated), parse_keep_rules("last:1"))
    assert with_files(validated) == [40]


def test_missing_permission_to_remove_files_is_reported(
    validated: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: LocalArtifactRepository, path: str | None = None) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mlflow_dr.tracking.pruning.SECONDS_BETWEEN_ATTEMPTS", 0)
    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", refuse)
    with pytest.raises(ForbiddenError, match=r"deleting the files of step 0 .* Permission denied"):
        delete_unneeded(validated, run_checkpoints(validated), parse_keep_rules("last:1"))
