"""`mlflow-dr prune`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import RUN, tracking_uri


@click.command("prune")
@click.option("--run-id", help=RUN)
@click.option(
    "--deleted", is_flag=True, help="Instead of one run: the checkpoints of all deleted runs."
)
@click.option("--experiment", help="With --deleted: only runs of this experiment.")
@click.option("--keep", help="Rules that say what is kept, such as best:3,last:2,every:10000.")
@click.option(
    "--metric",
    help="Metric that decides which are best, such as val/mrr_at_10 (default: the first measure of "
    "the validation that was started first).",
)
@click.option(
    "--unvalidated", is_flag=True, help="Also delete checkpoints that are not validated yet."
)
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted and what is kept.")
@tracking_uri
def command(
    run_id: str | None,
    deleted: bool,
    experiment: str | None,
    keep: str | None,
    metric: str | None,
    unvalidated: bool,
    dry_run: bool,
    tracking_uri: str | None,
) -> int:
    """Delete the files of checkpoints that are no longer needed; their metrics stay.

    These are always kept: checkpoints that are being published or validated, that are tagged as
    best, or that are versions of registered models. Of deleted runs all others are deleted;
    `mlflow gc` would leave them behind.

    \b
    Example:
        mlflow-dr prune --run-id 0123456789abcdef0123456789abcdef --keep best:3,last:2 --dry-run
        mlflow-dr prune --deleted --experiment msmarco
    """
    if bool(run_id) == deleted or bool(keep) == deleted:
        raise click.UsageError("pass --run-id and --keep, or pass --deleted")
    if deleted and (metric or unvalidated):
        raise click.UsageError("--metric and --unvalidated need --run-id")
    if experiment and not deleted:
        raise click.UsageError("--experiment needs --deleted")

    from mlflow_dr.decisions.pruning import (
        carry_out,
        parse_keep_rules,
        pruning_summary,
        review,
        review_orphans,
    )
    from mlflow_dr.tracking.client import connect, limit_mlflow_retries
    from mlflow_dr.tracking.runs import resolve_run

    rules = parse_keep_rules(keep) if keep else None
    limit_mlflow_retries()
    client = connect(tracking_uri, may_create=False)
    if run_id and rules:
        verdicts = review(resolve_run(client, run_id), rules, metric, unvalidated)
    else:
        verdicts = review_orphans(client, experiment)
    done = []
    for verdict in carry_out(client, verdicts, dry_run):
        click.echo(verdict)
        done.append(verdict)
    click.echo(pruning_summary(done, dry_run))
    return 0
