"""`mlflow-dr best`."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_dr.cli.options import RUN, seed, tracking_uri


@click.command("best")
@click.option("--run-id", required=True, help=RUN)
@click.option(
    "--metric",
    help="A measure of a validation, such as val/mrr_at_10 (default: the first measure of the "
    "validation that was started first).",
)
@click.option(
    "--download",
    type=click.Path(path_type=Path),
    help="Download the checkpoint's files into this new or empty directory, and verify them.",
)
@click.option(
    "--register",
    help="Register it as a version of this model, and let the alias `best` point to it.",
)
@seed
@tracking_uri
def command(
    run_id: str,
    metric: str | None,
    download: Path | None,
    register: str | None,
    seed: int,
    tracking_uri: str | None,
) -> None:
    """Show a run's best checkpoint, and whether its lead over the runner-up is significant.

    The test is a paired randomisation test over the queries, with a bootstrap interval of the mean
    difference. The run and the checkpoint are tagged mlflow_dr.best.<validation>.

    \b
    Example:
        mlflow-dr best --run-id 0123456789abcdef0123456789abcdef --download best-encoder
    """
    from mlflow_dr.decisions.best import best_summary, find_best, mark_best
    from mlflow_dr.tracking import fetching, registry
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import resolve_run

    run = resolve_run(connect(tracking_uri, may_create=False), run_id)
    best = find_best(run, metric)
    click.echo(best_summary(run, best, seed))
    mark_best(run, best)
    if download is not None:
        fetching.download(best.checkpoint, download)
        click.echo(f"  downloaded  {download}")
    if register is not None:
        version = registry.register(run, best.checkpoint, register)
        click.echo(f"  registered  models:/{register}/{version} and models:/{register}@best")
