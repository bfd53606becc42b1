"""A real MLflow store (sqlite) for the unit tests; one for all of them, a run for each."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture(scope="session")
def client(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    directory = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, directory / "mlflow.db")
    before = mlflow.get_tracking_uri()
    yield connect(f"sqlite:///{directory}/mlflow.db")
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def experiment(client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    return client.create_experiment("tests", str(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture
def run(client: MlflowClient, experiment: str) -> TrackedRun:
    # MLflow's own names repeat where a test has set the random seed
    return TrackedRun(client, client.create_run(experiment, run_name=f"run-{uuid4()}"))
