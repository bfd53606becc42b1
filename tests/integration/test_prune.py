"""Pruning over HTTP: the server proxies artifacts, and runs are deleted as MLflow deletes them."""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

Forked = Callable[..., SimpleNamespace]
LINE = re.compile(r"step (\d+)  models:/m-\w+  ([\d.]+) MB in (\d+) files  (delete|keep): (.+)")


def decisions(printed: list[str]) -> dict[int, tuple[str, str]]:
    """Step -> `delete` or `keep`, and why."""
    found = [match for line in printed if (match := LINE.fullmatch(line))]
    return {int(match[1]): (match[4], match[5]) for match in found}


def files(store: Path, model_id: str) -> list[Path]:
    return [path for path in store.rglob("*") if path.is_file() and model_id in path.parts]


def test_pruning_keeps_the_best_checkpoint_and_all_figures(
    forked: Forked,
    publish_noise: Callable[..., str],
    checkpoints: Callable,
    points: Callable,
    client: MlflowClient,
    artifact_store: Path,
    collection: Path,
) -> None:
    run_id = publish_noise(1, 2, 3)
    assert forked("validate", "--run-id", run_id).code == 0
    figures = points(client, run_id, "val")
    values = {step: value for step, (value,) in figures["mrr_at_10"].items()}
    best = max(values, key=lambda step: (values[step], -step))
    models = checkpoints(client, run_id)
    everything = {path for path in artifact_store.rglob("*") if path.is_file()}
    theirs = {step: set(files(artifact_store, model.model_id)) for step, model in models.items()}

    argv = ("prune", "--run-id", run_id, "--keep", "best:1")
    dry, real = forked(*argv, "--dry-run"), forked(*argv)
    assert (dry.code, real.code) == (0, 0), (dry.printed, real.printed)
    assert real.printed == [line.replace("would be deleted", "deleted") for line in dry.printed]
    assert decisions(real.printed) == {
        step: ("keep", "tagged as best by val")
        if step == best
        else ("delete", "no rule of best:1 keeps it")
        for step in (1, 2, 3)
    }
    left = {path for path in artifact_store.rglob("*") if path.is_file()}
    assert everything - left == set().union(*(theirs[step] for step in values if step != best))
    assert points(client, run_id, "val") == figures

    argv = ("--dataset", collection, "--split", "dev")
    evaluated = forked("evaluate", f"models:/{models[best].model_id}", *argv)
    assert evaluated.printed[0].split() == ["mrr@10", f"{values[best]:.4f}"]
    other = min(set(values) - {best})
    ended = forked("evaluate", f"models:/{models[other].model_id}", *argv)
    assert ended.code == 1
    assert "its files were deleted" in ended.printed[-1]
    shown = forked("status", "--run-id", run_id, "--all").printed
    states = [line.split() for line in shown[3:]]  # after the run, its validation and the heads
    assert [state[2] for state in states] == ["done"] * 3
    assert sum(state[-1] == "pruned" for state in states) == 2


@pytest.mark.parametrize("moment", ["before-removing", "after-removing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_prune_is_finished_by_the_next(
    forked: Forked,
    publish_noise: Callable[..., str],
    checkpoints: Callable,
    client: MlflowClient,
    artifact_store: Path,
    moment: str,
    number: signal.Signals,
) -> None:
    run_id = publish_noise(1, 2)
    argv = ("prune", "--run-id", run_id, "--keep", "last:1", "--unvalidated")
    ended = forked(*argv, die=(moment, number))
    if number is signal.SIGINT:
        assert (ended.code, ended.printed[-1]) == (130, "stopped")
    assert checkpoints(client, run_id)[1].tags["mlflow_dr.pruned"] == "begun"
    again = forked(*argv)
    assert again.code == 0
    assert decisions(again.printed) == {
        1: ("delete", "its deletion was interrupted"),
        2: ("keep", "last"),
    }
    models = checkpoints(client, run_id)
    assert models[1].tags["mlflow_dr.pruned"].startswith("20")
    assert [bool(files(artifact_store, models[step].model_id)) for step in (1, 2)] == [False, True]


def test_files_that_mlflow_leaves_of_deleted_runs_are_removed(
    spare_server: Any,
    publish_noise: Callable[..., str],
    call: Callable[..., subprocess.CompletedProcess],
    forked: Forked,
) -> None:
    """After `mlflow gc` the server still lists checkpoints of deleted runs."""
    uri, store = spare_server.uri, spare_server.store
    client = MlflowClient(uri)
    experiment = client.create_experiment("of three runs")
    kept, deleted, gone = (
        publish_noise(step, client=client, experiment=experiment) for step in (1, 2, 3)
    )
    client.delete_run(gone)
    collected = call(
        *("mlflow", "gc", "--tracking-uri", uri),
        *("--backend-store-uri", f"sqlite:///{spare_server.directory}/mlflow.db"),
        *("--artifacts-destination", store),
        MLFLOW_TRACKING_URI=uri,
    )
    assert collected.returncode == 0, collected.stderr
    client.delete_run(deleted)
    models = {model.source_run_id: model for model in client.search_logged_models([experiment])}
    assert set(models) == {kept, deleted, gone}
    assert all(files(store, model.model_id) for model in models.values())

    argv = ("prune", "--deleted", "--tracking-uri", uri)
    dry, real = forked(*argv, "--dry-run"), forked(*argv)
    assert (dry.code, real.code) == (0, 0), (dry.printed, real.printed)
    assert (
        decisions(real.printed)
        == decisions(dry.printed)
        == {
            2: ("delete", f"run {deleted} is deleted"),
            3: ("delete", f"run {gone} is gone"),
        }
    )
    remaining = {run for run, model in models.items() if files(store, model.model_id)}
    assert remaining == {kept}
    listed = {model.source_run_id for model in client.search_logged_models([experiment])}
    assert listed == {kept, deleted}


@pytest.mark.parametrize("argv", [("--deleted",), ("--run-id", "1", "--keep", "last:1")])
def test_an_unreachable_server_is_one_line(forked: Forked, argv: tuple[str, ...]) -> None:
    ended = forked("prune", *argv, "--tracking-uri", "http://127.0.0.1:9")
    assert ended.code == 1
    (line,) = ended.printed
    assert line.startswith("error: tracking server http://127.0.0.1:9 does not answer")
