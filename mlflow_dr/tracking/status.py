"""What has become of a run's checkpoints: which validations are done, by whom, and what failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from mlflow import MlflowClient

from mlflow_dr.terminal import in_columns
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.client import is_server, shown_uri, tracking_errors, tracking_uri
from mlflow_dr.tracking.results import PREFIX, State, failure_reason, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import recorded_values, run_validations

CLAIMED = "claimed"
PRUNED = "pruned"
LONGEST_NOTE = 60
HEADS = ("step", "validation", "state", "owner", "age", "lag", "note")


class Line(NamedTuple):
    """One validation of one checkpoint.

    Attributes:
        step: of the checkpoint.
        validation: its name.
        state: `pending` (being published), `lost` (never to be), `open`, `claimed`, `recorded`,
            `done`, `failed` or `pruned` (its files were removed before it was done).
        owner: the validator that has claimed it last, as host:pid.
        age: seconds since it was READY.
        lag: seconds from READY to the figures.
        note: why it failed, how often it was taken over, whether its files were removed.
    """

    step: int
    validation: str
    state: str
    owner: str
    age: float
    lag: float | None
    note: str


def run_status(run: TrackedRun, now_ms: int | None = None) -> list[Line]:
    """Each validation of each checkpoint of a run, by step.

    Args:
        run: which.
        now_ms: the server's time, in ms since 1970; this machine's when None.

    Raises:
        TrackingError: the server does not answer.
    """
    now_ms = now_ms or time.time_ns() // 1_000_000
    names = list(run_validations(run)) or [""]
    return [
        _line(checkpoint, name, now_ms) for checkpoint in run_checkpoints(run) for name in names
    ]


def progress_summary(checkpoints: Iterable[Checkpoint], name: str) -> str:
    """How far a validation has come, in a few words.

    Args:
        checkpoints: of one run.
        name: the validation's.
    """
    there = [one for one in checkpoints if one.ready]
    ready = [
        one for one in there if not (one.is_pruned and validation_state(one, name) is State.OPEN)
    ]
    states = [validation_state(one, name) for one in ready]
    done = [one.step for one, state in zip(ready, states, strict=True) if state is State.DONE]
    words = f"{len(done)} of {len(ready)} checkpoints done"
    if failed := states.count(State.FAILED):
        words += f", {failed} failed"
    return f"{words}, the last at step {max(done)}" if done else words


def tag_progress(run: TrackedRun, name: str, curve_summary: str) -> None:
    """Show on the run how far a validation has come.

    Raises:
        TrackingError: the server does not answer.
    """
    run.set_tags({f"{PREFIX}{name}.status": curve_summary})


def status_table(lines: Sequence[Line]) -> str:
    """The lines under their heads, in columns."""
    rows = [
        HEADS,
        *(
            (
                str(one.step),
                one.validation or "-",
                one.state,
                one.owner or "-",
                _span(one.age),
                "-" if one.lag is None else _span(one.lag),
                one.note,
            )
            for one in lines
        ),
    ]
    return in_columns(rows)


def _line(checkpoint: Checkpoint, name: str, now_ms: int) -> Line:
    there = latest_claim(checkpoint, name)
    state = validation_state(checkpoint, name)
    lag = recorded_values(checkpoint, name).get("lag_seconds")
    notes = [PRUNED] if checkpoint.is_pruned else []
    if state is State.FAILED:
        notes.append(failure_reason(checkpoint, name)[:LONGEST_NOTE])
    elif there is not None and there.attempt > 1:
        notes.append(f"attempt {there.attempt}")
    shown = state.value
    if not checkpoint.ready:
        shown = "pending" if checkpoint.pending else "lost"
    elif state is State.OPEN and checkpoint.is_pruned:
        shown, notes = PRUNED, []
    elif state is State.OPEN and there is not None and not there.given_back:
        shown = CLAIMED
    owner = str(there.owner) if there is not None and there.owner is not None else ""
    since = checkpoint.ready_ms if checkpoint.ready else checkpoint.created_ms
    age = max(0, now_ms - since) / 1000
    return Line(checkpoint.step, name, shown, owner, age, lag, "; ".join(notes))


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


LOCAL_PORT = 5000
LOOKED_AT = 200  # runs
NEWEST_FIRST = ["attributes.start_time DESC"]


class Point(NamedTuple):
    """The figures of one checkpoint."""

    step: int
    model_id: str
    values: Mapping[str, float]


def validation_curve(run: TrackedRun, name: str) -> list[Point]:
    """The recorded figures of a validation, by step."""
    return [
        Point(one.step, one.model_id, figures)
        for one in run_checkpoints(run)
        if (figures := recorded_values(one, name))
    ]


def curve_summary(points: Sequence[Point], metrics: Sequence[str], run: TrackedRun) -> str:
    """First, last and best checkpoint, and where the curves are.

    Args:
        points: a validation's curve.
        metrics: metric names without prefix; the first one decides which checkpoint is best.
        run: whose curve.
    """
    lines = ["", f"run {run.id}: {len(points)} checkpoints validated"]
    if points:
        best = max(points, key=lambda point: point.values[metrics[0]])
        for what, point in (("first", points[0]), ("last", points[-1]), ("best", best)):
            figures = "  ".join(f"{name} {point.values[name]:.4f}" for name in metrics)
            lines.append(f"  {what:5}  step {point.step:<7} {figures}")
        lines.append(f"best checkpoint by {metrics[0]}: models:/{best.model_id}")
    return "\n".join([*lines, curves_hint(run)])


def curves_hint(run: TrackedRun) -> str:
    """A line with the link to a run's curves; where no server runs, how to start one."""
    uri = tracking_uri()
    if is_server(uri):
        return f"curves: {curves_url(run, uri)}"
    return (
        f"curves: mlflow server --backend-store-uri {shown_uri()} --port {LOCAL_PORT} "
        f"(or `mlflow-dr ui`), and then\n  {curves_url(run, f'http://127.0.0.1:{LOCAL_PORT}')}"
    )


def curves_url(run: TrackedRun, pages: str) -> str:
    """The page that shows a run's curves; MLflow's first page shows something else.

    Args:
        run: whose curves.
        pages: the address of MLflow's pages. A user, a password or a query in it is left out.
    """
    address = urlsplit(pages)
    host = address.netloc.rpartition("@")[2]
    return (
        f"{address.scheme}://{host}{address.path.rstrip('/')}/#/experiments/{run.experiment_id}"
        f"/runs/{run.id}/model-metrics?workflowType=machine_learning"
    )


def latest_run(client: MlflowClient) -> TrackedRun | None:
    """The run that was started last, of those that were validated; of all, where none was.

    Raises:
        TrackingError: the server does not answer.
    """
    with tracking_errors("looking for the latest run"):
        experiments = [one.experiment_id for one in client.search_experiments()]
        runs = client.search_runs(experiments, "", max_results=LOOKED_AT, order_by=NEWEST_FIRST)
    with_validation = (
        one for one in runs if any(key.startswith(PREFIX) for key in one.data.params)
    )
    found = next(with_validation, runs[0] if runs else None)
    return TrackedRun(client, found) if found else None
