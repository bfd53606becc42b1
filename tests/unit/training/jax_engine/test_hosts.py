"""Two processes of two devices each, held against one process with four."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from forks import Forks
from mlflow import MlflowClient

from mlflow_dr.errors import UsageError
from mlflow_dr.jax_engine import devices
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.train import train

Make = Callable[..., Any]
N_STEPS = 10


@pytest.fixture
def flags(folder: Path, saved: Path, experiment_name: str) -> list[str]:
    given = {
        "engine": "jax",
        "model": saved,
        "dataset": folder,
        "experiment_name": experiment_name,
        "max_steps": N_STEPS,
        "per_device_train_batch_size": 1,
        "negatives_x_device": True,
        "logging_steps": 1,
        "publish_steps": N_STEPS // 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "dropout": 0.1,
    }
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def losses(client: MlflowClient, run_id: str) -> list[float]:
    mlflow.flush_async_logging()
    history = client.get_metric_history(run_id, "train/loss")
    return [point.value for point in sorted(history, key=lambda point: point.step)]


def test_two_hosts_train_as_one(
    client: MlflowClient, experiment: str, flags: list[str], forks: Forks, tmp_path: Path
) -> None:
    """The same losses, with dropout; one run; each step is published once."""
    alone = train(parse_training([*flags, "--output_dir", str(tmp_path / "alone")]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=4", "count=2"),
        "JAX_PLATFORMS": "cpu",
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
    }
    hosts = ["--coordinator", coordinator, "--n_hosts", "2", "--output_dir", str(tmp_path / "two")]
    logs = [tmp_path / f"{index}.log" for index in range(2)]
    with ExitStack() as files:
        processes = [
            forks.start(
                *("mlflow-dr", "train", *flags, *hosts, "--host_index", str(index)),
                variables=variables,
                directory=tmp_path,
                output=files.enter_context(log.open("w")),
            )
            for index, log in enumerate(logs)
        ]
        codes = [process.wait(300) for process in processes]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    runs = [run for run in client.search_runs([experiment]) if run.info.run_id != alone]
    assert len(runs) == 1
    assert len(losses(client, alone)) == N_STEPS
    np.testing.assert_allclose(
        losses(client, runs[0].info.run_id), losses(client, alone), atol=1e-5
    )
    for run_id in (alone, runs[0].info.run_id):
        found = run_checkpoints(TrackedRun(client, client.get_run(run_id)))
        assert sorted(checkpoint.step for checkpoint in found) == [0, N_STEPS // 2, N_STEPS]
        assert all(checkpoint.ready for checkpoint in found)


def test_torchruns_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start it without torchrun"):
        devices.join_hosts(None, None, None)


def test_a_coordinator_needs_the_number_of_hosts() -> None:
    with pytest.raises(UsageError, match="needs --n_hosts and --host_index"):
        devices.join_hosts("127.0.0.1:1", None, 0)
