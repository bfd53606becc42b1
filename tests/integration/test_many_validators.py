"""Several validators on one run, and a server that is away for a while."""

import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

Forked = Callable[..., SimpleNamespace]


def evaluated(printed: list[str]) -> Counter[int]:
    """How often each step was evaluated."""
    return Counter(int(match[1]) for line in printed if (match := re.match(r"step (\d+): ", line)))


def test_eight_simultaneous_validators_evaluate_each_checkpoint_once(
    forked: Forked, publish_noise: Callable[..., str], points: Callable, client: MlflowClient
) -> None:
    steps = list(range(16))
    run_id = publish_noise(*steps)
    ended = forked("validate", "--run-id", run_id, "--poll-seconds", 0.5, times=8)
    assert ended.codes == [0] * 8, ended.printed
    assert evaluated(ended.printed) == dict.fromkeys(steps, 1)
    for metric, by_step in points(client, run_id, "val").items():
        assert {step: len(values) for step, values in by_step.items()} == dict.fromkeys(steps, 1), (
            metric
        )


def test_the_server_is_unreachable_when_an_evaluation_ends(
    forked: Forked,
    spare_server: Any,
    publish_noise: Callable[..., str],
    points: Callable,
) -> None:
    """The validator holds before it records; then the server is killed, and comes back."""
    client = MlflowClient(spare_server.uri)
    run_id = publish_noise(1, 2, client=client)

    def kill_server(pid: int) -> None:
        while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
        spare_server.kill()
        os.kill(pid, signal.SIGCONT)

    def serve_again(pid: int) -> None:
        time.sleep(1)
        spare_server.start_again()

    ended = forked(
        *("validate", "--run-id", run_id, "--poll-seconds", 0.3),
        *("--tracking-uri", spare_server.uri),
        die=("before-recording-2", signal.SIGSTOP),
        then={"step 1: ": kill_server, "warning: ": serve_again},
    )
    assert ended.code == 0, ended.printed
    assert evaluated(ended.printed) == {1: 1, 2: 1}
    assert sum("waiting for the server" in line for line in ended.printed) == 1
    assert "the server answers again" in ended.printed
    for metric, by_step in points(client, run_id, "val").items():
        assert {step: len(values) for step, values in by_step.items()} == {1: 1, 2: 1}, metric


def test_status_shows_who_did_what(
    forked: Forked, publish_noise: Callable[..., str], client: MlflowClient
) -> None:
    run_id = publish_noise(10, 20)
    assert forked("validate", "--run-id", run_id, "--every", 20).code == 0
    ended = forked("status", "--run-id", run_id, "--all")
    assert ended.code == 0
    _, _, head, first, second = (line.split() for line in ended.printed)
    assert head == ["step", "validation", "state", "figure", "owner", "age", "lag", "note"]
    assert first[:4] == ["10", "val", "open", "-"]
    assert second[:4] == ["20", "val", "done", "mrr_at_10"]
    assert second[5].startswith(f"{os.uname().nodename}:")


def test_checkpoints_saved_by_sentence_transformers_are_validated(
    forked: Forked, collection: Path, tiny_directory: Path, client: MlflowClient, tmp_path: Path
) -> None:
    """Into a run of its own; a stray file and a checkpoint that is cut off are passed over."""
    from sentence_transformers import SentenceTransformer

    output = tmp_path / "output"
    for step in (20, 40):
        SentenceTransformer(str(tiny_directory), device="cpu").save(
            str(output / f"checkpoint-{step}")
        )
    shutil.copytree(output / "checkpoint-40", output / "checkpoint-60")
    weights = output / "checkpoint-60" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (output / "README.md").write_text("1")
    flags = ["--checkpoints-dir", output, "--dataset", collection, "--once"]
    ended = forked("validate", *flags)
    assert ended.code == 0, ended.printed
    assert sorted(evaluated(ended.printed)) == [20, 40]
    (run_id,) = [line.split()[1] for line in ended.printed if re.match(r"run \w+ \(", line)]
    assert client.get_run(run_id).info.status == "FINISHED"
    published = forked("evaluate", output / "checkpoint-20", "--dataset", collection).printed
    assert published[0].startswith("mrr@10")
    for point in client.get_metric_history(run_id, "val/mrr_at_10"):
        assert f"{point.value:.4f}" == published[0].split()[1]
    again = forked("validate", "--checkpoints-dir", output, "--run-id", run_id, "--once")
    assert again.code == 0, again.printed
    assert evaluated(again.printed) == {}


def test_an_experiment(
    forked: Forked, publish_noise: Callable[..., str], points: Callable, client: MlflowClient
) -> None:
    experiment = client.create_experiment("some_runs")
    runs = [publish_noise(*steps, experiment=experiment) for steps in ([1], [1, 2])]
    flags = ["--experiment", "some_runs", "--name", "together"]
    ended = forked("validate", *flags, "--once")
    assert ended.code == 0, ended.printed
    for run_id, steps in zip(runs, ([1], [1, 2]), strict=True):
        assert sorted(points(client, run_id, "together")["mrr_at_10"]) == steps


@pytest.mark.parametrize("flags", [[], ["--run-id", "a", "--experiment", "b"]], ids=str)
def test_a_run_or_an_experiment(forked: Forked, flags: list[str]) -> None:
    ended = forked("validate", *flags)
    assert ended.code == 2
    assert ended.printed[-1].startswith("error: give --run-id, --experiment or --checkpoints-dir")


def test_the_best_checkpoints_are_validated_on_the_full_corpus_once(
    forked: Forked, publish_noise: Callable[..., str], points: Callable, client: MlflowClient
) -> None:
    """Two validators refine one run; any checkpoint that was among the best two may be refined."""
    steps = list(range(8))
    run_id = publish_noise(*steps)
    flags = ("--subset", "random:6", "--refine", "full@2", "--poll-seconds", 0.2)
    ended = forked("validate", "--run-id", run_id, *flags, times=2)
    assert ended.codes == [0, 0], ended.printed
    cheap = points(client, run_id, "val-random_6")["mrr_at_10"]
    dear = points(client, run_id, "val")["mrr_at_10"]
    assert {step: len(values) for step, values in cheap.items()} == dict.fromkeys(steps, 1)
    assert {len(values) for values in dear.values()} == {1}
    best = sorted(cheap, key=lambda step: (-cheap[step][0], step))[:2]
    assert set(best) <= set(dear)
