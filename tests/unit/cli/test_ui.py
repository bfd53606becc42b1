"""`mlflow-dr ui`, and the link that it prints."""

import os
import socket
from typing import Any

import click
import pytest
from mlflow import MlflowClient

from mlflow_dr.cli.runs import ui_command
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.status import curves_url
from mlflow_dr.tracking.validations import bind_name


def called(client: MlflowClient, port: int) -> Any:
    argv = ["--port", str(port), "--tracking-uri", client.tracking_uri]
    return ui_command.main(argv, "mlflow-dr", standalone_mode=False)


def test_a_taken_port_is_reported_and_a_free_one_is_suggested(client: MlflowClient) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(click.ClickException, match=rf"port {port} is taken; pass --port \d+"):
            called(client, port)


def test_the_curves_of_the_run_that_was_validated_last_are_named(
    client: MlflowClient,
    run: TrackedRun,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bind_name(run, "val", {})
    client.create_run(experiment)  # later, and not validated
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *argv: started.append(argv))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    called(client, port)
    shown = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs/{run.id}/model-metrics"
    assert f"{shown}?workflowType=machine_learning" in capsys.readouterr().out
    assert started[0][1][-1] == str(port)


def test_a_link_holds_no_secret(run: TrackedRun) -> None:
    shown = curves_url(run, "https://TOKEN@host/mlflow/?t=TOKEN")
    assert shown.startswith(f"https://host/mlflow/#/experiments/{run.experiment_id}/runs/{run.id}/")
    assert "TOKEN" not in shown
