"""`mlflow-dr prune`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import RUN, tracking_uri


@click.command("prune")
@click.option("--run-id", help=RUN)
@click.option("--deleted", is_flag=True, help="Or those of all deleted runs.")
@click.option("--experiment", help="With --deleted: of this experiment only.")
@click.option("--keep", help="What stays, such as best:3,last:2,every:10000.")
@click.option(
    "--metric",
    help="What the best are best by, such as val/mrr_at_10 (default: the first measure of the "
    "validation that was begun first).",
)
@click.option("--unvalidated", is_flag=True, help="Let those go, too, that are not validated yet.")
@click.option("--dry-run", is_flag=True, help="Only say what would go and what stays.")
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
    """Remove files of checkpoints that need not be kept; their figures stay.

    Checkpoints that are being published or validated, that are called the best or are versions of
    registered models stay, whatever is asked. Of deleted runs everything else goes, which `mlflow
    gc` leaves behind.

    \b
    Example:
        mlflow-dr prune --run-id 0123456789abcdef0123456789abcdef --keep best:3,last:2 --dry-run
        mlflow-dr prune --deleted --experiment msmarco
    """
    if bool(run_id) == deleted or bool(keep) == deleted:
        raise click.UsageError("give --run-id and --keep, or --deleted")
    if deleted and (metric or unvalidated):
        raise click.UsageError("--metric and --unvalidated belong to --run-id")
    if experiment and not deleted:
        raise click.UsageError("--experiment belongs to --deleted")

    from mlflow_dr.decisions.keep import parse_policy
    from mlflow_dr.decisions.prune import outcomes, review, review_orphans, summary
    from mlflow_dr.tracking.client import connect, leave_waiting_to_us
    from mlflow_dr.tracking.runs import resolve_run

    policy = parse_policy(keep) if keep else None
    leave_waiting_to_us()
    client = connect(tracking_uri, may_create=False)
    if run_id and policy:
        verdicts = review(resolve_run(client, run_id), policy, metric, unvalidated)
    else:
        verdicts = review_orphans(client, experiment)
    done = []
    for one in outcomes(client, verdicts, dry_run):
        click.echo(one)
        done.append(one)
    click.echo(summary(done, dry_run))
    return 0
