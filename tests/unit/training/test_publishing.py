import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.tracking.checkpoints import ready_steps, run_checkpoints
from mlflow_dr.tracking.client import tracking_uri
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.checkpoint_source import DirectorySource
from mlflow_dr.training.publishing import FAILURE_TAG, EncoderSource, Publisher


class Unreliable:
    """A real client whose first uploads fail a given number of times."""

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


class Swallowed(Unreliable):
    """A client some of whose uploads come to nothing, or come halved, without an error."""

    def log_model_artifacts(self, model_id: str, local_dir: str) -> None:
        self._client.log_model_artifacts(model_id, local_dir)  # type: ignore[attr-defined]
        model = self._client.get_logged_model(model_id)  # type: ignore[attr-defined]
        weights = Path(model.artifact_location, "model.safetensors")
        pooling = Path(model.artifact_location, "1_Pooling", "config.json")
        if self.failures == 2:
            weights.write_bytes(weights.read_bytes()[:-1])
        elif self.failures == 1:
            pooling.unlink()
        self.failures -= 1


def test_a_checkpoint_is_ready_when_the_store_lists_all_of_it(
    run: TrackedRun, tiny: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    run.client = Swallowed(run.client, failures=2)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.0)
    publisher.publish(3)
    publisher.close()
    (checkpoint,) = run_checkpoints(run)
    assert checkpoint.ready
    with checkpoint_files(checkpoint) as directory:
        load_encoder(directory)
    assert "bytes of model.safetensors after its upload of" in caplog.text
    assert "does not list 1_Pooling/config.json after its upload" in caplog.text


def test_the_weights_are_those_at_the_call(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, EncoderSource(tiny))
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    publisher.publish(3)
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.add_(1.0)
    publisher.close()
    (checkpoint,) = run_checkpoints(run)
    assert (checkpoint.step, checkpoint.ready) == (3, True)
    with checkpoint_files(checkpoint) as directory:
        state = load_encoder(directory).state_dict()
    assert all(torch.equal(before[name], state[name]) for name in before)


