import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.following import FollowedDirectory, FollowedRun
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def output(make_tiny: Callable[..., Encoder], tmp_path: Path) -> Path:
    """The output of a trainer with two checkpoints and other files."""
    output = tmp_path / "output"
    for step in (5, 10):
        save_encoder(output / f"checkpoint-{step}", make_tiny(seed=step))
    (output / "runs").mkdir()
    (output / "notes.txt").write_text("1")
    (output / "checkpoint-15").mkdir()
    return output


def steps_of(followed: FollowedDirectory) -> list[int]:
    return [checkpoint.step for checkpoint in followed.snapshot().checkpoints]


def test_a_directory_is_polled_for_new_checkpoints(
    run: TrackedRun, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A directory appears when it is complete and unchanged; removed directories disappear."""
    followed = FollowedDirectory(run, output, is_mine=True)
    with caplog.at_level("INFO", logger="mlflow_dr"):
        assert steps_of(followed) == [5, 10]
        for _ in range(2):
            assert steps_of(followed) == [5, 10]
    assert caplog.text.count("checkpoint-15 is passed over for now: none of config.json") == 1
    assert caplog.text.count("runs is passed over for now: neither its name") == 1
    late = output / "checkpoint-15"
    for path in (output / "checkpoint-10").iterdir():
        if path.is_file():
            (late / path.name).write_bytes(path.read_bytes())
    assert steps_of(followed) == [5, 10]
    assert steps_of(followed) == [5, 10, 15]
    shutil.rmtree(output / "checkpoint-5")
    assert steps_of(followed) == [10, 15]
    assert not followed.snapshot().over


def test_a_directory_is_registered_once_by_several(run: TrackedRun, output: Path) -> None:
    first = FollowedDirectory(run, output, is_mine=False)
    second = FollowedDirectory(run, output, is_mine=False)
    assert steps_of(first) == steps_of(second) == [5, 10]
    ids = {checkpoint.model_id for checkpoint in first.snapshot().checkpoints}
    assert ids == {checkpoint.model_id for checkpoint in second.snapshot().checkpoints}
    assert len(run_checkpoints(run)) == 2
    assert all(checkpoint.ready for checkpoint in run_checkpoints(run))


def test_a_follower_on_another_machine_does_not_have_the_files(
    run: TrackedRun, output: Path
) -> None:
    publish(run, output / "checkpoint-5", 7)
    (run_only,) = FollowedRun(run).snapshot().checkpoints
    assert run_only.step == 7
    FollowedDirectory(run, output, is_mine=False).snapshot()
    assert [checkpoint.step for checkpoint in FollowedRun(run).snapshot().checkpoints] == [7]
    other = output.parent / "other"
    shutil.copytree(output, other)
    assert steps_of(FollowedDirectory(run, other, is_mine=False)) == [5, 10]
    assert len(run_checkpoints(run)) == 5


def test_following_a_directory_ends_with_a_run_of_another_trainer(
    client: MlflowClient, run: TrackedRun, output: Path
) -> None:
    client.set_terminated(run.id)
    assert FollowedDirectory(run, output, is_mine=False).snapshot().over
    assert not FollowedDirectory(run, output, is_mine=True).snapshot().over


def test_a_killed_registration_is_finished_by_the_next(
    run: TrackedRun, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run.client, "finalize_logged_model", killed)
        with pytest.raises(KeyboardInterrupt):
            FollowedDirectory(run, output, is_mine=False).snapshot()
    assert steps_of(FollowedDirectory(run, output, is_mine=False)) == [5, 10]
    assert len(run_checkpoints(run)) == 2


def test_no_such_directory(run: TrackedRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        FollowedDirectory(run, tmp_path / "nowhere", is_mine=True)
