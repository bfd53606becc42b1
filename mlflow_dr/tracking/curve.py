"""The curve of a validation: its figures by training step, in a few lines, and where to see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from mlflow import MlflowClient

from mlflow_dr.tracking.checkpoints import checkpoints_of
from mlflow_dr.tracking.client import is_server, shown_uri, tracking_errors, tracking_uri
from mlflow_dr.tracking.results import PREFIX
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import figures_of

LOCAL_PORT = 5000
LOOKED_AT = 200  # runs
NEWEST_FIRST = ["attributes.start_time DESC"]


class Point(NamedTuple):
    """The figures of one checkpoint."""

    step: int
    model_id: str
    values: Mapping[str, float]


def curve_of(run: TrackedRun, name: str) -> list[Point]:
    """The recorded figures of a validation, by step."""
    return [
        Point(one.step, one.model_id, figures)
        for one in checkpoints_of(run)
        if (figures := figures_of(one, name))
    ]


def summary(points: Sequence[Point], metrics: Sequence[str], run: TrackedRun) -> str:
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
    return "\n".join([*lines, where_to_look(run)])


def where_to_look(run: TrackedRun) -> str:
    """A line with the link to a run's curves; where no server runs, how to start one."""
    uri = tracking_uri()
    if is_server(uri):
        return f"curves: {link(run, uri)}"
    return (
        f"curves: mlflow server --backend-store-uri {shown_uri()} --port {LOCAL_PORT} "
        f"(or `mlflow-dr ui`), and then\n  {link(run, f'http://127.0.0.1:{LOCAL_PORT}')}"
    )


def link(run: TrackedRun, pages: str) -> str:
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
