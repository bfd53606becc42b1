"""`mlflow-dr status`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import RUN, tracking_uri


@click.command("status")
@click.option("--run-id", required=True, help=RUN)
@tracking_uri
def command(run_id: str, tracking_uri: str | None) -> int:
    """Show the validations of a run's checkpoints: state, owner, age, lag and failures.

    \b
    Example:
        mlflow-dr status --run-id 0123456789abcdef0123456789abcdef
    """
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import resolve_run
    from mlflow_dr.tracking.server import ServerClock
    from mlflow_dr.tracking.status import run_status, status_table

    run = resolve_run(connect(tracking_uri, may_create=False), run_id)
    lines = run_status(run, ServerClock().now_ms())
    click.echo(status_table(lines) if lines else f"run {run.label} has published no checkpoint yet")
    return 0
