"""The state of each validation of a run's checkpoints, and its curve, as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from mlflow import MlflowClient

from mlflow_dr.terminal import in_columns, time_span
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.client import is_server, shown_uri, tracking_errors, tracking_uri
from mlflow_dr.tracking.descriptions import REPORT_TAG, charts_address
from mlflow_dr.tracking.fetching import local_directory
from mlflow_dr.tracking.results import PREFIX, TIMINGS, State, failure_reason, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import recorded_values, sign_of

CLAIMED = "claimed"
PRUNED = "pruned"
LONGEST_NOTE = 60
HEADS = ("step", "validation", "state", "figure", "owner", "age", "lag", "note")


class Line(NamedTuple):
    """One validation of one checkpoint.

    Attributes:
        step: of the checkpoint.
        validation: its name.
        state: `pending` (being published), `lost` (never to be), `open`, `claimed`, `recorded`,
            `done`, `failed` or `pruned` (its files were deleted before it was done).
        figure: its first measure and the value.
        owner: the validator that claimed it last, as host:pid.
        age: seconds since it was READY.
        lag: seconds from READY to the metrics.
        note: why it failed, how often it was taken over, whether its files were deleted.
    """

    step: int
    validation: str
    state: str
    figure: str
    owner: str
    age: float
    lag: float | None
    note: str


def status_lines(
    checkpoints: Iterable[Checkpoint], names: Sequence[str], now_ms: int
) -> list[Line]:
    """Each validation of these names of each checkpoint; one line of each without names."""
    return [_line(checkpoint, name, now_ms) for checkpoint in checkpoints for name in names or [""]]


def progress_summary(checkpoints: Iterable[Checkpoint], name: str) -> str:
    """How many checkpoints of a run a validation has done, in a line."""
    states = [
        (checkpoint.step, state)
        for checkpoint in checkpoints
        if checkpoint.ready
        and (
            (state := validation_state(checkpoint, name)) is not State.OPEN
            or not checkpoint.is_pruned
        )
    ]
    done = [step for step, state in states if state is State.DONE]
    failed = sum(state is State.FAILED for _, state in states)
    summary = f"{len(done)} of {len(states)} checkpoints done"
    summary += f", {failed} failed" if failed else ""
    return f"{summary}, the last at step {max(done)}" if done else summary


def tag_progress(run: TrackedRun, name: str, curve_summary: str) -> None:
    """Tag a run with the progress of a validation, unless it had that tag when it was fetched.

    Raises:
        TrackingError: the server does not answer.
    """
    key = f"{PREFIX}{name}.status"
    if run.seen.data.tags.get(key) != curve_summary:
        run.set_tags({key: curve_summary})


def status_table(lines: Sequence[Line]) -> str:
    """The lines as a table with heads."""
    rows = [
        HEADS,
        *(
            (
                str(line.step),
                line.validation or "-",
                line.state,
                line.figure or "-",
                line.owner or "-",
                time_span(line.age),
                "-" if line.lag is None else time_span(line.lag),
                line.note,
            )
            for line in lines
        ),
    ]
    return in_columns(rows)


def _line(checkpoint: Checkpoint, name: str, now_ms: int) -> Line:
    claim = latest_claim(checkpoint, name)
    state = validation_state(checkpoint, name)
    values = recorded_values(checkpoint, name)
    lag = values.get("lag_seconds")
    figure = next((f"{key} {values[key]:.4f}" for key in values if key not in TIMINGS), "")
    notes = [PRUNED] if checkpoint.is_pruned else []
    if state is State.FAILED:
        notes.append(failure_reason(checkpoint, name)[:LONGEST_NOTE])
    elif claim is not None and claim.attempt > 1:
        notes.append(f"attempt {claim.attempt}")
    shown = state.value
    if not checkpoint.ready:
        shown = "pending" if checkpoint.pending else "lost"
    elif state is State.OPEN and checkpoint.is_pruned:
        shown, notes = PRUNED, []
    elif state is State.OPEN and claim is not None and not claim.given_back:
        shown = CLAIMED
    owner = str(claim.owner) if claim is not None and claim.owner is not None else ""
    since = checkpoint.ready_ms if checkpoint.ready else checkpoint.created_ms
    age = max(0, now_ms - since) / 1000
    return Line(checkpoint.step, name, shown, figure, owner, age, lag, "; ".join(notes))


LOCAL_PORT = 5000
LOOKED_AT = 200  # runs
NEWEST_FIRST = ["attributes.start_time DESC"]


def curve_summary(run: TrackedRun, name: str, metrics: Sequence[str]) -> str:
    """First, last and best checkpoint of a validation, and where the curves are.

    Args:
        run: of the validation.
        name: of the validation.
        metrics: names without prefix; the first one decides which checkpoint is best.

    Raises:
        TrackingError: the server does not answer.
    """
    curve = [
        (checkpoint, values)
        for checkpoint in run_checkpoints(run)
        if (values := recorded_values(checkpoint, name))
    ]
    lines = ["", f"run {run.id}: {len(curve)} checkpoints validated"]
    if curve:
        sign = sign_of(metrics[0])
        best = max(curve, key=lambda point: sign * point[1][metrics[0]])
        for label, (checkpoint, values) in zip(
            ("first", "last", "best"), (curve[0], curve[-1], best), strict=True
        ):
            shown = "  ".join(f"{metric} {values[metric]:.4f}" for metric in metrics)
            lines.append(f"  {label:5}  step {checkpoint.step:<7} {shown}")
        lines.append(f"best checkpoint by {metrics[0]}: {best[0].uri}")
    return "\n".join([*lines, curves_hint(run)])


def curves_hint(run: TrackedRun) -> str:
    """The link to a run's curves; without a server, also how to start one."""
    uri = tracking_uri()
    if is_server(uri):
        return f"curves: {curves_url(run, uri)}"
    return (
        f"curves: mlflow server --backend-store-uri {shown_uri()} --port {LOCAL_PORT} "
        f"(or `mlflow-dr ui`), and then\n  {curves_url(run, f'http://127.0.0.1:{LOCAL_PORT}')}"
    )


def report_hint(run: TrackedRun) -> str:
    """Where the report of a run is: its file, or the page of MLflow that shows it."""
    artifact = run.fetch().data.tags.get(REPORT_TAG, "")
    if (directory := local_directory(run.seen.info.artifact_uri)) is not None:
        return f"report: {directory / artifact}"
    page = curves_url(run, tracking_uri()).replace("/model-metrics", f"/artifacts/{artifact}")
    return f"report: {page}"


def curves_url(run: TrackedRun, pages: str) -> str:
    """The address of the page that shows a run's curves.

    Args:
        run: of the curves.
        pages: the address of MLflow's pages; a user, a password and a query in it are left out.
    """
    address = urlsplit(pages)
    host = address.netloc.rpartition("@")[2]
    return f"{address.scheme}://{host}{address.path.rstrip('/')}/{charts_address(run)}"


def latest_run(client: MlflowClient) -> TrackedRun | None:
    """The latest run that was validated; the latest run if none was.

    Raises:
        TrackingError: the server does not answer.
    """
    with tracking_errors("looking for the latest run"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, "", max_results=LOOKED_AT, order_by=NEWEST_FIRST)
    validated = (run for run in runs if any(key.startswith(PREFIX) for key in run.data.params))
    latest = next(validated, runs[0] if runs else None)
    return TrackedRun(client, latest) if latest else None
