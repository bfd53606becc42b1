"""A real MLflow store (sqlite) for the unit tests: an experiment for a file, a run for a test."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.tracking import fluent

from mlflow_dr.tracking.artifacts import log_per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name

MEASURES = "mrr@10 ndcg@10"


@pytest.fixture(scope="session")
def client(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    directory = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, directory / "mlflow.db")
    before = mlflow.get_tracking_uri()
    yield connect(f"sqlite:///{directory}/mlflow.db")
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def experiment(client: MlflowClient, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for each file of tests: of data sets with one name and digest, it keeps the first."""
    name = f"tests-{uuid4()}"
    return client.create_experiment(name, str(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture(scope="module")
def experiment_name(client: MlflowClient, experiment: str) -> str:
    return str(client.get_experiment(experiment).name)


@pytest.fixture
def run(client: MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    # a test elsewhere may have left an experiment active, and MLflow refuses runs of others then
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    # MLflow's own names repeat where a test has set the random seed
    return TrackedRun(client, client.create_run(experiment, run_name=f"run-{uuid4()}"))


@pytest.fixture
def measured(run: TrackedRun, tmp_path: Path) -> Callable[..., Checkpoint]:
    """Publishes the checkpoint of a step and records a validation of it.

    Its arguments: the step, the figure, and as keywords the reciprocal ranks of queries q0, q1 ...
    if they are kept, the validation's name, and half of the interval if the figure is an estimate.
    """
    directory = tmp_path / "published"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")

    def measured(
        step: int,
        value: float,
        ranks: Sequence[float] | None = None,
        name: str = "val",
        error: float = 0.0,
    ) -> Checkpoint:
        bind_name(run, name, {"measures": MEASURES})
        published = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step]
        if not published:
            publish(run, directory, step)
        checkpoint = next(
            checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step
        )
        figures = {"mrr_at_10": value, "ndcg_at_10": 1 - value, "seconds": 2.0}
        if error:
            figures |= {"mrr_at_10/low": value - error, "mrr_at_10/high": value + error}
        record_result(run, checkpoint, name, figures, ("sea", "0"))
        if ranks is not None:
            log_per_query_values(run, checkpoint, name, per_query(ranks))
        return next(checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step)

    return measured


def per_query(ranks: Sequence[float]) -> Mapping[str, Mapping[str, float]]:
    return {f"q{n}": {"mrr@10": value, "ndcg@10": 1 - value} for n, value in enumerate(ranks)}
