"""The best checkpoint of a run, over a real store."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from mlflow_dr.cli.runs import best_command
from mlflow_dr.decisions.best import Best, against_runner_up, best_summary, find_best, mark_best
from mlflow_dr.decisions.significance import difference
from mlflow_dr.errors import (
    CheckpointError,
    DataError,
    NoValuesError,
    TrackingError,
    UnavailableError,
    UsageError,
)
from mlflow_dr.tracking.checkpoints import (
    PRUNED_TAG,
    Checkpoint,
    announce_checkpoint,
    mark_upload_failed,
    run_checkpoints,
)
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.following import register_directory
from mlflow_dr.tracking.results import record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import bind_name

Measured = Callable[..., Checkpoint]
TAG = "mlflow_dr.best.val"


def places(best: Best) -> tuple[int, int | None]:
    return best.checkpoint.step, best.runner_up and best.runner_up.checkpoint.step


def tagged(run: TrackedRun) -> dict[int, str]:
    return {
        checkpoint.step: checkpoint.tags[TAG]
        for checkpoint in run_checkpoints(run)
        if TAG in checkpoint.tags
    }


def test_the_highest_value_is_best(run: TrackedRun, measured: Measured) -> None:
    for step, value in ((0, 0.1), (10, 0.5), (20, 0.45)):
        measured(step, value)
    best = find_best(run)
    assert places(best) == (10, 20)
    assert (str(best.metric), best.first.value, best.is_tied) == ("val/mrr_at_10", 0.5, False)
    assert places(find_best(run, "val/ndcg_at_10")) == (0, 20)
    assert find_best(run, "val/ndcg@10") == find_best(run, "val/ndcg_at_10")


def test_estimates_are_shown_with_their_intervals_which_widen_the_difference(
    run: TrackedRun, measured: Measured
) -> None:
    ranks = [[0.2, 0.5, 0.1, 0.4], [0.3, 0.5, 0.3, 0.5]]
    for step, (values, error) in enumerate(zip(ranks, (0.03, 0.04), strict=True)):
        measured(step, float(np.mean(values)), values, error=error)
    best = find_best(run)
    assert str(best.first).endswith("0.4000 (estimate, 95 % +-0.0400)")
    change, of_queries = against_runner_up(run, best), difference(*map(np.array, ranks))
    assert change is not None and change.p_value == of_queries.p_value
    for end in ("low", "high"):
        wide = abs(getattr(change, end) - change.mean)
        assert wide == pytest.approx(
            math.hypot(getattr(of_queries, end) - of_queries.mean, 0.03, 0.04)
        )


def test_estimates_are_corrected_by_full_validations(run: TrackedRun, measured: Measured) -> None:
    data = {"corpus": "c", "topics": "t", "split": "dev", "keep_own_id": False}
    estimated = {"measures": "mrr@10 ndcg@10", "subset": "random:5%, d", "estimate": True, **data}
    bind_name(run, "val-est", estimated)
    bind_name(run, "val", {"measures": "mrr@10 ndcg@10", "subset": "full", **data})
    other = {"measures": "mrr@10 ndcg@10", "subset": "full", **data, "topics": "others"}
    bind_name(run, "others", other)
    for step, value in ((10, 0.40), (20, 0.50), (30, 0.45)):
        measured(step, value, name="val-est", error=0.02)
    best = find_best(run, "val-est/mrr@10")
    assert "corrected" not in best_summary(run, best)
    for step in (10, 20, 30):
        measured(step, 0.1, name="others")
    assert "corrected" not in best_summary(run, best)
    measured(10, 0.37)
    measured(30, 0.44)
    lines = best_summary(run, best).splitlines()
    assert lines[1] == (
        "  corrected   0.4808: estimates are +0.0200 off at steps 10, 30, by val, of which +0.0192 "
        "is taken off"
    )
    assert "corrected" not in best_summary(run, find_best(run, "val/mrr@10"))


def test_among_equal_checkpoints_the_earliest_is_best(run: TrackedRun, measured: Measured) -> None:
    for step in (30, 20, 10):
        measured(step, 0.5)
    best = find_best(run)
    assert places(best) == (10, 20)
    assert best.is_tied
    assert "as good; among equal values the earliest is best" in best_summary(run, best)


def test_incomplete_unmeasured_and_nan_checkpoints_are_passed_over(
    run: TrackedRun, measured: Measured
) -> None:
    measured(10, 0.2)
    measured(20, math.nan)
    pending, lost = (announce_checkpoint(run, step, "") for step in (30, 40))
    for checkpoint in run_checkpoints(run):
        if checkpoint.model_id in (pending, lost):
            record_result(run, checkpoint, "val", {"mrr_at_10": 0.9}, ("sea", "0"))
    mark_upload_failed(run, lost)
    assert places(find_best(run)) == (10, None)


def test_the_default_validation_is_val_or_the_first_by_name(
    run: TrackedRun, measured: Measured
) -> None:
    measured(10, 0.5, name="test")
    assert str(find_best(run).metric) == "test/mrr_at_10"
    measured(10, 0.5, name="nq")
    assert str(find_best(run).metric) == "nq/mrr_at_10"
    measured(10, 0.5)
    assert str(find_best(run).metric) == "val/mrr_at_10"


def test_an_unknown_metric_is_an_error(run: TrackedRun, measured: Measured) -> None:
    measured(10, 0.5)
    for name in ("val/mrr_at_5", "loss", "val/seconds", "test/mrr_at_10"):
        with pytest.raises(
            UsageError,
            match=rf"run {run.id} has no metric '{name}' .*: val/mrr_at_10, val/ndcg_at_10$",
        ):
            find_best(run, name)


def test_a_run_that_nobody_validates(run: TrackedRun) -> None:
    with pytest.raises(TrackingError, match=rf"run {run.id} has no validation yet; .*validate"):
        find_best(run)
    bind_name(run, "val", {"measures": "mrr@10"})
    with pytest.raises(TrackingError, match="none of 0 published checkpoints has a value of val/"):
        find_best(run)


def test_the_best_tag_moves_to_a_better_checkpoint(run: TrackedRun, measured: Measured) -> None:
    first = measured(10, 0.25)
    mark_best(run, find_best(run))
    assert tagged(run) == {10: "0.25"}
    assert run.fetch().data.tags[TAG] == f"step 10, {first.uri}, val/mrr_at_10 0.25"
    second = measured(20, 1 / 3)
    mark_best(run, find_best(run))
    assert tagged(run) == {20: "0.333333"}
    assert run.fetch().data.tags[TAG] == f"step 20, {second.uri}, val/mrr_at_10 0.333333"
    mark_best(run, find_best(run))
    assert tagged(run) == {20: "0.333333"}


def test_a_best_tag_that_another_validator_removed(run: TrackedRun, measured: Measured) -> None:
    measured(10, 0.25)
    mark_best(run, find_best(run))
    measured(20, 0.5)
    best = find_best(run)
    mark_best(run, best)
    mark_best(run, best)
    assert tagged(run) == {20: "0.5"}


def test_each_validation_has_its_own_best_tag(run: TrackedRun, measured: Measured) -> None:
    for step, value, other in ((10, 0.5, 0.1), (20, 0.4, 0.9)):
        measured(step, value)
        measured(step, other, name="test")
    mark_best(run, find_best(run))
    mark_best(run, find_best(run, "test/mrr_at_10"))
    assert tagged(run) == {10: "0.5"}
    assert run.fetch().data.tags["mlflow_dr.best.test"].startswith("step 20, ")


def test_the_lead_is_tested_query_by_query(run: TrackedRun, measured: Measured) -> None:
    first, second = [1, 0.5, 1, 1, 0.25, 1], [0.5, 0.5, 0, 1 / 3, 0.25, 0.5]
    measured(10, 0.79, ranks=first)
    measured(20, 0.35, ranks=second)
    best = find_best(run)
    expected = difference(np.array(second), np.array(first), seed=4)
    assert against_runner_up(run, best, seed=4) == expected
    assert expected.mean == pytest.approx(np.mean(first) - np.mean(second))
    lines = best_summary(run, best, seed=4).splitlines()
    assert lines[0].startswith(f"best checkpoint of run {run.id} by val/mrr_at_10: step 10, models")
    assert lines[1].split() == ["runner-up", "step", "20,", f"{best.runner_up[0].uri},", "0.3500"]
    assert lines[2] == (
        f"  difference  +0.4400 over 6 queries, 95 % interval {expected.low:+.4f} to "
        f"{expected.high:+.4f}, p {expected.p_value:.4f}"
    )


def test_older_runs_have_no_values_of_single_queries(run: TrackedRun, measured: Measured) -> None:
    measured(10, 0.5, ranks=[0.5])
    measured(20, 0.4)
    best = find_best(run)
    with pytest.raises(NoValuesError):
        against_runner_up(run, best)
    *_, lead, note = best_summary(run, best).splitlines()
    assert lead == "  difference  +0.1000"
    assert note.startswith(f"  no test: run {run.id} has no values of single queries for step 20 ")


def test_a_single_checkpoint_has_no_runner_up(run: TrackedRun, measured: Measured) -> None:
    measured(10, 0.5)
    best = find_best(run)
    assert against_runner_up(run, best) is None
    assert best_summary(run, best).splitlines()[1:] == ["  no other checkpoint has a value"]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1.0, 0.5], "measured on other queries: 0 of 2 are missing .* and 1 of 3 "),
        ([1.0, 0.5, math.nan], "1 values of mrr@10 of models:/m-.* are not finite"),
    ],
)
def test_values_that_cannot_be_compared(
    ranks: list[float], message: str, run: TrackedRun, measured: Measured
) -> None:
    measured(10, 0.5, ranks=[1.0, 0.5, 0.0])
    measured(20, 0.4, ranks=ranks)
    with pytest.raises(DataError, match=message):
        against_runner_up(run, find_best(run))


@pytest.fixture
def best(run: TrackedRun, client: MlflowClient) -> Callable[..., str]:
    """Runs `mlflow-dr best` for the run; returns what it prints."""

    def best(*argv: object) -> str:
        done = CliRunner().invoke(
            best_command,
            ["--run-id", run.id, "--tracking-uri", client.tracking_uri, *map(str, argv)],
            catch_exceptions=False,
        )
        assert done.exit_code == 0, done.output
        return done.output

    return best


def test_the_command_prints_and_marks(
    run: TrackedRun, measured: Measured, best: Callable[..., str]
) -> None:
    measured(10, 0.5, ranks=[1.0, 0.0])
    measured(20, 0.25, ranks=[0.5, 0.0])
    printed = best("--seed", 3)
    assert printed == best_summary(run, find_best(run), seed=3) + "\n"
    assert tagged(run) == {10: "0.5"}


@pytest.mark.parametrize("exists", [False, True])
def test_a_download_is_what_was_published(
    exists: bool, measured: Measured, best: Callable[..., str], tmp_path: Path
) -> None:
    measured(10, 0.5)
    target = tmp_path / "best" / "encoder"
    if exists:
        target.mkdir(parents=True)
    assert best("--download", target).endswith(f"  downloaded  {target}\n")
    files = {path.name for path in target.iterdir()}
    assert files >= {"model.safetensors", "manifest.json", "MLmodel"}
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in target.parent.iterdir()] == ["encoder"]


def test_a_download_does_not_overwrite_an_existing_target(
    measured: Measured, best: Callable[..., str], tmp_path: Path
) -> None:
    measured(10, 0.5)
    (tmp_path / "mine.txt").write_text("kept")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match=f"{re.escape(str(target))}: expected a directory"):
            best("--download", target)
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_damaged_checkpoint_is_not_downloaded(
    measured: Measured, best: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint = measured(10, 0.5)
    (Path(checkpoint.location.removeprefix("file://")) / "model.safetensors").write_bytes(b"w")
    with pytest.raises(CheckpointError, match="1 bytes, but 7 were published"):
        best("--download", tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()


def test_a_pruned_checkpoint_can_still_be_best(
    run: TrackedRun, measured: Measured, best: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint = measured(10, 0.5)
    measured(20, 0.4)
    run.client.set_logged_model_tags(checkpoint.model_id, {PRUNED_TAG: "true"})
    shutil.rmtree(checkpoint.location.removeprefix("file://"))
    assert "step 10" in (printed := best())
    assert "its files were deleted" in printed
    with pytest.raises(UnavailableError, match=rf"the files of {checkpoint.uri} .* were deleted"):
        best("--download", tmp_path / "encoder")
    with pytest.raises(UsageError, match=r"cannot be registered: .*were deleted"):
        best("--register", "pruned")


def test_a_registered_checkpoint_gets_one_version(
    run: TrackedRun, measured: Measured, best: Callable[..., str], client: MlflowClient
) -> None:
    def versions() -> dict[str, str]:
        found = client.search_model_versions("name='sea encoder'")
        return {str(version.version): version.source for version in found}

    def alias() -> str:
        return str(client.get_model_version_by_alias("sea encoder", "best").version)

    first = measured(10, 0.5)
    printed = best("--register", "sea encoder")
    assert printed.endswith("  registered  models:/sea encoder/1 and models:/sea encoder@best\n")
    best("--register", "sea encoder")
    assert (versions(), alias()) == ({"1": first.uri}, "1")
    second = measured(20, 0.75)
    best("--register", "sea encoder")
    assert (versions(), alias()) == ({"1": first.uri, "2": second.uri}, "2")
    best("--register", "sea encoder", "--metric", "val/ndcg_at_10")
    assert (versions(), alias()) == ({"1": first.uri, "2": second.uri}, "1")
    files = mlflow.artifacts.list_artifacts("models:/sea encoder@best")
    assert "model.safetensors" in {file.path for file in files}


def test_a_name_that_the_registry_does_not_allow(
    measured: Measured, best: Callable[..., str]
) -> None:
    measured(10, 0.5)
    with pytest.raises(TrackingError, match=r"registering models:/m-.* as 'a/b': .*'/' or ':'"):
        best("--register", "a/b")


def test_a_directory_of_somebody_elses_trainer(
    run: TrackedRun, best: Callable[..., str], tmp_path: Path
) -> None:
    found = tmp_path / "output" / "checkpoint-10"
    found.mkdir(parents=True)
    register_directory(run, found, 10)
    (checkpoint,) = run_checkpoints(run)
    bind_name(run, "val", {"measures": "mrr@10"})
    record_result(run, checkpoint, "val", {"mrr_at_10": 0.5}, ("sea", "0"))
    assert "step 10" in best()
    with pytest.raises(UsageError, match=f"they lie in {re.escape(str(found))}"):
        best("--register", "found")


def test_no_such_run(client: MlflowClient) -> None:
    with pytest.raises(TrackingError, match="no run '0123'"):
        CliRunner().invoke(
            best_command,
            ["--run-id", "0123", "--tracking-uri", client.tracking_uri],
            catch_exceptions=False,
        )


def test_an_unreachable_server_is_one_clear_error(
    run: TrackedRun, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(10, 0.5)
    best = find_best(run)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = "http://127.0.0.1:9"
    run.client = MlflowClient(away)
    with pytest.raises(TrackingError, match=rf"run {run.id}: .*127\.0\.0\.1"):
        find_best(run)
    with pytest.raises(TrackingError, match="values of step 10: "):
        mark_best(run, best)
    before = mlflow.get_tracking_uri()
    with pytest.raises(TrackingError, match=f"tracking server {away} does not answer"):
        connect(away)
    mlflow.set_tracking_uri(before)
