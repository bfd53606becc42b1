"""Validations on subsets, in one process, over a real store."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.following import FollowedExperiment, FollowedRun
from mlflow_dr.tracking.pruning import delete_files
from mlflow_dr.tracking.results import State, mark_failed, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import recorded_values
from mlflow_dr.validation import encoders
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.policies import CHOSEN_PARAM
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts

SETTINGS = {"measures": "mrr@10 recall@1", "device": "cpu", "dtype": "fp32"}


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow", "q3": "the tide at noon"},
        dev={"q1": {"p0": 1}, "q2": {"p3": 1}, "q3": {"p5": 1}},
    )


def plan(*subsets: str, **more: Any) -> ValidateConfig:
    return ValidateConfig(**{**SETTINGS, "subset": subsets, "follow": False, **more})


def validated(run: TrackedRun, *subsets: str, **more: Any) -> Counts:
    return run_validator(FollowedRun(run), plan(*subsets, **more), sleep=no_sleep)


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


def steps(client: MlflowClient, run: TrackedRun, key: str) -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run.id, key))


def test_a_subset_has_its_own_curve_artifact_and_dataset(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str], tmp_path: Path
) -> None:
    publishing(1)
    assert validated(run, "full", "random:2").done == 1
    names = client.get_run(run.id).data.metrics
    assert {"val/mrr_at_10", "val-random_2/mrr_at_10"} <= names.keys()
    assert names["val-random_2/mrr_at_10"] >= names["val/mrr_at_10"]
    inputs = {
        dataset_input.dataset.name: dataset_input.dataset
        for dataset_input in client.get_run(run.id).inputs.dataset_inputs
    }
    (whole,) = (dataset for name, dataset in inputs.items() if "random" not in name)
    (part,) = (dataset for name, dataset in inputs.items() if name.endswith("(random:2)"))
    assert whole.digest != part.digest
    profile = json.loads(part.profile)
    assert profile["origins"]["judged"] == 3
    assert profile["passages"] in (3, 4, 5)
    local = client.download_artifacts(run.id, "subsets", str(tmp_path))
    table = pq.read_table(Path(local) / "val-random_2.parquet")
    assert {"p0", "p3", "p5"} <= set(table["passage_id"].to_pylist())
    about = json.loads((Path(local) / "val-random_2.json").read_text())
    assert (about["subset"], about["passages"]) == ("random:2", len(table))
    assert sorted(Path(local).iterdir())[0].name == "val-random_2.json"


def test_subsets_and_the_whole_corpus_are_read_from_one_pass(
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    publishing(1)
    calls = []
    real = encoders.evaluate_all

    def counted(encoder: Encoder, asked: Sequence[Any], *more: Any) -> Any:
        calls.append(len(asked))
        return real(encoder, asked, *more)

    monkeypatch.setattr(encoders, "evaluate_all", counted)
    validated(run, "full", "random:2", "bm25@1", "queries:2")
    assert calls == [4]
    # each has the figures that it has alone
    (checkpoint,) = run_checkpoints(run)
    together = recorded_values(checkpoint, "val-bm25_at_1")
    publish(run, tmp_path / "step-1", 2)
    validated(run, "bm25@1")
    alone = recorded_values(run_checkpoints(run)[-1], "val-bm25_at_1")
    assert alone["mrr_at_10"] == pytest.approx(together["mrr_at_10"], abs=1e-9)


def test_other_contents_under_one_name_are_refused(
    run: TrackedRun, publishing: Callable[[int], str], tmp_path: Path
) -> None:
    publishing(1)
    path = tmp_path / "top.tsv"
    path.write_text("q1\tp1\t1\n")
    validated(run, f"ranking:{path}@2")
    path.write_text("q1\tp2\t1\n")
    with pytest.raises(UsageError, match="another configuration"):
        validated(run, f"ranking:{path}@2")


def test_a_subset_of_top_passages_by_a_checkpoint_of_the_run(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(0)
    publishing(10)
    assert validated(run, "encoder:step-0@1").done == 2
    assert steps(client, run, "val-encoder_step-0_at_1/mrr_at_10") == [0, 10]
    with pytest.raises(UsageError, match=r"no published .* step 7; the nearest steps are 0, 10"):
        validated(run, "encoder:step-7@1")


def test_stored_top_passages_need_no_files_of_the_checkpoint(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    for step in (0, 10):
        publishing(step)
    assert validated(run, "encoder:step-0@1").done == 2
    delete_files(client, run_checkpoints(run)[0])
    publishing(20)
    assert validated(run, "encoder:step-0@1").done == 1


def test_a_checkpoint_that_chooses_a_subset_is_waited_for(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    events = iter([lambda: publishing(0), lambda: publishing(10)])

    def sleep(_: float) -> None:
        if event := next(events, None):
            event()
        else:
            client.set_terminated(run.id)

    waiting = plan("encoder:step-10@1", follow=True)
    assert run_validator(FollowedRun(run), waiting, sleep=sleep).done == 2
    missed = plan("encoder:step-7@1", follow=True)
    with pytest.raises(UsageError, match="no published checkpoint of step 7"):
        run_validator(FollowedRun(run), missed, sleep=no_sleep)


@pytest.mark.parametrize("keep_up", [False, True])
def test_other_runs_of_the_experiment_do_not_wait(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    folder: Path,
    tmp_path: Path,
    keep_up: bool,
) -> None:
    for step in (0, 10):
        publishing(step)
    name = f"two runs, {keep_up}"
    experiment = client.create_experiment(name)
    early, ready = (TrackedRun(client, client.create_run(experiment)) for _ in range(2))
    for tracked in (early, ready):
        tracked.log_params({"dataset": str(folder), "validation_split": "dev"})
        publish(tracked, tmp_path / "step-0", 0)
    publish(ready, tmp_path / "step-10", 10)
    seen = []

    def sleep(_: float) -> None:
        key = "val-encoder_step-10_at_1/mrr_at_10"
        seen.append([steps(client, run, key) for run in (early, ready)])
        if len(seen) == 1:
            publish(early, tmp_path / "step-10", 10)
        elif len(seen) == 3:
            raise KeyboardInterrupt

    subsets = ("encoder:step-10@1", "full") if keep_up else ("encoder:step-10@1",)
    waiting = plan(*subsets, keep_up=keep_up, follow=True)
    with pytest.raises(KeyboardInterrupt):
        run_validator(FollowedExperiment(client, name), waiting, sleep=sleep)
    assert seen == [[[], [0, 10]], [[0, 10], [0, 10]], [[0, 10], [0, 10]]]


def test_the_best_checkpoints_are_validated_on_the_full_corpus_once(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    for step in range(6):
        publishing(step)
    validated(run, "bm25@1", refine="full@2")
    cheap = {
        checkpoint.step: recorded_values(checkpoint, "val-bm25_at_1")
        for checkpoint in run_checkpoints(run)
    }
    order = sorted(cheap, key=lambda step: (-cheap[step]["mrr_at_10"], step))
    assert len(cheap) == 6
    refined = steps(client, run, "val/mrr_at_10")
    assert set(order[:2]) <= set(refined)
    before = len(refined)
    validated(run, "bm25@1", refine="full@2")
    assert len(steps(client, run, "val/mrr_at_10")) == before


def test_a_seed_does_not_rename_the_full_corpus(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    validated(run)
    refined = plan("random:2", seed=7, judged="all", refine="full@1")
    assert run_validator(FollowedRun(run), refined, sleep=no_sleep).failed == 0
    assert steps(client, run, "val-random_2-seed_7-all_judged/mrr_at_10") == [1]


def with_files(run: TrackedRun) -> list[int]:
    return [checkpoint.step for checkpoint in run_checkpoints(run) if not checkpoint.is_pruned]


def test_checkpoints_that_are_not_refined_are_pruned(
    run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    for step in range(6):
        publishing(step)
    policy = {"metric": "val-bm25_at_1/mrr@10", "keep": "best:1,last:1"}
    validated(run, "bm25@1", refine="full@2", **policy)
    cheap = {
        checkpoint.step: recorded_values(checkpoint, "val-bm25_at_1")
        for checkpoint in run_checkpoints(run)
    }
    best = min(cheap, key=lambda step: (-cheap[step]["mrr_at_10"], step))
    assert with_files(run) == sorted({best, 5})


def test_a_failed_checkpoint_keeps_its_files_until_a_retry(
    run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    for step in range(4):
        publishing(step)
    for checkpoint in run_checkpoints(run)[1:3]:
        mark_failed(run, checkpoint, "val", "out of memory")
    assert validated(run, retry_failed=True, keep="best:1,last:1").done == 4
    assert all(
        validation_state(checkpoint, "val") is State.DONE for checkpoint in run_checkpoints(run)
    )
    assert len(with_files(run)) <= 2


def test_auto_subset_follows_the_publishing_interval(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The smallest subset is used until the speed is known; later validators keep the choice."""
    for step in range(4):
        publishing(step)
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("mlflow_dr.validation.policies.publishing_interval", lambda _: 1e6)
    validated(run, "random:1", "random:4", "full", keep_up=True)
    assert steps(client, run, "val/mrr_at_10") == [0, 1, 2, 3]
    assert len(steps(client, run, "val-random_1/mrr_at_10")) == 1
    assert steps(client, run, "val-random_4/mrr_at_10") == []
    assert "full keeps up with a checkpoint every" in caplog.text
    assert client.get_run(run.id).data.params[CHOSEN_PARAM] == "full"
    publishing(4)
    monkeypatch.setattr("mlflow_dr.validation.policies.publishing_interval", lambda _: 1e-6)
    validated(run, "random:1", "random:4", "full", keep_up=True)
    assert steps(client, run, "val/mrr_at_10") == [0, 1, 2, 3, 4]
    assert "full, as another validator has chosen" in caplog.text
    validated(run, "random:1", "random:4", "full", keep_up=True, keep="last:2")
    assert {3, 4} <= set(with_files(run)) < {0, 1, 2, 3, 4}


def test_auto_subset_on_an_experiment(
    client: MlflowClient,
    publishing: Callable[[int], str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "of one run"
    run = TrackedRun(client, client.create_run(client.create_experiment(name)))
    run.log_params({"dataset": str(folder), "validation_split": "dev"})
    for step in range(3):
        publishing(step)
        publish(run, tmp_path / f"step-{step}", step)
    monkeypatch.setattr("mlflow_dr.validation.policies.publishing_interval", lambda _: 1e6)
    run_validator(FollowedExperiment(client, name), plan("random:1", "full", keep_up=True))
    assert steps(client, run, "val/mrr_at_10") == [0, 1, 2]