def test_the_copies_of_every_gpu_are_waited_for(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights may be on several GPUs and not only on the current one."""

    class OnGpu(torch.Tensor):
        """A tensor in host memory that says it is on a GPU."""

        is_cuda = True
        device = property(lambda self: torch.device("cuda", len(self)))  # type: ignore[assignment]

    waited: list[torch.device | None] = []

    def current_stream(device: torch.device | None = None) -> SimpleNamespace:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    weights = {str(n): torch.zeros(n).as_subclass(OnGpu) for n in (1, 2)}
    weights["on the host"] = torch.zeros(3)
    source = SimpleNamespace(state=lambda: weights, save=lambda to, _: to.mkdir())
    publisher = Publisher(run, source)
    publisher._spare.append({"1": torch.ones(1), "2": torch.ones(2), "on the host": torch.ones(3)})
    publisher.publish(1)
    publisher.close()
    assert {device and device.index for device in waited} == {1, 2}


def test_closing_waits_for_all(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, EncoderSource(tiny))
    for step in range(5):
        publisher.publish(step)
    publisher.close()
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (s, True) for s in range(5)
    ]


def test_a_failed_upload_is_tried_again_as_the_same_checkpoint(
    run: TrackedRun, tiny: Encoder
) -> None:
    run.client = Unreliable(run.client, failures=2)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.01)
    publisher.publish(1)
    publisher.close()
    assert publisher.unpublished == []
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (1, True)
    ]


def test_a_failure_is_noted_on_the_run_and_the_next_step_is_published(
    run: TrackedRun, tiny: Encoder
) -> None:
    run.client = Unreliable(run.client, failures=2)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), attempts=2, pause=0.01)
    publisher.publish(1)
    publisher.publish(2)
    publisher.close()
    assert publisher.unpublished == [1]
    assert "no route to host" in run.fetch().data.tags[FAILURE_TAG]
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (1, False),
        (2, True),
    ]


def test_nothing_is_left_in_the_temporary_directory(
    run: TrackedRun, tiny: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    publisher = Publisher(run, EncoderSource(tiny))
    publisher.publish(1)
    publisher.close()
    assert list(tmp_path.iterdir()) == []
    assert "publisher" not in {thread.name for thread in threading.enumerate()}


def test_steps_that_the_run_has_are_not_published_again(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, EncoderSource(tiny), published={0: "m-0", 5: "m-5"})
    submitted = []
    for step in (0, 5, 10, 10):
        submitted.append(publisher.publish(step))
        assert publisher.last_step == step
    publisher.close()
    assert submitted == [False, False, True, False]
    assert [checkpoint.step for checkpoint in run_checkpoints(run)] == [10]


def test_an_earlier_step_is_published_from_another_source(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "kept", tiny)
    run.client = Unreliable(run.client, failures=1)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), attempts=1)
    kept = DirectorySource(tmp_path / "kept")
    assert [publisher.publish(step, kept, wait=True) for step in (1, 2)] == [False, True]
    assert publisher.unpublished == [1]
    assert [publisher.publish(step) for step in (2, 3)] == [False, True]
    publisher.close()
    assert [checkpoint.step for checkpoint in run_checkpoints(run) if checkpoint.ready] == [2, 3]


def test_a_step_that_failed_may_come_again(run: TrackedRun, tiny: Encoder) -> None:
    run.client = Unreliable(run.client, failures=1)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), attempts=1)
    publisher.publish(1)
    publisher.wait()
    assert publisher.publish(1)
    publisher.close()
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (1, False),
        (1, True),
    ]


def test_an_upload_that_fails_while_the_server_is_away_is_reported(
    run: TrackedRun, tiny: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(Unreliable):
        def finalize_logged_model(self, model_id: str, status: LoggedModelStatus) -> None:
            raise MlflowException("server away")

    run.client = Away(run.client, failures=1)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), attempts=1)
    publisher.publish(1)
    publisher.close()
    assert "no route to host" in run.fetch().data.tags[FAILURE_TAG]
    assert "is left PENDING: MlflowException: server away" in caplog.text
    assert [checkpoint.pending for checkpoint in run_checkpoints(run)] == [True]


def test_a_closed_publisher_raises(run: TrackedRun, tiny: Encoder) -> None:
    publisher = Publisher(run, EncoderSource(tiny))
    publisher.close()
    publisher.close()
    with pytest.raises(RuntimeError, match="step 7 was published after the publisher was closed"):
        publisher.publish(7)


def test_anything_with_a_state_is_published_from_the_publishers_thread(run: TrackedRun) -> None:
    class Counter:
        """Not an encoder at all."""

        def __init__(self) -> None:
            self.weight = torch.zeros(3)
            self.threads: set[str] = set()

        def state(self) -> Mapping[str, torch.Tensor]:
            assert threading.current_thread() is threading.main_thread()
            return {"weight": self.weight}

        def save(self, directory: Path, state: Mapping[str, torch.Tensor]) -> None:
            self.threads.add(threading.current_thread().name)
            directory.mkdir()
            (directory / "weight.txt").write_text(str(state["weight"].tolist()))

    counter = Counter()
    publisher = Publisher(run, counter)
    for step in range(5):
        publisher.publish(step)
        counter.weight += 1
    publisher.close()
    assert counter.threads == {"publisher"}
    written = []
    for checkpoint in run_checkpoints(run):
        with checkpoint_files(checkpoint) as directory:
            written.append((directory / "weight.txt").read_text())
    assert written == [str([float(step)] * 3) for step in range(5)]
    assert 1 <= len(publisher._spare) <= 4, "memory is not used again"


AT_EXIT = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import find_run
from mlflow_dr.training.publishing import Publisher, close_at_exit

class Slow:
    def state(self):
        return {}

    def save(self, directory, state):
        time.sleep(1)  # by now the script has ended
        with ThreadPoolExecutor() as pool:  # as uploads to S3 and the like do
            pool.submit(directory.mkdir).result()
        (directory / "weights").write_text("1")

publisher = Publisher(find_run(connect(sys.argv[1]), sys.argv[2]), Slow())
close_at_exit(publisher)
publisher.publish(1)
"""


def test_uploads_may_use_thread_pools_while_python_ends(run: TrackedRun) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT, tracking_uri(), run.id],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [(checkpoint.step, checkpoint.ready) for checkpoint in run_checkpoints(run)] == [
        (1, True)
    ], done.stderr


