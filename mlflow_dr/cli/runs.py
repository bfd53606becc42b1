"""`mlflow-dr best`, `status`, `runs`, `prune` and `ui`: what there is of a run."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Annotated, Any

import click
from pydantic import Field

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.config import Config, Flag
from mlflow_dr.fields import RUN, File, KeepRules, RunName, Seed, TrackingUri

HOST = "127.0.0.1"
PORTS_TRIED = 20
LATEST_RUNS = 10  # of an experiment, that `status` shows

MetricName = Annotated[
    str | None,
    Field(
        description="Metric that decides which are best, such as val/mrr_at_10 (default: the first "
        "measure of the validation that was started first)."
    ),
]


class StatusConfig(Config):
    """`mlflow-dr status`: the run or the experiment, and how much is shown."""

    run_id: RunName = None
    experiment: str | None = None
    """Instead of one run: the latest runs of this experiment."""
    shows_all: Annotated[bool, Flag("--all")] = False
    """Also show a row for each checkpoint that is done."""
    watch: bool = False
    """Show it again when it changes, until the run is over and nothing is left to do."""
    poll_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 5.0
    """With --watch: time between two requests."""
    tracking_uri: TrackingUri = None


class RunsConfig(Config):
    """`mlflow-dr runs`: which runs."""

    experiment: str | None = None
    """Only runs of this experiment."""
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    """The number of runs."""
    tracking_uri: TrackingUri = None


class BestConfig(Config):
    """`mlflow-dr best`: the run, the metric, and what is done with the checkpoint."""

    run_id: Annotated[str, RUN]
    tracking_uri: TrackingUri = None
    metric: MetricName = None
    download: File | None = None
    """Download the checkpoint's files into this new or empty directory, and verify them."""
    register_as: Annotated[str | None, Flag("--register")] = None
    """Register it as a version of this model, and let the alias `best` point to it."""
    push: str | None = None
    """Upload it to this repository (OWNER/NAME) of the Hugging Face hub, with a card of its
    figures."""
    licence: Annotated[str | None, Flag("--license", "--licence")] = None
    """With --push: the licence on the card, such as apache-2.0."""
    private: bool = False
    """With --push: make the repository private if it is new."""
    seed: Seed = 0


@click.command("best", cls=TakesSeveral)
@takes(BestConfig)
def best_command(config: BestConfig) -> None:
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

    if config.push is not None:
        from mlflow_dr.report.pushing import check_repository

        check_repository(config.push, config.licence)
    elif config.licence or config.private:
        raise click.UsageError("--license and --private need --push")
    run = resolve_run(connect(config.tracking_uri, may_create=False), config.run_id)
    best = find_best(run, config.metric)
    click.echo(best_summary(run, best, config.seed))
    mark_best(run, best)
    if config.download is not None:
        fetching.download(best.checkpoint, config.download)
        click.echo(f"  downloaded  {config.download}")
    if (name := config.register_as) is not None:
        version = registry.register(run, best.checkpoint, name)
        click.echo(f"  registered  models:/{name}/{version} and models:/{name}@best")
    if config.push is not None:
        from mlflow_dr.report.contents import read_report
        from mlflow_dr.report.pushing import push

        address = push(read_report(run, config.metric), config.push, config.licence, config.private)
        click.echo(f"  pushed      {address}")
        if config.licence is None:
            click.echo("  the card names no licence; pass --license", err=True)


@click.command("status", cls=TakesSeveral)
@takes(StatusConfig)
def status_command(config: StatusConfig) -> None:
    """Show how far the validations of a run are: figures, best checkpoint, what is open or failed.

    Checkpoints that are done are summed up; --all shows a row for each.

    \b
    Example:
        mlflow-dr status --run-id 0123456789abcdef0123456789abcdef --watch
        mlflow-dr status --experiment msmarco
    """
    if bool(config.run_id) == bool(config.experiment):
        raise click.UsageError("give --run-id or --experiment; `mlflow-dr runs` lists runs")
    from mlflow_dr.tracking.client import connect

    client = connect(config.tracking_uri, may_create=False)
    before = ""
    while True:
        text, is_complete = _status(client, config)
        if config.watch and before and text != before and sys.stdout.isatty():
            click.clear()
        if text != before:
            click.echo(text)
        before = text
        if is_complete or not config.watch:
            return
        time.sleep(config.poll_seconds)


