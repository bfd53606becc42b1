import threading
from pathlib import Path

import pytest
import torch
from mlflow.exceptions import MlflowException

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.tracking.checkpoints import checkpoints_of, fetched
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.publishing import FAILURE_TAG, Publisher


class Unreliable:
    """A client whose uploads fail a number of times, and which is the real one otherwise."""

    def __init__(self, client: object, failures: int) -> None:
        self._client = client
        self.failures = failures

    def __getattr__(self, name: str) -> object:
        return getattr(self._client, name)

    def log_model_artifacts(self, model_id: str, local_dir: str) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise MlflowException("no route to host")
        self._client.log_model_artifacts(model_id, local_dir)  # type: ignore[attr-defined]


def test_the_weights_are_those_of_the_moment_of_submitting(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, tiny)
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    publisher.submit(3)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(1.0)
    publisher.close()
    (checkpoint,) = checkpoints_of(run)
    assert (checkpoint.step, checkpoint.ready) == (3, True)
    with fetched(checkpoint) as directory:
        state = load_encoder(directory).state_dict()
    assert all(torch.equal(before[name], state[name]) for name in before)


def test_closing_waits_for_all(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, tiny)
    for step in range(5):
        publisher.submit(step)
    publisher.close()
    assert [(one.step, one.ready) for one in checkpoints_of(run)] == [(s, True) for s in range(5)]


def test_a_failed_upload_is_tried_again_as_the_same_checkpoint(
    run: TrackedRun, tiny: Encoder
) -> None:
    run.client = Unreliable(run.client, failures=2)  # type: ignore[assignment]
    publisher = Publisher(run, tiny, pause=0.01)
    publisher.submit(1)
    publisher.close()
    assert publisher.unpublished == []
    assert [(one.step, one.ready) for one in checkpoints_of(run)] == [(1, True)]


def test_what_fails_for_good_is_on_the_run_and_the_next_one_goes_on(
    run: TrackedRun, tiny: Encoder
) -> None:
    run.client = Unreliable(run.client, failures=2)  # type: ignore[assignment]
    publisher = Publisher(run, tiny, attempts=2, pause=0.01)
    publisher.submit(1)
    publisher.submit(2)
    publisher.close()
    assert publisher.unpublished == [1]
    assert "no route to host" in run.fetch().data.tags[FAILURE_TAG]
    assert [(one.step, one.ready) for one in checkpoints_of(run)] == [(1, False), (2, True)]


def test_nothing_is_left_in_the_temporary_directory(
    run: TrackedRun, tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    publisher = Publisher(run, tiny)
    publisher.submit(1)
    publisher.close()
    assert list(tmp_path.iterdir()) == []
    assert "publisher" not in {thread.name for thread in threading.enumerate()}
