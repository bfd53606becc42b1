"""`mlflow run .` and `mlflow-dr run`: a trainer and a validator side by side."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from mlflow import MlflowClient

Call = Callable[..., subprocess.CompletedProcess]
Start = Callable[..., subprocess.Popen]
REPOSITORY = Path(__file__).parents[2]
EXPERIMENT = "side by side"
FOREVER = {"model": "tiny", "max_steps": 100_000, "publish_steps": 20, "p_max_len": 32}


@pytest.fixture(scope="module")
def store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """A store in a sqlite file, as a user has it who runs no server."""
    directory = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, directory / "mlflow.db")
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    client.create_experiment(EXPERIMENT, str(directory / "artifacts"))
    return client


@pytest.fixture(scope="module")
def variables(store: MlflowClient) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": store.tracking_uri, "MLFLOW_EXPERIMENT_NAME": EXPERIMENT}


def project_run(
    collection: Path, output: Path, entry: str = "main", **parameters: object
) -> list[object]:
    """`mlflow run` of this repository."""
    argv: list[object] = ["mlflow", "run", REPOSITORY, "--env-manager", "local", "-e", entry]
    for name, value in {"dataset": collection, "output_dir": output, **parameters}.items():
        argv += ["-P", f"{name}={value}"]
    return argv


def runs_of(store: MlflowClient) -> list:
    """All runs, the latest first."""
    experiment = store.get_experiment_by_name(EXPERIMENT)
    return store.search_runs([experiment.experiment_id])


@pytest.fixture(scope="module")
def project(
    call: Call,
    store: MlflowClient,
    variables: dict[str, str],
    collection: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """What `mlflow run .` left behind: the finished process and its run."""
    argv = project_run(
        collection,
        tmp_path_factory.mktemp("outputs"),
        model="tiny",
        max_steps=12,
        publish_steps=4,
        per_device_train_batch_size=16,
        learning_rate="2e-3",
        poll_seconds=0.2,
    )
    done = call(*argv, **variables)
    (run,) = runs_of(store)
    return SimpleNamespace(done=done, run=run)


def test_mlflow_run_trains_and_validates_every_checkpoint(
    project: SimpleNamespace, store: MlflowClient, points: Callable, checkpoints: Callable
) -> None:
    assert project.done.returncode == 0, project.done.stdout + project.done.stderr
    assert project.run.info.status == "FINISHED"
    run_id = project.run.info.run_id
    assert list(checkpoints(store, run_id)) == [0, 4, 8, 12]
    found = points(store, run_id, "val")
    assert {"mrr_at_10", "ndcg_at_10", "recall_at_100", "lag_seconds"} <= found.keys()
    for by_step in found.values():
        assert {step: len(values) for step, values in by_step.items()} == {0: 1, 4: 1, 8: 1, 12: 1}


def test_parameters_stay_as_mlflow_run_logged_them(
    project: SimpleNamespace, collection: Path
) -> None:
    params = project.run.data.params
    assert params["dataset"] == str(collection)
    assert params["model"] == "tiny"
    assert params["learning_rate"] == "2e-3"  # what `mlflow run` wrote, not 0.002
    assert params["poll_seconds"] == "0.2"
    assert params["validation_split"] == "dev"  # added by the trainer
    assert project.run.data.tags["mlflow.project.entryPoint"] == "main"
    assert project.run.data.tags["mlflow_dr.command"] in ("run", "train")


def test_the_run_ends_with_a_summary(
    project: SimpleNamespace, store: MlflowClient, points: Callable, checkpoints: Callable
) -> None:
    run_id, printed = project.run.info.run_id, project.done.stdout
    assert f"run {run_id}: 4 checkpoints validated" in printed
    curve = points(store, run_id, "val")["mrr_at_10"]
    for what, step in (("first", 0), ("last", 12)):
        assert re.search(rf"  {what} +step {step} +mrr_at_10 {curve[step][0]:.4f}  ndcg", printed)
    (best,) = re.findall(r"best checkpoint by mrr_at_10: models:/(\S+)", printed)
    models = {model.model_id: step for step, model in checkpoints(store, run_id).items()}
    assert curve[models[best]] == max(curve.values())
    assert f"curves: mlflow server --backend-store-uri {store.tracking_uri}" in printed
    (report,) = re.findall(r"^report: (\S+)$", printed, re.MULTILINE)
    assert project.run.info.run_name in Path(report).read_text()


def test_tevatrons_flags_are_parameters_of_the_training_entry(
    call: Call,
    store: MlflowClient,
    variables: dict[str, str],
    collection: Path,
    checkpoints: Callable,
    tmp_path: Path,
) -> None:
    flags = {
        "model_name_or_path": "tiny",
        "do_train": True,
        "train_n_passages": 1,
        "q_max_len": 8,
        "p_max_len": 16,
        "grad_cache": True,
        "gc_q_chunk_size": 2,
        "gc_p_chunk_size": 3,
        "save_steps": 2,
        "max_steps": 2,
    }
    done = call(*project_run(collection, tmp_path, "train", **flags), **variables)
    assert done.returncode == 0, done.stderr
    run = runs_of(store)[0]
    assert run.data.params.items() >= {(name, str(value)) for name, value in flags.items()}
    assert list(checkpoints(store, run.info.run_id)) == [0, 2]
    assert (tmp_path / "checkpoint-2" / "model.safetensors").is_file()


def test_a_bad_flag_of_the_trainer_ends_the_run_at_once(
    call: Call, store: MlflowClient, variables: dict[str, str], collection: Path, tmp_path: Path
) -> None:
    done = call(*project_run(collection, tmp_path, no_such_flag=1), **variables)
    assert done.returncode != 0
    assert re.search(r"^error: unknown flag --no_such_flag; .*", done.stderr, re.MULTILINE)
    assert runs_of(store)[0].info.status == "FAILED"


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_ctrl_c_stops_trainer_and_validator_after_the_step(
    start: Start,
    store: MlflowClient,
    variables: dict[str, str],
    environment: dict[str, str],
    collection: Path,
    tmp_path: Path,
) -> None:
    argv = project_run(collection, tmp_path, **FOREVER, poll_seconds=0.2)
    process = start(*argv, **variables, PATH=environment["PATH"])  # with real children
    for line in process.stdout:
        if line.startswith("[validate] step 0: "):
            break
    started = descendants(process)
    assert {"train", "validate"} <= {word for process in started for word in process.cmdline()}
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    printed, _ = process.communicate(timeout=600)
    assert time.monotonic() - asked < 300
    assert process.returncode != 0
    assert "training killed" in printed, printed
    assert "Traceback" not in printed
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    # killed by us; `mlflow run` then writes FAILED over it (its check for an end never holds, 3.17)
    assert runs_of(store)[0].info.status in ("KILLED", "FAILED")


def test_a_stop_before_training_begins_marks_the_run_as_killed(
    start: Start,
    store: MlflowClient,
    variables: dict[str, str],
    environment: dict[str, str],
    collection: Path,
) -> None:
    argv = [word for key, value in FOREVER.items() for word in (f"--{key}", value)]
    path = environment["PATH"]  # so that its children take their time to begin
    process = start("mlflow-dr", "run", "--dataset", collection, *argv, **variables, PATH=path)
    deadline = time.monotonic() + 600
    while len(descendants(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    started = descendants(process)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=600)
    assert time.monotonic() - asked < 300
    assert process.returncode == 130, printed
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    assert runs_of(store)[0].info.status == "KILLED"


SEVERAL = """
import sys
from mlflow_dr import launch
from mlflow_dr.validation.config import RunConfig

