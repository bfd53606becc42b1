import json
import time
from pathlib import Path

import pytest

from mlflow_dr.tracking.checkpoints import (
    PRUNED_TAG,
    announce_checkpoint,
    mark_upload_failed,
    publish,
    run_checkpoints,
)
from mlflow_dr.tracking.claims import Claims, Owner
from mlflow_dr.tracking.results import mark_failed, record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.status import Line, progress_summary, status_lines, status_table
from mlflow_dr.tracking.validations import bind_name, run_validations

ELSEWHERE = Owner("far", 7, "another boot", 1, "token")


@pytest.fixture
def run_in_all_states(run: TrackedRun, tmp_path: Path) -> TrackedRun:
    """A run with one checkpoint in each state."""
    (tmp_path / "weights").write_text("1")
    for step in (1, 2, 3, 4):
        publish(run, tmp_path, step)
    mark_upload_failed(run, announce_checkpoint(run, 5, "0"))
    announce_checkpoint(run, 6, "0")
    bind_name(run, "val", {"measures": "mrr@10"})
    done, claimed, failed, _, *_ = run_checkpoints(run)
    claims = Claims(run.client, ELSEWHERE)
    for checkpoint in (done, claimed, failed):
        assert claims.claim(checkpoint, "val")
    record_result(run, done, "val", {"mrr_at_10": 0.5}, ("sea", "0"), now_ms=done.ready_ms + 90_000)
    claims.drop(failed, "val", finished=False)
    assert claims.claim(run_checkpoints(run)[2], "val")
    mark_failed(run, failed, "val", "the weights hold NaN")
    return run


def run_status(run: TrackedRun, now_ms: int | None = None) -> list[Line]:
    """The lines of all validations of a run."""
    now_ms = now_ms or time.time_ns() // 1_000_000
    return status_lines(run_checkpoints(run), list(run_validations(run)), now_ms)


def test_each_state(run_in_all_states: TrackedRun) -> None:
    lines = {line.step: line for line in run_status(run_in_all_states)}
    states = {step: line.state for step, line in lines.items()}
    expected = ["done", "claimed", "failed", "open", "lost", "pending"]
    assert states == dict(enumerate(expected, start=1))
    assert [lines[step].owner for step in (1, 2, 3, 4)] == ["far:7"] * 3 + [""]
    assert (lines[1].lag, lines[2].lag) == (90.0, None)
    assert lines[3].note == "the weights hold NaN"


def test_the_status_as_a_table(run_in_all_states: TrackedRun) -> None:
    now = max(checkpoint.ready_ms for checkpoint in run_checkpoints(run_in_all_states)) + 7_200_000
    head, first, *_ = status_table(run_status(run_in_all_states, now)).splitlines()
    assert head.split() == ["step", "validation", "state", "figure", "owner", "age", "lag", "note"]
    assert first.split() == [
        "1",
        "val",
        "done",
        "mrr_at_10",
        "0.5000",
        *["far:7", "2.0", "h", "1.5", "min"],
    ]


def test_files_that_were_removed(run_in_all_states: TrackedRun) -> None:
    """Files were removed before or after validation; an unvalidated checkpoint counts as pruned."""
    for checkpoint in run_checkpoints(run_in_all_states):
        if checkpoint.step in (1, 3, 4):
            run_in_all_states.client.set_logged_model_tags(
                checkpoint.model_id, {PRUNED_TAG: "2026-11-21"}
            )
    lines = {line.step: line for line in run_status(run_in_all_states)}
    assert [lines[step].state for step in (1, 2, 3, 4)] == ["done", "claimed", "failed", "pruned"]
    notes = [lines[step].note for step in (1, 2, 3, 4)]
    assert notes == ["pruned", "", "pruned; the weights hold NaN", ""]
    summary = progress_summary(run_checkpoints(run_in_all_states), "val")
    assert summary == "1 of 3 checkpoints done, 1 failed, the last at step 1"


def test_a_run_that_nobody_validates(run: TrackedRun, tmp_path: Path) -> None:
    assert run_status(run) == []
    (tmp_path / "weights").write_text("1")
    publish(run, tmp_path, 1)
    (line,) = run_status(run)
    assert (line.validation, line.state, line.owner) == ("", "open", "")
    assert status_table([line]).splitlines()[1].split()[:4] == ["1", "-", "open", "-"]


def test_other_params_of_the_run_are_not_validations(run: TrackedRun, tmp_path: Path) -> None:
    run.log_params({"validation_split": "dev"})
    bind_name(run, "a", {})
    bind_name(run, "b", json.loads('{"depth": 10}'))
    (tmp_path / "weights").write_text("1")
    publish(run, tmp_path, 1)
    assert [line.validation for line in run_status(run)] == ["a", "b"]


def test_the_progress_summary(run_in_all_states: TrackedRun) -> None:
    summary = progress_summary(run_checkpoints(run_in_all_states), "val")
    assert summary == "1 of 4 checkpoints done, 1 failed, the last at step 1"
    assert (
        progress_summary(run_checkpoints(run_in_all_states)[1:2], "val")
        == "0 of 1 checkpoints done"
    )