def _status(client: Any, config: StatusConfig) -> tuple[str, bool]:
    """The text of one moment, and whether nothing more will change."""
    from mlflow_dr.tracking.overview import experiment_runs, run_overview
    from mlflow_dr.tracking.runs import resolve_run
    from mlflow_dr.tracking.server import ServerClock

    if config.run_id is not None:
        runs = [resolve_run(client, config.run_id)]
    else:
        runs = experiment_runs(client, config.experiment, LATEST_RUNS)
    now_ms = ServerClock().now_ms()
    overviews = [run_overview(run, now_ms, config.shows_all) for run in runs]
    text = "\n\n".join(overview.text for overview in overviews)
    is_complete = all(overview.is_complete for overview in overviews)
    return text or f"experiment {config.experiment!r} has no run of mlflow-dr yet", is_complete


@click.command("runs", cls=TakesSeveral)
@takes(RunsConfig)
def runs_command(config: RunsConfig) -> None:
    """List the latest runs: state, collection, model, validated checkpoints and the best value.

    \b
    Example:
        mlflow-dr runs --experiment msmarco
    """
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.overview import experiment_runs, runs_table
    from mlflow_dr.tracking.server import ServerClock

    client = connect(config.tracking_uri, may_create=False)
    runs = experiment_runs(client, config.experiment, config.limit)
    click.echo(runs_table(runs, ServerClock().now_ms()) if runs else "no run of mlflow-dr yet")


class PruneConfig(Config):
    """`mlflow-dr prune`: the runs, and what is kept of them."""

    run_id: RunName = None
    deleted: bool = False
    """Instead of one run: the checkpoints of all deleted runs."""
    experiment: str | None = None
    """With --deleted: only runs of this experiment."""
    keep: KeepRules | None = None
    """Rules that say what is kept, such as best:3,last:2,every:10000."""
    metric: MetricName = None
    unvalidated: bool = False
    """Also delete checkpoints that are not validated yet."""
    dry_run: bool = False
    """Only print what would be deleted and what is kept."""
    tracking_uri: TrackingUri = None


@click.command("prune", cls=TakesSeveral)
@takes(PruneConfig)
def prune_command(config: PruneConfig) -> None:
    """Delete the files of checkpoints that are no longer needed; their metrics stay.

    These are always kept: checkpoints that are being published or validated, that are tagged as
    best, or that are versions of registered models. Of deleted runs all others are deleted;
    `mlflow gc` would leave them behind.

    \b
    Example:
        mlflow-dr prune --run-id 0123456789abcdef0123456789abcdef --keep best:3,last:2 --dry-run
        mlflow-dr prune --deleted --experiment msmarco
    """
    if bool(config.run_id) == config.deleted or bool(config.keep) == config.deleted:
        raise click.UsageError("pass --run-id and --keep, or pass --deleted")
    if config.deleted and (config.metric or config.unvalidated):
        raise click.UsageError("--metric and --unvalidated need --run-id")
    if config.experiment and not config.deleted:
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

    rules = parse_keep_rules(config.keep) if config.keep else None
    limit_mlflow_retries()
    client = connect(config.tracking_uri, may_create=False)
    if config.run_id and rules:
        verdicts = review(
            resolve_run(client, config.run_id), rules, config.metric, config.unvalidated
        )
    else:
        verdicts = review_orphans(client, config.experiment)
    done = []
    for verdict in carry_out(client, verdicts, config.dry_run):
        click.echo(verdict)
        done.append(verdict)
    click.echo(pruning_summary(done, config.dry_run))


class UiConfig(Config):
    """`mlflow-dr ui`: where the pages are served."""

    port: Annotated[int, Field(ge=1, le=65535)] = 5000
    """Port of MLflow's web pages."""
    tracking_uri: TrackingUri = None


@click.command("ui", cls=TakesSeveral)
@takes(UiConfig)
def ui_command(config: UiConfig) -> None:
    """Start MLflow's web pages, and print the link to the curves of the latest run.

    If a tracking server is running, it already has these pages, and only the link is printed.

    \b
    Example:
        mlflow-dr ui --port 5001
    """
    from mlflow_dr.tracking.client import connect, is_server
    from mlflow_dr.tracking.client import tracking_uri as chosen_uri
    from mlflow_dr.tracking.status import curves_url, latest_run

    client = connect(config.tracking_uri, may_create=False)
    uri, port = chosen_uri(), config.port
    base = uri if is_server(uri) else f"http://{HOST}:{port}"
    if not is_server(uri) and not _is_free(port):
        others = range(port + 1, port + PORTS_TRIED)
        other = next((other for other in others if _is_free(other)), None) or "another number"
        raise click.ClickException(
            f"port {port} is taken; pass --port {other} (make ui PORT={other})"
        )
    run = latest_run(client)
    click.echo(f"curves of {run.label}: {curves_url(run, base)}" if run else f"no run yet: {base}")
    if not is_server(uri):
        sys.stdout.flush()
        argv = ["server", "--backend-store-uri", uri, "--host", HOST, "--port", str(port)]
        os.execv(sys.executable, [sys.executable, "-m", "mlflow", *argv])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
