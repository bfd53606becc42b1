"""Training in two processes that torchrun starts, on a processor."""

import os
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

STEPS = 10
SECONDS = 600


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def still_directory(tiny_directory: Path, tmp_path_factory: Any) -> Path:
    """The tiny encoder without dropout, because dropout differs between one process and two."""
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.saving import save_encoder

    encoder = load_encoder(tiny_directory)
    encoder.backbone.config.hidden_dropout_prob = 0.0
    encoder.backbone.config.attention_probs_dropout_prob = 0.0
    directory = tmp_path_factory.mktemp("encoders") / "still"
    save_encoder(directory, encoder)
    return directory


@pytest.fixture(scope="module")
def torchrun(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """Starts `mlflow-dr train` in two processes on this machine."""

    def torchrun(*argv: object, **variables: str) -> subprocess.Popen:
        command = ["python", "-m", "torch.distributed.run", "--nproc-per-node", 2]
        command += ["--master-port", free_port(), "-m", "mlflow_dr", "train", *argv]
        return start(*command, **variables)

    return torchrun


@pytest.fixture(scope="module")
def ended(
    torchrun: Callable[..., subprocess.Popen],
    call: Callable[..., subprocess.CompletedProcess],
    collection: Path,
    still_directory: Path,
    empty_store: Path,
    tmp_path_factory: Any,
) -> SimpleNamespace:
    """Two processes, stopped by SIGTERM and resumed, and one process with twice the batch."""
    directory = tmp_path_factory.mktemp("torchrun")
    shutil.copy(empty_store, directory / "mlflow.db")
    uri = f"sqlite:///{directory}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment("torchrun", (directory / "artifacts").as_uri())

    def train_argv(output: str, batch: int) -> list[object]:
        flags = {
            "dataset": collection,
            "model": still_directory,
            "experiment_name": "torchrun",
            "output_dir": directory / output,
            "max_steps": STEPS,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 2,
            "publish_steps": 4,
            "save_steps": 100,
            "logging_steps": 1,
            "p_max_len": 16,
            "bf16": False,
        }
        pairs = [word for name, value in flags.items() for word in (f"--{name}", value)]
        cached = ["--grad_cache", "--gc_p_chunk_size", 5, "--negatives_x_device", "--use_cpu"]
        return [*pairs, *cached]

    first = torchrun(*train_argv("two", 8), MLFLOW_TRACKING_URI=uri)
    printed = []
    for line in first.stdout:
        printed.append(line)
        if line.startswith("step 3 of"):
            os.kill(first.pid, signal.SIGTERM)
    first.stdout.close()
    first.wait(timeout=SECONDS)
    saved = sorted(path.name for path in (directory / "two").glob("checkpoint-*"))
    experiment = client.get_experiment_by_name("torchrun").experiment_id
    (stopped,) = client.search_runs([experiment])
    second = torchrun(*train_argv("two", 8), "--resume_from_checkpoint", MLFLOW_TRACKING_URI=uri)
    resumed, _ = second.communicate(timeout=SECONDS)
    single = call("mlflow-dr", "train", *train_argv("one", 16), MLFLOW_TRACKING_URI=uri)
    assert single.returncode == 0, single.stderr
    runs = client.search_runs([experiment])
    return SimpleNamespace(
        client=client,
        stopped=SimpleNamespace(
            printed="".join(printed), code=first.returncode, run=stopped, saved=saved
        ),
        resumed=SimpleNamespace(printed=resumed, code=second.returncode),
        runs={run.info.run_id for run in runs},
        alone=next(r.info.run_id for r in runs if r.info.run_id != stopped.info.run_id),
    )


def points(client: MlflowClient, run_id: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(run_id, "train/loss")
    return sorted((point.step, point.value) for point in history)


def test_sigterm_to_torchrun_ends_both_processes_after_one_step(ended: SimpleNamespace) -> None:
    """With something to resume from, and no traceback but torchrun's own."""
    stopped = ended.stopped
    assert stopped.run.info.status == "KILLED", stopped.printed
    (saved,) = stopped.saved
    step = int(saved.removeprefix("checkpoint-"))
    assert 3 <= step < STEPS
    assert f"step {step} published" in stopped.printed
    assert not [
        traceback
        for traceback in stopped.printed.split("Traceback")[1:]
        if "mlflow_dr/" in traceback
    ]


def test_a_stopped_and_resumed_training_is_one_run(ended: SimpleNamespace) -> None:
    assert ended.resumed.code == 0, ended.resumed.printed
    run_id = ended.stopped.run.info.run_id
    assert ended.runs == {run_id, ended.alone}
    assert ended.client.get_run(run_id).info.status == "FINISHED"
    assert f"resuming run {run_id} from {ended.stopped.saved[0]}" in ended.resumed.printed


def test_the_losses_equal_one_process_with_the_whole_batch(ended: SimpleNamespace) -> None:
    """Each step has one point although two processes log; fp32 losses agree to about 1e-4."""
    ours = points(ended.client, ended.stopped.run.info.run_id)
    expected = points(ended.client, ended.alone)
    assert [step for step, _ in ours] == [step for step, _ in expected] == [*range(1, STEPS + 1)]
    values = [value for _, value in expected]
    assert [value for _, value in ours] == pytest.approx(values, rel=1e-3)
    assert len(set(values)) == STEPS


def test_each_step_is_published_once(ended: SimpleNamespace) -> None:
    run = ended.stopped.run.info
    models = ended.client.search_logged_models(
        [run.experiment_id], f"source_run_id = '{run.run_id}'"
    )
    steps = Counter(int(model.tags["mlflow_dr.step"]) for model in models)
    stopped = int(ended.stopped.saved[0].removeprefix("checkpoint-"))
    assert set(steps.values()) == {1}
    assert set(steps) == {0, 4, 8, STEPS, stopped}
    assert {str(model.status) for model in models} == {"READY"}


def test_only_the_first_process_logs(ended: SimpleNamespace) -> None:
    lines = Counter(ended.resumed.printed.splitlines())
    spoken = [line for line in lines if line.startswith("step ") and " of " in line]
    assert len(spoken) == STEPS - int(ended.stopped.saved[0].removeprefix("checkpoint-"))
    assert {lines[line] for line in spoken} == {1}
