"""What commands write to the run that `mlflow run` has made for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr.cli.collections import mine_command
from mlflow_dr.cli.evaluate import evaluate_command
from mlflow_dr.cli.validate import validate_command
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import MlflowDrError
from mlflow_dr.tracking.checkpoints import publish
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun


@pytest.fixture
def project(client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    """A run of `mlflow run`'s, as a command finds it."""
    run = TrackedRun(client, client.create_run(experiment))
    monkeypatch.setenv(RUN_VARIABLE, run.id)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(client.tracking_uri)
    yield run
    mlflow.set_tracking_uri(before)


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> Path:
    texts = {"p1": "gulls fly", "p2": "tugs pull", "p3": "liners sail"}
    judged = {"q": {"p1": 1}}
    return beir_folder(texts, {"q": "what flies"}, dev=judged, train=judged)


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", make_tiny(pooling="mean"))
    return tmp_path / "encoder"


def called(command: Any, *argv: object) -> Any:
    return command.main([str(word) for word in argv], "mlflow-dr", standalone_mode=False)


def artifact(run: TrackedRun, name: str) -> str:
    uri = run.fetch().info.artifact_uri
    return mlflow.artifacts.load_text(f"{uri}/{name}")


def test_evaluate_logs_its_report(project: TrackedRun, folder: Path, encoder: Path) -> None:
    called(evaluate_command, encoder, "--dataset", folder, "--measures", "mrr@10")
    report = json.loads(artifact(project, "report.json"))
    metrics = project.fetch().data.metrics
    assert metrics["mrr_at_10"] == report["measures"]["mrr@10"]
    assert report["queries"].keys() == {"q"}


def test_mine_logs_its_negatives(project: TrackedRun, folder: Path, tmp_path: Path) -> None:
    called(mine_command, "--dataset", folder, "--output", tmp_path / "mined.jsonl")
    assert project.fetch().data.metrics == {}
    assert "1 queries with" in artifact(project, "mined.txt")


def test_validate_logs_its_work_on_another_run(
    project: TrackedRun,
    client: MlflowClient,
    experiment: str,
    folder: Path,
    encoder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = TrackedRun(client, client.create_run(experiment, run_name="one of these tests"))
    publish(run, encoder, 5)
    argv = ["--dataset", folder, "--measures", "mrr@10", "--once", "--device", "cpu"]
    assert called(validate_command, "--run-id", "one of these tests", *argv) == 0
    assert project.fetch().data.metrics == {}
    assert artifact(project, "validated.txt").startswith("validated 1 checkpoints of run ")
    link = f"#/experiments/{experiment}/runs/{run.id}/model-metrics?workflowType=machine_learning"
    assert link in capsys.readouterr().err


def test_existing_files_are_not_overwritten(
    folder: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    path = tmp_path / "report.json"
    path.write_text("mine")
    for flag in ("--output", "--ranking"):
        with pytest.raises(MlflowDrError, match="exists already; --force replaces it"):
            called(evaluate_command, encoder, "--dataset", folder, flag, path)
    assert path.read_text() == "mine"
    argv = ["--output", path, "--force", "--measures", "mrr@10"]
    called(evaluate_command, encoder, "--dataset", folder, *argv)
    assert json.loads(path.read_text())["measures"]
