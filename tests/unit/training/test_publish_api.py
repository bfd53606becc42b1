"""Publishing from a loop of one's own, to a real store, and validating what came."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_dr import flush_checkpoints, publish_checkpoint
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun
from mlflow_dr.training import publish_api, publishing
from mlflow_dr.training.publishing import Publisher
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator

CONFIG = ValidateConfig(measures="mrr@10", device="cpu", dtype="fp32")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    yield
    publish_api._publishers.clear()
    publish_api._sources.clear()


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    return beir_folder(
        {f"p{number}": text for number, text in enumerate(texts)},
        {"q1": "who counts the ships", "q2": "what do the gulls follow"},
        dev={"q1": {"p0": 1}, "q2": {"p3": 1}},
        test={"q1": {"p0": 1}},
    )


def steps(run: TrackedRun) -> list[tuple[int, bool]]:
    return [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)]


def test_a_checkpoint_is_ready_on_return_and_a_validator_needs_no_more(
    run: TrackedRun, tiny: Encoder, folder: Path
) -> None:
    with mlflow.start_run(run_id=run.id):
        first = publish_checkpoint(tiny, 0, dataset=str(folder), split="dev")
        second = publish_checkpoint(tiny, np.int64(10), dataset=str(folder), split="dev")  # type: ignore[arg-type]
        assert steps(run) == [(0, True), (10, True)]
        assert [checkpoint.model_id for checkpoint in run_checkpoints(run)] == [first, second]
    assert run_validator(FollowedRun(run), CONFIG).done == 2
    history = run.client.get_metric_history(run.id, "val/mrr_at_10")
    assert sorted(point.step for point in history) == [0, 10]


def test_the_development_split_is_the_default(run: TrackedRun, tiny: Encoder, folder: Path) -> None:
    publish_checkpoint(tiny, 0, run_id=run.id, dataset=str(folder))
    assert run.fetch().data.params["validation_split"] == "dev"


def test_a_named_run_keeps_its_status(
    run: TrackedRun, tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.finish("FINISHED")
    before = run.fetch().info
    publish_checkpoint(tiny, 1, run_id=run.id)
    monkeypatch.setenv(RUN_VARIABLE, run.id)
    publish_checkpoint(tiny, 2)
    after = run.fetch().info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    assert steps(run) == [(1, True), (2, True)]
    assert mlflow.active_run() is None


def test_without_waiting_the_weights_are_those_at_the_call(run: TrackedRun, tiny: Encoder) -> None:
    with mlflow.start_run(run_id=run.id):
        expected = []
        for step in range(4):
            with torch.no_grad():
                for weight in tiny.parameters():
                    weight.fill_(float(step))
            expected.append(next(tiny.parameters()).clone())
            assert publish_checkpoint(tiny, step, wait=False) is None
        flush_checkpoints()
    assert steps(run) == [(step, True) for step in range(4)]
    for checkpoint, weight in zip(run_checkpoints(run), expected, strict=True):
        with checkpoint_files(checkpoint) as directory:
            assert torch.equal(next(load_encoder(directory).parameters()), weight)


def test_without_waiting_later_calls_make_no_request(
    run: TrackedRun, tiny: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(step: int) -> None:
        publish_checkpoint(tiny, step, run_id=run.id, dataset=str(folder), wait=False)

    publish(0)

    def no_request(*_: object, **__: object) -> None:
        raise AssertionError("asked the server on the training thread")

    for name in ("connect", "find_run", "published_checkpoints", "open_collection"):
        monkeypatch.setattr(publish_api, name, no_request)
    publish(1)
    flush_checkpoints()
    assert steps(run) == [(0, True), (1, True)]


def test_another_model_waits_for_the_one_before(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoders = [make_tiny(seed=seed, pooling="mean") for seed in range(3)]
    save_encoder(tmp_path / "saved", encoders[2])
    publish_checkpoint(encoders[0], 0, run_id=run.id, wait=False)
    publish_checkpoint(encoders[1], 1, run_id=run.id, wait=False)
    assert steps(run)[0] == (0, True)
    publish_checkpoint(str(tmp_path / "saved"), 2, run_id=run.id, wait=False)
    flush_checkpoints()
    for checkpoint, encoder in zip(run_checkpoints(run), encoders, strict=True):
        with checkpoint_files(checkpoint) as directory:
            found = next(load_encoder(directory).parameters())
            assert torch.equal(found, next(encoder.parameters()))


def test_a_bare_directory_is_read_at_each_call(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"pooling": "mean", "normalize": True}
    encoders = [make_tiny(seed=seed, **settings) for seed in range(3)]
    directory = tmp_path / "last"
    for step, encoder in enumerate(encoders):
        encoder.backbone.save_pretrained(directory)
        encoder.tokenizer.save_pretrained(directory)
        publish_checkpoint(directory, step, run_id=run.id, wait=False, **settings)
    flush_checkpoints()
    for checkpoint, encoder in zip(run_checkpoints(run), encoders, strict=True):
        with checkpoint_files(checkpoint) as found:
            assert torch.equal(next(load_encoder(found).parameters()), next(encoder.parameters()))


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_that_the_run_has_is_not_published_again(
    run: TrackedRun, tiny: Encoder, wait: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first = publish_checkpoint(tiny, 5, run_id=run.id)
    again = publish_checkpoint(tiny, 5, run_id=run.id, wait=wait)
    flush_checkpoints()
    assert steps(run) == [(5, True)]
    assert again == (first if wait else None)
    assert "not published again" in caplog.text


@pytest.mark.parametrize("waits", [(True, False, True), (False, True, False)], ids=str)
def test_a_step_is_published_once_with_and_without_waiting(
    run: TrackedRun, tiny: Encoder, waits: tuple[bool, ...]
) -> None:
    """The first call leaves a publisher in the background."""
    publish_checkpoint(tiny, 1, run_id=run.id, wait=False)
    found = {publish_checkpoint(tiny, 2, run_id=run.id, wait=wait) for wait in waits} - {None}
    flush_checkpoints()
    assert steps(run) == [(1, True), (2, True)]
    assert found == {run_checkpoints(run)[1].model_id}


def test_flush_raises_for_steps_that_failed(run: TrackedRun, tmp_path: Path, tiny: Encoder) -> None:
    save_encoder(tmp_path / "gone", tiny)
    publish_checkpoint(tiny, 1, run_id=run.id, wait=False)
    flush_checkpoints()
    publisher_was = publish_checkpoint(tmp_path / "gone", 2, run_id=run.id)
    assert publisher_was is not None

    source = publish_api.source_of

    def of_a_vanishing_directory(*args: object, **settings: object) -> object:
        found = source(*args, **settings)
        (tmp_path / "gone").rename(tmp_path / "elsewhere")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish_api, "source_of", of_a_vanishing_directory)
        publish_checkpoint(tmp_path / "gone", 3, run_id=run.id, wait=False)
    publish_checkpoint(tiny, 4, run_id=run.id, wait=False)
    with pytest.raises(TrackingError, match="not published: step 3; "):
        flush_checkpoints()
    flush_checkpoints()
    assert [step for step, ready in steps(run) if ready] == [1, 2, 4]


def test_a_refusal_of_the_server_is_one_line(
    run: TrackedRun, tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> str:
        raise MlflowException("disk quota\nexceeded")

    monkeypatch.setattr(publishing, "publish_state", refused)
    with pytest.raises(TrackingError, match=r"step 3 was not published: .*disk quota exceeded"):
        publish_checkpoint(tiny, 3, run_id=run.id)


def test_other_ranks_do_nothing(
    run: TrackedRun, tiny: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert publish_checkpoint(tiny, 0) is None  # nor do they need a run
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert publish_checkpoint(tiny, 0, run_id=run.id) is not None
    assert steps(run) == [(0, True)]


def test_mistakes_raise_before_anything_is_published(
    run: TrackedRun, tiny: Encoder, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no MLflow run to publish to"):
        publish_checkpoint(tiny, 0)
    with pytest.raises(TrackingError, match="no run 'nowhere'"):
        publish_checkpoint(tiny, 0, run_id="nowhere")
    for step in (-1, 1.5, "3"):
        with pytest.raises(UsageError, match=f"step is {step!r}; expected"):
            publish_checkpoint(tiny, step, run_id=run.id)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"no dataset 'msmarko'. did you mean 'msmarco'"):
        publish_checkpoint(tiny, 0, run_id=run.id, dataset="msmarko")
    with pytest.raises(UsageError, match="split"):
        publish_checkpoint(tiny, 0, run_id=run.id, dataset=str(folder), split="valid")
    with pytest.raises(UsageError, match="split='dev' needs a dataset"):
        publish_checkpoint(tiny, 0, run_id=run.id, split="dev")
    with pytest.raises(CheckpointError):
        publish_checkpoint(tmp_path, 0, run_id=run.id)
    with pytest.raises(UsageError, match="how its vectors are made"):
        publish_checkpoint(tiny.backbone, 0, run_id=run.id, tokenizer=tiny.tokenizer, wait=False)
    assert steps(run) == []


def test_the_log_names_the_model(
    run: TrackedRun, tiny: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mlflow_dr"):
        model_id = publish_checkpoint(tiny, 7, run_id=run.id)
    assert f"step 7 published as models:/{model_id}" in caplog.text


def test_a_refused_checkpoint_is_saved_and_the_next_call_raises(
    client: MlflowClient, tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publish_api, "Publisher", partial(Publisher, pause=0.0))
    (tmp_path / "a file").write_text("")
    experiment = client.create_experiment(f"no store {tmp_path}", str(tmp_path / "a file" / "x"))
    run_id = client.create_run(experiment).info.run_id
    publish_checkpoint(tiny, 1, run_id=run_id, wait=False)
    publish_api._publishers[(tracking_uri(), run_id)].wait()
    with pytest.raises(TrackingError, match=r"step 1 was not published: .*Not a directory"):
        publish_checkpoint(tiny, 2, run_id=run_id, wait=False)
    kept = tmp_path / "unpublished" / run_id / "unpublished-1"
    with pytest.raises(TrackingError, match="not published: step 1; ") as caught:
        flush_checkpoints()
    assert str(kept) in str(caught.value)
    assert torch.equal(next(load_encoder(kept).parameters()), next(tiny.parameters()))
    with pytest.raises(TrackingError, match="step 3 was not published"):
        publish_checkpoint(tiny, 3, run_id=run_id)