one_core = {"OMP_NUM_THREADS": "1"}
launch.share_machine = lambda trainers: (one_core, {}, "cpu")
flags = "--dataset {0} --output_dir {1} --model {2} --max_steps 4 --publish_steps 2"
flags += " --logging_steps 1 --per_device_train_batch_size 4 --p_max_len 16 --negatives_x_device"
flags += " --use_cpu --fsdp full_shard"
config = RunConfig(measures="mrr@10", poll_seconds=0.2, gpus=2)
launch.launch(config, flags.format(*sys.argv[1:]).split())
"""


def test_several_training_processes_use_torchrun_and_write_one_run(
    call: Call,
    store: MlflowClient,
    collection: Path,
    tiny_directory: Path,
    tmp_path: Path,
    points: Callable,
    checkpoints: Callable,
) -> None:
    """Two processes on the processor, where `--gpus 2` would put each on a GPU.

    Their sharded weights (FSDP) are published complete: at the start the encoder that went in, and
    at the end another.
    """
    from mlflow_dr.encoder.directory import load_encoder

    experiment = store.create_experiment("several", (tmp_path / "artifacts").as_uri())
    done = call(
        *("python", "-c", SEVERAL, collection, tmp_path / "outputs", tiny_directory),
        MLFLOW_TRACKING_URI=store.tracking_uri,
        MLFLOW_EXPERIMENT_NAME="several",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = store.search_runs([experiment])
    assert run.info.status == "FINISHED"
    losses = store.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in losses) == [1, 2, 3, 4]
    assert sorted(points(store, run.info.run_id, "val")["mrr_at_10"]) == [0, 2, 4]
    published = checkpoints(store, run.info.run_id)
    assert {step: model.status.name for step, model in published.items()} == dict.fromkeys(
        (0, 2, 4), "READY"
    )
    before, first, last = (
        load_encoder(directory).state_dict()
        for directory in (
            tiny_directory,
            *(Path(published[step].artifact_location.removeprefix("file://")) for step in (0, 4)),
        )
    )
    assert before.keys() == first.keys() == last.keys()
    assert all(before[name].equal(first[name]) for name in before)
    assert not all(before[name].equal(last[name]) for name in before)


def test_a_training_without_improvement_ends_early(
    call: Call,
    store: MlflowClient,
    variables: dict[str, str],
    collection: Path,
    tmp_path: Path,
    points: Callable,
) -> None:
    """On a subset, whose curve is shown; no measure rises by more than 1."""
    flags = {**FOREVER, "publish_steps": 40, "per_device_train_batch_size": 8}
    flags |= {"dataset": collection, "output_dir": tmp_path / "output", "poll_seconds": 0.2}
    flags |= {"subset": "random:50", "patience": 2, "min_delta": 1}
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    done = call("mlflow-dr", "run", *argv, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    run = runs_of(store)[0]
    assert run.info.status == "FINISHED"
    reason = run.data.tags["mlflow_dr.stop_request"]
    assert reason.startswith("val-random_50/mrr_at_10 has not risen by more than 1")
    assert f"training ended as asked: {reason}" in done.stdout + done.stderr
    curve = points(store, run.info.run_id, "val-random_50")["mrr_at_10"]
    assert f"run {run.info.run_id}: {len(curve)} checkpoints validated" in done.stdout
    best = max(curve, key=lambda step: (curve[step][0], -step))
    assert run.data.tags["mlflow_dr.best.val-random_50"].startswith(f"step {best}, models:/")
