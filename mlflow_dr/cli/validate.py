"""`mlflow-dr validate`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import evaluation_options, tracking_uri


@click.command("validate")
@click.option("--run-id", required=True, help="The MLflow run whose checkpoints are validated.")
@click.option("--dataset", help="The collection (default: the run's).")
@click.option("--split", help="The queries to put (default: the run's, else dev, else test).")
@evaluation_options
@click.option("--name", default="val", show_default=True, help="Prefixes the metrics.")
@click.option(
    "--poll-seconds",
    type=click.FloatRange(min=0.05),
    default=2.0,
    show_default=True,
    help="Time between two looks at the server.",
)
@click.option(
    "--follow/--once",
    default=True,
    show_default=True,
    help="Wait for more checkpoints until the run has ended, or do what is there and end.",
)
@tracking_uri
def command(
    run_id: str,
    dataset: str | None,
    split: str | None,
    measures: str,
    depth: int | None,
    device: str,
    dtype: str,
    keep_own_id: bool,
    name: str,
    poll_seconds: float,
    follow: bool,
    tracking_uri: str | None,
) -> int:
    """Validate each checkpoint of a run, now and as they come.

    Collection, split and lengths come from the run and its checkpoints. Start it before, during or
    after training, stop it and start it again: it does what is missing.

    \b
    Example:
        mlflow-dr validate --run-id 0123456789abcdef0123456789abcdef
    """
    from mlflow_dr.engines.devices import resolve_device
    from mlflow_dr.retrieval.measures import check_depth, parse_measures
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import find_run
    from mlflow_dr.validation.evaluate import Settings
    from mlflow_dr.validation.watch import Validation, watch

    parsed = parse_measures(measures)
    check_depth(parsed, depth)
    resolve_device(device)
    validation = Validation(
        Settings(parsed, depth, device, dtype, keep_own_id), name, dataset, split
    )
    counts = watch(find_run(connect(tracking_uri), run_id), validation, follow, poll_seconds)
    return 1 if counts.failed else 0
