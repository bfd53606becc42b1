"""Validators that encode elsewhere: in several processes, and on a Ray cluster."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil
import pytest
from mlflow import MlflowClient

QUALITY = ("mrr_at_10", "ndcg_at_10", "recall_at_100")
STEPS = [1, 2]


@pytest.fixture
def short_folder() -> Iterator[str]:
    """A folder for Ray, whose sockets have paths of up to 107 bytes."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-", ignore_cleanup_errors=True) as name:
        yield name


def encoding(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    """The processes below one that encode for it."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_validator_on_ray_loses_an_actor_and_writes_all_points(
    publish_noise: Callable[..., str],
    start: Callable[..., subprocess.Popen],
    forked: Callable,
    points: Callable,
    client: MlflowClient,
    server: str,
    short_folder: str,
) -> None:
    pytest.importorskip("ray")
    run_id = publish_noise(*STEPS)
    assert forked("validate", "--run-id", run_id, "--name", "calm").code == 0
    validator = start(
        *(sys.executable, "-m", "mlflow_dr", "validate", "--run-id", run_id),
        *("--engine", "ray", "--order", "oldest"),
        MLFLOW_TRACKING_URI=server,
        OMP_NUM_THREADS="2",  # two actors
        RAY_TMPDIR=short_folder,
        RAY_AUTH_TOKEN="a" * 32,
    )
    printed = []
    for line in validator.stdout:
        printed.append(line)
        if line.startswith("step 1:"):
            started = psutil.Process(validator.pid).children(recursive=True)
            actors = encoding(validator, "ray::ShardActor")
            assert len(actors) == 2
            actors[0].send_signal(signal.SIGKILL)
    assert validator.wait() == 0, printed
    assert not any("Traceback" in line for line in printed)
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left
    on_ray, calm = points(client, run_id, "val"), points(client, run_id, "calm")
    for metric in QUALITY:
        assert sorted(on_ray[metric]) == STEPS
        assert on_ray[metric] == calm[metric]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_validator_that_is_stopped_leaves_no_processes(
    number: signal.Signals,
    publish_noise: Callable[..., str],
    start: Callable[..., subprocess.Popen],
    server: str,
) -> None:
    run_id = publish_noise(1, status="RUNNING")
    validator = start(
        *("mlflow-dr", "validate", "--run-id", run_id),
        *("--device", "cpu,cpu", "--poll-seconds", "0.2"),
        MLFLOW_TRACKING_URI=server,
    )
    printed = []
    for line in validator.stdout:
        printed.append(line)
        if line.startswith("step 1:"):
            children = encoding(validator, "multiprocessing")
            assert len(children) >= 2
            # not by `validator.kill`, which kills the children, too
            (os.killpg if number == signal.SIGINT else os.kill)(validator.pid, number)
    validator.wait()
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running()]
    assert not any("Traceback" in line for line in printed), printed
