"""Which run and which checkpoint a training goes on from."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from mlflow_dr.errors import UsageError
from mlflow_dr.training.resume import (
    COMPLETE_FILE,
    RUN_FILE,
    Resumption,
    begin_output,
    check_output_dir,
    checkpoints,
    complete_checkpoints_until,
    find_resumption,
    locked_output,
    mark_complete,
    output_directories,
)


def checkpoint(room: Path, step: int, run_id: str | None = "run-1") -> Path:
    """A checkpoint's directory; whole when it is of a run."""
    directory = room / f"checkpoint-{step}"
    (directory / "query").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "query/model.safetensors"):
        (directory / name).write_bytes(bytes(100))
    if run_id is not None:
        mark_complete(directory, run_id)
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
    weights, mark = newest / "query/model.safetensors", newest / COMPLETE_FILE
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
        mark_complete(newest, "run-2")
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
        check_output_dir(room, overwrite=False)
    assert "\n" not in str(caught.value)
    assert find_resumption(room, "true") == Resumption("run-1", room / "checkpoint-100")
    check_output_dir(room, overwrite=True)
    begin_output(room, "run-2")
    assert find_resumption(room, "true") == Resumption("run-2", None)
    assert checkpoints(room) == {}
    assert (room / "mine.txt").read_text() == "kept"


def test_whole_checkpoints_of_the_same_run_until_one(room: Path) -> None:
    checkpoint(room, 7, run_id="run-2")
    checkpoint(room, 8, run_id=None)
    there = {step: room / f"checkpoint-{step}" for step in (5, 10, 100)}
    assert complete_checkpoints_until(room / "checkpoint-100") == there
    assert list(complete_checkpoints_until(room / "checkpoint-10")) == [5, 10]
    (room / "checkpoint-100").rename(room / "best")
    assert complete_checkpoints_until(room / "best") == {}


DAMAGED = ("model.safetensors", "optimizer.pt", "query/model.safetensors")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_with_a_flipped_bit_is_passed_over_by_name(room: Path, name: str) -> None:
    path = room / "checkpoint-100" / name
    path.write_bytes(bytes(99) + b"\1")
    found = find_resumption(room, "true")
    assert found == Resumption("run-1", room / "checkpoint-10")
    assert found is not None
    assert found.damaged == (f"{room}/checkpoint-100: {name} has other bytes than were saved",)
    with pytest.raises(UsageError, match=f"{name} has other bytes than were saved"):
        find_resumption(room, str(room / "checkpoint-100"))


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(tmp_path: Path) -> None:
    begin_output(tmp_path, "run-1")
    (checkpoint(tmp_path, 5) / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UsageError, match=r"checkpoint-5: optimizer.pt has 0 bytes") as caught:
        find_resumption(tmp_path, "true")
    assert "--overwrite_output_dir" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"run_id": "run-1", "files": {"optimizer.pt": 100}}',  # of an earlier version
        '{"run_id": "run-1", "files": {"optimizer.pt": null}}',
        '{"run_id": "run-1", "files": {"optimizer.pt": {}}}',
        '{"run_id": "run-1", "files": {"a\\u0000b": {"bytes": 1}}}',
        '{"run_id": "run-1", "files": {}}',
        '{"run_id": ["run-1"], "files": {"optimizer.pt": {"bytes": 100}}}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=range(8),
)
def test_a_list_of_files_may_hold_anything(room: Path, text: str) -> None:
    mark = room / "checkpoint-100" / COMPLETE_FILE
    mark.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = find_resumption(room, "true")
    assert found == Resumption("run-1", room / "checkpoint-10")
    assert found is not None and len(found.damaged) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"run_id": 3}', '{"run_id": ["run-1"]}', "{" * 9])
def test_a_damaged_note_of_the_run_is_one_line_with_the_way_out(room: Path, text: str) -> None:
    (room / RUN_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"is missing or damaged.*name a checkpoint"):
        find_resumption(room, "true")
    named = find_resumption(room, str(room / "checkpoint-100"))
    assert named == Resumption("run-1", room / "checkpoint-100")


HOLDING = """
import sys, time
from mlflow_dr.training.resume import locked_output
with locked_output(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_training_in_an_output_directory_is_refused(tmp_path: Path) -> None:
    """Until the first is gone, which a kill is enough for."""
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        with (
            pytest.raises(UsageError, match=f"another training .process {first.pid} on") as caught,
            locked_output(tmp_path / "other", out),
        ):
            pass
        assert str(out) in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    with locked_output(out, out, tmp_path / "other"):
        pass
    with locked_output():
        pass


def test_an_output_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with (
        pytest.raises(UsageError, match="out: cannot be written to"),
        locked_output(tmp_path / "out"),
    ):
        pass


def test_which_directories_no_second_training_may_write_to(tmp_path: Path) -> None:
    named = Resumption("run-1", tmp_path / "begun" / "checkpoint-5")
    anew = Resumption("run-1", None)
    assert output_directories("out", False, None) == []
    assert output_directories("out", True, None) == [Path("out")]
    assert output_directories("out", False, named) == [tmp_path / "begun"]
    assert output_directories("out", True, named) == [Path("out"), tmp_path / "begun"]
    assert output_directories("out", False, anew) == [Path("out")]


def test_what_may_only_be_read_can_be_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    with locked_output(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked" in caplog.text
