"""`mlflow-dr run`, as far as the two processes that it starts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr import launch
from mlflow_dr.cli.train import run_command
from mlflow_dr.errors import MlflowDrError
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.parsing import parse_training


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that would be launched."""
    calls: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: calls.append(arguments) or 0)
    return calls


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> Path:
    return beir_folder({"p": "gulls"}, {"q": "what flies"}, dev={"q": {"p": 1}})


def called(*argv: object) -> Any:
    return run_command.main([str(word) for word in argv], "mlflow-dr", standalone_mode=False)


def test_the_dataset_comes_from_the_flags_or_the_file_or_is_the_demo(
    launched: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("dataset: irds:vaswani\nmodel: tiny\n")
    for argv in ([], ["--config", file], ["--config", file, "--dataset", "msmarco"]):
        called("--use_cpu", *argv)
    trained = [parse_training(training).data.dataset_name for _, training in launched]
    assert trained == ["demo", "irds:vaswani", "msmarco"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--keep-up", "--subset", "random:5"],
        ["--dtype", "bf17"],
        ["--keep", "zz"],
        ["--refine", "full"],
        ["--name", "a/b"],
        ["--depth", "5", "--measures", "mrr@10"],
        ["--subset", "randm:5"],
    ],
)
def test_flags_that_the_validator_would_refuse_stop_run_before_training(
    launched: list[Any], argv: list[str]
) -> None:
    with pytest.raises(MlflowDrError):
        called(*argv)
    assert not launched


@pytest.mark.parametrize("several", [["mrr@10 ndcg@10"], ["mrr@10", "ndcg@10"]])
def test_measures_are_one_value_or_several(launched: list[Any], several: list[str]) -> None:
    called("--measures", *several, "--learning_rate", "1e-3", "--use_cpu", "--subset", "full")
    ((config, training),) = launched
    assert config.measures == "mrr@10 ndcg@10"
    assert parse_training(training).trainer.learning_rate == 1e-3


def test_the_summary_shows_the_curve_of_the_first_validation(launched: list[Any]) -> None:
    called("--name", "small", "--subset", "random:5", "--subset", "full", "--judged", "all")
    called("--seed", "5")
    names = [config.validation().all_validations[0].name for config, _ in launched]
    assert names == ["small-random_5-all_judged", "val"]


@pytest.mark.parametrize("in_file", [False, True])
def test_server_and_experiment_apply_to_trainer_and_validator(
    client: MlflowClient,
    folder: Path,
    tmp_path: Path,
    in_file: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether they are spelt with underscores, or stand in the trainer's file."""

    def stop(run: TrackedRun, *_: object) -> None:
        raise RuntimeError(run.id)

    monkeypatch.setattr(launch.Child, "start", lambda command, run: stop(run))
    named = {"tracking_uri": client.tracking_uri, "experiment_name": "spelt", "run_name": "mine"}
    argv = [word for name, value in named.items() for word in (f"--{name}", value)]
    if in_file:
        (tmp_path / "train.yaml").write_text(json.dumps(named))
        argv = ["--config", str(tmp_path / "train.yaml")]
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
    try:
        with pytest.raises(RuntimeError) as caught:
            called("--dataset", folder, "--model", "tiny", "--use_cpu", *argv)
        run = client.get_run(str(caught.value))
    finally:
        mlflow.set_tracking_uri(before)
    assert client.get_experiment(run.info.experiment_id).name == "spelt"
    assert run.info.run_name == "mine"