class Refusing(Unreliable):
    """A client whose uploads raise these errors, one for each upload, and then succeed."""

    def __init__(self, client: object, *errors: Exception) -> None:
        super().__init__(client, 0)
        self.errors = list(errors)

    def log_model_artifacts(self, model_id: str, local_dir: str) -> None:
        if self.errors:
            raise self.errors.pop(0)
        super().log_model_artifacts(model_id, local_dir)


NO_BOTO = ModuleNotFoundError("No module named 'boto3'", name="boto3")


def test_a_refusal_of_the_first_checkpoint_is_reported_at_once(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    """After two tries; later ones are tried once, and the last of them is kept."""
    run.client = client = Refusing(run.client, *[NO_BOTO] * 9)  # type: ignore[assignment]
    reasons: list[str] = []
    publisher = Publisher(
        run, EncoderSource(tiny), pause=0.01, keep_in=tmp_path / "out", on_refused=reasons.append
    )
    publisher.publish(0)
    publisher.wait()
    reason = "step 0 was not published: No module named 'boto3', and this artifact store needs it"
    assert [text[: len(reason)] for text in reasons] == [reason]
    assert publisher.refused
    assert len(client.errors) == 7
    publisher.publish(3)
    publisher.close()
    assert len(client.errors) == 6
    assert len(reasons) == 1
    kept = tmp_path / "out" / "unpublished-3"
    assert list((tmp_path / "out").iterdir()) == [kept]
    assert torch.equal(next(load_encoder(kept).parameters()), next(tiny.parameters()))
    error = publisher.error()
    assert str(kept) in str(error) and "No module named 'boto3'" in str(error)
    assert "\n" not in str(error)
    assert "boto3" in run.fetch().data.tags[FAILURE_TAG]
    assert [checkpoint.ready for checkpoint in run_checkpoints(run)] == [False, False]


def test_a_single_refusal_is_tried_again(run: TrackedRun, tiny: Encoder) -> None:
    """A proxy may have answered instead of the server."""
    passing = MlflowException("away")
    run.client = Refusing(run.client, PermissionError(13, "no"), passing, PermissionError(13, "no"))  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.01)
    publisher.publish(1)
    publisher.close()
    assert not publisher.refused
    assert ready_steps(run) == {1}


def test_a_later_refusal_does_not_stop_a_training_that_has_published(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    run.client = client = Refusing(run.client)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.01, keep_in=tmp_path)
    publisher.publish(1)
    publisher.wait()
    client.errors = [NO_BOTO, NO_BOTO]
    publisher.publish(2)
    publisher.wait()
    assert not publisher.refused
    assert publisher.error() is not None, "the last one is not published"
    assert (tmp_path / "unpublished-2").is_dir()
    publisher.publish(3)
    publisher.close()
    assert publisher.error() is None
    assert publisher.unpublished == [2]
    assert list(tmp_path.iterdir()) == [], "a later one is published"


def test_a_first_checkpoint_that_is_waited_for_may_be_refused(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    save_encoder(tmp_path / "kept", tiny)
    run.client = Refusing(run.client, NO_BOTO, NO_BOTO)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.01)
    assert not publisher.publish(1, DirectorySource(tmp_path / "kept"), wait=True)
    assert publisher.refused
    error = publisher.error()
    assert "step 1 was not published: No module named 'boto3'" in str(error)
    publisher.close()


def test_a_checkpoint_that_cannot_be_saved_either_is_logged(
    run: TrackedRun, tiny: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "out").write_text("a file")
    run.client = Refusing(run.client, NO_BOTO, NO_BOTO)  # type: ignore[assignment]
    publisher = Publisher(run, EncoderSource(tiny), pause=0.01, keep_in=tmp_path / "out")
    publisher.publish(1)
    publisher.close()
    assert "step 1 could not be saved in" in caplog.text
    assert "saved" not in str(publisher.error())


def test_published_files_have_the_mode_that_the_umask_allows(
    run: TrackedRun, tiny: Encoder
) -> None:
    """Weights too, which safetensors writes for their owner alone."""
    before = os.umask(0o027)
    try:
        publisher = Publisher(run, EncoderSource(tiny))
        publisher.publish(1)
        publisher.close()
    finally:
        os.umask(before)
    root = Path(run_checkpoints(run)[0].location.removeprefix("file://"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()}
    assert modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}
