"""`mlflow-dr best` and `compare` as real commands, over a real server."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.errors import NoValuesError
from mlflow_dr.tracking.artifacts import log_per_query_values, per_query_values
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name

Call = Callable[..., subprocess.CompletedProcess]
NAME = "sea and harbour"
RANKS = {10: [0.0, 0.5, 1.0, 0.25], 20: [1.0, 0.5, 0.5, 1.0]}


@pytest.fixture
def run(client: MlflowClient, tmp_path: Path) -> TrackedRun:
    """Two checkpoints with values of single queries, and one without."""
    run = TrackedRun(client, client.create_run(client.create_experiment(str(tmp_path))))
    bind_name(run, NAME, {"measures": "mrr@10", "topics": "0"})
    directory = tmp_path / "published"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    for step in (10, 20, 30):
        publish(run, directory, step)
    for checkpoint in run_checkpoints(run):
        ranks = RANKS.get(checkpoint.step, [0.0])
        record_result(run, checkpoint, NAME, {"mrr_at_10": sum(ranks) / len(ranks)}, ("sea", "0"))
        if checkpoint.step in RANKS:
            values = {f"q{query}": {"mrr@10": rank} for query, rank in enumerate(ranks)}
            log_per_query_values(run, checkpoint, NAME, values)
            log_per_query_values(run, checkpoint, NAME, values)
            assert per_query_values(run, checkpoint, NAME) == values
        else:
            with pytest.raises(NoValuesError, match="no values of single queries for step 30"):
                per_query_values(run, checkpoint, NAME)
    return run


def test_best_is_shown_marked_downloaded_and_registered(
    run: TrackedRun, call: Call, server: str, client: MlflowClient, tmp_path: Path
) -> None:
    target = tmp_path / "best"
    flags = ["--run-id", run.id, "--download", target, "--register", "sea"]
    done = call("mlflow-dr", "best", *flags, MLFLOW_TRACKING_URI=server)
    assert done.returncode == 0, done.stderr
    best = run_checkpoints(run)[1]
    first, second, third, *_ = done.stdout.splitlines()
    assert first == (
        f"best checkpoint of run {run.id} by {NAME}/mrr_at_10: step 20, {best.uri}, 0.7500"
    )
    assert second.startswith("  runner-up   step 10, ")
    assert third.startswith("  difference  +0.3125 over 4 queries, 95 % interval ")
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert best.tags[f"mlflow_dr.best.{NAME}"] == "0.75"
    assert client.get_model_version_by_alias("sea", "best").source == best.uri


def test_steps_of_a_run_are_compared(
    run: TrackedRun, call: Call, server: str, tmp_path: Path
) -> None:
    flags = [f"{run.id}@10", f"{run.id}@20", "--name", NAME, "--output", tmp_path / "compared"]
    done = call("mlflow-dr", "compare", *flags, "--tracking-uri", server)
    assert done.returncode == 0, done.stderr
    assert "B - A  mrr@10 +0.3125, 95 % interval " in done.stdout
    assert "2 better, 1 worse, 1 equal" in done.stdout
    assert {path.name for path in (tmp_path / "compared").iterdir()} == {
        "values.csv",
        "differences.png",
    }
    flags[1], flags[-1] = f"{run.id}@30", tmp_path / "another"
    done = call("mlflow-dr", "compare", *flags, "--tracking-uri", server)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: run {run.id} has no values of single queries for step ")
