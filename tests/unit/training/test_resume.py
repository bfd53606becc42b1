"""Which run and which checkpoint a training goes on from."""

from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.resume import (
    RUN_FILE,
    WHOLE_FILE,
    Resumption,
    begin_output,
    check_output,
    checkpoints,
    find_resumption,
    mark_whole,
    whole_checkpoints_until,
)


def checkpoint(room: Path, step: int, run_id: str | None = "run-1") -> Path:
    """A checkpoint's directory; whole when it is of a run."""
    directory = room / f"checkpoint-{step}"
    (directory / "query").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "query/model.safetensors"):
        (directory / name).write_bytes(bytes(100))
    if run_id is not None:
        mark_whole(directory, run_id)
    return directory


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """An output directory with checkpoints 5, 10 and 100 of run-1."""
    room = tmp_path / "out"
    begin_output(room, "run-1")
    for step in (10, 5, 100):
        checkpoint(room, step)
    return room


@pytest.mark.parametrize("asked", ["true", "True"])
def test_the_last_whole_checkpoint_by_step(room: Path, asked: str) -> None:
    assert find_resumption(room, asked) == Resumption("run-1", room / "checkpoint-100")
    assert [path.name for path in checkpoints(room).values()] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
    ]


@pytest.mark.parametrize("asked", [None, "false", "False"])
def test_not_asked_it_goes_on_from_nothing(room: Path, asked: str | None) -> None:
    assert find_resumption(room, asked) is None


@pytest.mark.parametrize(
    "damage", ["truncated", "grown", "missing", "unmarked", "half a mark", "no mark", "other run"]
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(room: Path, damage: str) -> None:
    newest = room / "checkpoint-100"
    weights, mark = newest / "query/model.safetensors", newest / WHOLE_FILE
    if damage == "truncated":
        weights.write_bytes(bytes(99))
    elif damage == "grown":
        weights.write_bytes(bytes(101))
    elif damage == "missing":
        weights.unlink()
    elif damage == "unmarked":
        mark.unlink()
    elif damage == "half a mark":
        mark.write_text(mark.read_text()[:40])
    elif damage == "no mark":
        mark.write_text("[]")
    else:
        mark.unlink()
        mark_whole(newest, "run-2")
    assert find_resumption(room, "true") == Resumption("run-1", room / "checkpoint-10")


def test_what_is_not_a_checkpoint_is_passed_over(room: Path) -> None:
    (room / "checkpoint-200").write_text("a file")
    checkpoint(room, 300).rename(room / "checkpoint-300.bak")
    checkpoint(room, 400).rename(room / "old-checkpoint-400")
    assert find_resumption(room, "true") == Resumption("run-1", room / "checkpoint-100")


def test_stopped_before_the_first_checkpoint_it_begins_anew_in_the_same_run(tmp_path: Path) -> None:
    begin_output(tmp_path, "run-1")
    checkpoint(tmp_path, 5, run_id=None)
    assert find_resumption(tmp_path, "true") == Resumption("run-1", None)


def test_a_checkpoint_may_be_named(room: Path) -> None:
    named = str(room / "checkpoint-5")
    assert find_resumption("elsewhere", named) == Resumption("run-1", room / "checkpoint-5")


def test_a_named_checkpoint_that_is_not_whole_is_refused(room: Path, tmp_path: Path) -> None:
    (room / "checkpoint-5" / "optimizer.pt").unlink()
    for place in (room / "checkpoint-5", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="not a whole checkpoint") as caught:
            find_resumption(room, str(place))
        assert str(place) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("there", [False, True])
def test_nothing_to_resume_is_one_line(tmp_path: Path, there: bool) -> None:
    directory = tmp_path / "out"
    if there:
        checkpoint(directory, 5)
    with pytest.raises(UsageError, match="no training was started there") as caught:
        find_resumption(directory, "true")
    assert str(directory) in str(caught.value)
    assert RUN_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(room: Path) -> None:
    (room / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"checkpoint-100.*--overwrite_output_dir") as caught:
        check_output(room, overwrite=False)
    assert "\n" not in str(caught.value)
    assert find_resumption(room, "true") == Resumption("run-1", room / "checkpoint-100")
    check_output(room, overwrite=True)
    begin_output(room, "run-2")
    assert find_resumption(room, "true") == Resumption("run-2", None)
    assert checkpoints(room) == {}
    assert (room / "mine.txt").read_text() == "kept"


def test_whole_checkpoints_of_the_same_run_until_one(room: Path) -> None:
    checkpoint(room, 7, run_id="run-2")
    checkpoint(room, 8, run_id=None)
    there = {step: room / f"checkpoint-{step}" for step in (5, 10, 100)}
    assert whole_checkpoints_until(room / "checkpoint-100") == there
    assert list(whole_checkpoints_until(room / "checkpoint-10")) == [5, 10]
    (room / "checkpoint-100").rename(room / "best")
    assert whole_checkpoints_until(room / "best") == {}
