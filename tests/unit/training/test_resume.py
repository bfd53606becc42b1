"""Which run and which checkpoint a training goes on from."""

import errno
from pathlib import Path

import pytest
from filelock import FileLock
from forks import Forks

from mlflow_dr.errors import UsageError
from mlflow_dr.training.resume import (
    COMPLETE_FILE,
    LOCK_FILE,
    RUN_FILE,
    Resumption,
    begin_output,
    checkpoints,
    claimed_output,
    complete_checkpoints_until,
    find_resumption,
    mark_complete,
)


def checkpoint(output: Path, step: int, run_id: str | None = "run-1") -> Path:
    """A checkpoint's directory; complete if it has a run."""
    directory = output / f"checkpoint-{step}"
    (directory / "query").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "query/model.safetensors"):
        (directory / name).write_bytes(bytes(100))
    if run_id is not None:
        mark_complete(directory, run_id)
    return directory


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output directory with checkpoints 5, 10 and 100 of run-1."""
    output = tmp_path / "out"
    begin_output(output, "run-1")
    for step in (10, 5, 100):
        checkpoint(output, step)
    return output


@pytest.mark.parametrize("asked", ["true", "True"])
def test_the_last_complete_checkpoint_by_step(output: Path, asked: str) -> None:
    assert find_resumption(output, asked) == Resumption("run-1", output / "checkpoint-100")
    assert [path.name for path in checkpoints(output).values()] == [
        "checkpoint-5",
        "checkpoint-10",
        "checkpoint-100",
    ]


@pytest.mark.parametrize("asked", [None, "false", "False"])
def test_without_the_flag_nothing_is_resumed(output: Path, asked: str | None) -> None:
    assert find_resumption(output, asked) is None


@pytest.mark.parametrize(
    "damage", ["truncated", "grown", "missing", "unmarked", "half a mark", "no mark", "other run"]
)
def test_an_incomplete_checkpoint_is_not_used(output: Path, damage: str) -> None:
    newest = output / "checkpoint-100"
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
    assert find_resumption(output, "true") == Resumption("run-1", output / "checkpoint-10")


def test_other_directories_are_not_checkpoints(output: Path) -> None:
    (output / "checkpoint-200").write_text("a file")
    checkpoint(output, 300).rename(output / "checkpoint-300.bak")
    checkpoint(output, 400).rename(output / "old-checkpoint-400")
    assert find_resumption(output, "true") == Resumption("run-1", output / "checkpoint-100")


def test_without_a_checkpoint_training_starts_again_in_the_same_run(tmp_path: Path) -> None:
    begin_output(tmp_path, "run-1")
    checkpoint(tmp_path, 5, run_id=None)
    assert find_resumption(tmp_path, "true") == Resumption("run-1", None)


def test_a_checkpoint_may_be_named(output: Path) -> None:
    named = str(output / "checkpoint-5")
    assert find_resumption("elsewhere", named) == Resumption("run-1", output / "checkpoint-5")


def test_a_named_incomplete_checkpoint_is_refused(output: Path, tmp_path: Path) -> None:
    (output / "checkpoint-5" / "optimizer.pt").unlink()
    for checkpoint_path in (output / "checkpoint-5", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="not a complete checkpoint") as caught:
            find_resumption(output, str(checkpoint_path))
        assert str(checkpoint_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume_is_one_line(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path / "out"
    if exists:
        checkpoint(directory, 5)
    with pytest.raises(UsageError, match="no training was started there") as caught:
        find_resumption(directory, "true")
    assert str(directory) in str(caught.value)
    assert RUN_FILE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_another_training_are_not_mixed_with_new_ones(output: Path) -> None:
    (output / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=r"checkpoint-100.*--overwrite_output_dir") as caught:
        claim(output)
    assert "\n" not in str(caught.value)
    assert find_resumption(output, "true") == Resumption("run-1", output / "checkpoint-100")
    claim(output, overwrite=True)
    begin_output(output, "run-2")
    assert find_resumption(output, "true") == Resumption("run-2", None)
    assert checkpoints(output) == {}
    assert (output / "mine.txt").read_text() == "kept"


def test_complete_checkpoints_of_the_same_run_up_to_one(output: Path) -> None:
    checkpoint(output, 7, run_id="run-2")
    checkpoint(output, 8, run_id=None)
    expected = {step: output / f"checkpoint-{step}" for step in (5, 10, 100)}
    assert complete_checkpoints_until(output / "checkpoint-100") == expected
    assert list(complete_checkpoints_until(output / "checkpoint-10")) == [5, 10]
    (output / "checkpoint-100").rename(output / "best")
    assert complete_checkpoints_until(output / "best") == {}


DAMAGED = ("model.safetensors", "optimizer.pt", "query/model.safetensors")


@pytest.mark.parametrize("name", DAMAGED)
def test_a_checkpoint_with_a_flipped_bit_is_not_used_and_named(output: Path, name: str) -> None:
    path = output / "checkpoint-100" / name
    path.write_bytes(bytes(99) + b"\1")
    found = find_resumption(output, "true")
    assert found == Resumption("run-1", output / "checkpoint-10")
    assert found is not None
    assert found.damaged == (f"{output}/checkpoint-100: {name} has other bytes than were saved",)
    with pytest.raises(UsageError, match=f"{name} has other bytes than were saved"):
        find_resumption(output, str(output / "checkpoint-100"))


def test_with_only_damaged_checkpoints_resuming_is_refused(tmp_path: Path) -> None:
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
def test_a_list_of_files_may_hold_anything(output: Path, text: str) -> None:
    mark = output / "checkpoint-100" / COMPLETE_FILE
    mark.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = find_resumption(output, "true")
    assert found == Resumption("run-1", output / "checkpoint-10")
    assert found is not None and len(found.damaged) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"run_id": 3}', '{"run_id": ["run-1"]}', "{" * 9])
def test_a_damaged_run_file_is_one_line_with_a_hint(output: Path, text: str) -> None:
    (output / RUN_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"is missing or damaged.*name a checkpoint"):
        find_resumption(output, "true")
    named = find_resumption(output, str(output / "checkpoint-100"))
    assert named == Resumption("run-1", output / "checkpoint-100")


def claim(
    output: Path, resumption: Resumption | None = None, saves: bool = True, overwrite: bool = False
) -> None:
    with claimed_output(output, resumption, saves, overwrite):
        pass


HOLDING = """
import sys, time
from mlflow_dr.training.resume import claimed_output
with claimed_output(sys.argv[1], None, saves=True):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_training_in_an_output_directory_is_refused(forks: Forks, tmp_path: Path) -> None:
    """It is refused until the first process has ended, also when that was killed."""
    out = tmp_path / "out"
    first = forks.start("python", "-c", HOLDING, out, variables={}, directory=tmp_path)
    try:
        assert first.stdout is not None and first.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match=f"another training .process {first.pid} on") as caught:
            claim(tmp_path / "other", Resumption("run-1", out / "checkpoint-5"))
        assert str(out) in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    claim(out, Resumption("run-1", out / "checkpoint-5"))


def test_an_output_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UsageError, match="out: cannot be written to"):
        claim(tmp_path / "out")


@pytest.mark.parametrize(
    ("resumed", "saves", "expected"),
    [
        (None, False, []),
        (None, True, ["out"]),
        ("begun/checkpoint-5", False, ["begun"]),
        ("begun/checkpoint-5", True, ["begun", "out"]),
        ("", False, ["out"]),
    ],
)
def test_the_directories_that_a_training_locks(
    tmp_path: Path, resumed: str | None, saves: bool, expected: list[str]
) -> None:
    resumption = None
    if resumed is not None:
        resumption = Resumption("run-1", tmp_path / resumed if resumed else None)
    claim(tmp_path / "out", resumption, saves)
    assert sorted(path.parent.name for path in tmp_path.rglob(LOCK_FILE)) == expected


def test_a_read_only_directory_can_be_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    claim(tmp_path)
    assert f"{tmp_path} cannot be locked" in caplog.text
