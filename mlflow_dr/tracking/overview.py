"""Runs in a few lines each: state, figures, best checkpoint, and what is left to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Run

from mlflow_dr.errors import TrackingError
from mlflow_dr.terminal import in_columns, time_span
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.client import all_pages, tracking_errors
from mlflow_dr.tracking.descriptions import BEST_VALUE
from mlflow_dr.tracking.following import no_experiment
from mlflow_dr.tracking.results import PREFIX, State
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    OWN_TAGS,
    SHORT_ID,
    TrackedRun,
    is_over,
)
from mlflow_dr.tracking.status import PRUNED, Line, progress_summary, status_lines, status_table
from mlflow_dr.tracking.validations import Metric, metric_points, run_validations

SETTLED = (State.DONE.value, PRUNED)
HEADS = ("name", "id", "state", "begun", "collection", "model", "checkpoints", "best")
LONGEST_CELL = 40


class Overview(NamedTuple):
    """A run at one moment.

    Attributes:
        text: the run, its validations, and a row for what is open or failed.
        is_complete: whether the run is over and nothing is left to do.
    """

    text: str
    is_complete: bool


def run_overview(run: TrackedRun, now_ms: int | None = None, shows_all: bool = False) -> Overview:
    """A run's state, the progress and best figures of its validations, and what is left.

    Args:
        run: which.
        now_ms: the server's time, in ms since 1970; this machine's when None.
        shows_all: whether checkpoints that are done have a row, too.

    Raises:
        TrackingError: the server does not answer.
    """
    now_ms = now_ms or time.time_ns() // 1_000_000
    validations = run_validations(run)  # fetches the run
    checkpoints = run_checkpoints(run)
    lines = status_lines(checkpoints, list(validations), now_ms)
    texts = [_headline(run, now_ms)]
    for name, config in validations.items():
        measures = str(config.get("measures", "")).replace("@", "_at_").split()
        summary = progress_summary(checkpoints, name)
        figures = _figures(checkpoints, Metric(name, measures[0])) if measures else ""
        texts.append(f"  {name}: {summary}{figures}")
    if not validations:
        texts.append(f"  {len(checkpoints)} checkpoints, and no validation yet")
    shown = [line for line in lines if shows_all or line.state not in SETTLED]
    if shown:
        texts.append(status_table(shown))
    is_complete = is_over(run.seen) and not [line for line in shown if _is_left(line)]
    return Overview("\n".join(texts), is_complete)


def _is_left(line: Line) -> bool:
    return line.state in (State.OPEN.value, State.RECORDED.value, "claimed", "pending")


def _headline(run: TrackedRun, now_ms: int) -> str:
    info, data = run.seen.info, run.seen.data
    state = info.status.lower()
    since = info.end_time or info.start_time
    ago = f", {'ended' if info.end_time else 'begun'} {time_span((now_ms - since) / 1000)} ago"
    model = data.params.get("model")
    dataset = data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM)
    about = [model or "", f"on {dataset}" if dataset else ""]
    return " ".join(filter(None, [f"{run.label}: {state}{ago if since else ''};", *about])).rstrip(
        ";"
    )


def _figures(checkpoints: Sequence[Checkpoint], metric: Metric) -> str:
    """The best and the last value of a metric, in words; empty if there is none."""
    points = metric_points(checkpoints, metric)
    if not points:
        return ""
    best = max(points, key=lambda point: (metric.sign * point[1], -point[0]))
    return f"; {metric.key} best {best[1]:.4f} at step {best[0]}, last {points[-1][1]:.4f}"


def experiment_runs(client: MlflowClient, experiment: str | None, most: int) -> list[TrackedRun]:
    """The latest runs that have to do with this package, the newest first.

    Args:
        client: of the tracking server.
        experiment: its name; all experiments when None.
        most: how many.

    Raises:
        TrackingError: there is no such experiment, or the server does not answer.
    """
    with tracking_errors("looking for runs"):
        if experiment is None:
            ids = [entry.experiment_id for entry in client.search_experiments()]
        else:
            found = client.get_experiment_by_name(experiment)
            if found is None or found.lifecycle_stage != "active":
                raise TrackingError(no_experiment(client, experiment))
            ids = [found.experiment_id]
        newest = ["attributes.start_time DESC"]
        runs: list[TrackedRun] = []
        for run in all_pages(client.search_runs, ids, "", order_by=newest):
            if _is_ours(run):
                runs.append(TrackedRun(client, run))
            if len(runs) == most:
                break
    return runs


def _is_ours(run: Run) -> bool:
    keys = [*run.data.tags, *run.data.params]
    return any(key.startswith(OWN_TAGS) for key in keys)


def runs_table(runs: Sequence[TrackedRun], now_ms: int | None = None) -> str:
    """A row for each run: state, collection, model, how far validation is, and the best value."""
    now_ms = now_ms or time.time_ns() // 1_000_000
    return in_columns([HEADS, *(_row(run, now_ms) for run in runs)])


def _row(run: TrackedRun, now_ms: int) -> tuple[str, ...]:
    info, data = run.seen.info, run.seen.data
    dataset = data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM, "-")
    statuses = [
        value.partition(" checkpoints")[0]
        for key, value in sorted(data.tags.items())
        if key.startswith(PREFIX) and key.endswith(".status")
    ]
    best = [
        f"{key.removeprefix(BEST_VALUE)} {value}"
        for key, value in sorted(data.tags.items())
        if key.startswith(BEST_VALUE)
    ]
    return (
        run.name,
        run.id[:SHORT_ID],
        info.status.lower(),
        f"{time_span((now_ms - info.start_time) / 1000)} ago" if info.start_time else "-",
        _end(dataset),
        _end(data.params.get("model", "-")),
        ", ".join(statuses) or "-",
        ", ".join(best) or "-",
    )


def _end(name: str) -> str:
    return name if len(name) <= LONGEST_CELL else f"...{name[3 - LONGEST_CELL :]}"
