"""What `mlflow-dr status` and `runs` show."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from mlflow_dr.cli import group
from mlflow_dr.decisions.best import find_best, mark_best
from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import announce_checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.overview import experiment_runs, run_overview, runs_table
from mlflow_dr.tracking.results import mark_failed
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture
def followed(run: TrackedRun, measured: Callable, tmp_path: object) -> TrackedRun:
    """Two checkpoints are done, one has failed, one is open."""
    measured(10, 0.25)
    measured(20, 0.5)
    for step in (30, 40):
        publish(run, tmp_path / "published", step)
    mark_failed(run, run_checkpoints(run)[2], "val", "the weights hold NaN")
    run.log_params({"model": "tiny", "dataset": "sea"})
    return run


def test_rows_are_for_what_is_open_or_failed_and_the_rest_is_summed_up(
    followed: TrackedRun, client: MlflowClient
) -> None:
    text, is_complete = run_overview(followed)
    head, summary, _, *rows = text.splitlines()
    assert head.startswith(f"{followed.label}: running, begun ")
    assert head.endswith("; tiny on sea")
    assert summary == (
        "  val: 2 of 4 checkpoints done, 1 failed, the last at step 20; "
        "mrr_at_10 best 0.5000 at step 20, last 0.5000"
    )
    assert [row.split()[:3] for row in rows] == [["30", "val", "failed"], ["40", "val", "open"]]
    assert not is_complete
    client.set_terminated(followed.id)
    assert not run_overview(followed).is_complete
    mark_failed(followed, run_checkpoints(followed)[3], "val", "it, too")
    assert run_overview(followed).is_complete
    rows = run_overview(followed, shows_all=True).text.splitlines()[3:]
    assert rows[0].split()[:5] == ["10", "val", "done", "mrr_at_10", "0.2500"]


def test_the_list_of_runs_shows_the_best_value(
    followed: TrackedRun, client: MlflowClient, experiment: str, experiment_name: str
) -> None:
    mark_best(followed, find_best(followed))
    client.create_run(experiment, run_name="of somebody else")
    runs = experiment_runs(client, experiment_name, 3)
    assert followed.id in {run.id for run in runs}
    (row,) = (line for line in runs_table(runs).splitlines() if followed.id[:8] in line)
    assert row.startswith(followed.name)
    assert row.endswith("val/mrr_at_10 0.5000 at step 20")
    assert "of somebody else" not in runs_table(runs)
    with pytest.raises(TrackingError, match=f"did you mean '{experiment_name}'"):
        experiment_runs(client, experiment_name[:-1], 3)


def test_a_watch_ends_when_nothing_is_left(followed: TrackedRun, client: MlflowClient) -> None:
    mark_failed(followed, run_checkpoints(followed)[3], "val", "it, too")
    announce_checkpoint(followed, 50, "")
    moments = [run_overview(followed).is_complete]
    client.set_terminated(followed.id)
    moments.append(run_overview(followed).is_complete)
    assert moments == [False, False]  # it is being published


def test_a_run_or_an_experiment_is_needed() -> None:
    shown = CliRunner().invoke(group, ["status"])
    assert shown.exit_code == 2
    assert "give --run-id or --experiment; `mlflow-dr runs` lists runs" in shown.output
