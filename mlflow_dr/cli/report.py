"""`mlflow-dr report`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.cli.runs import MetricName
from mlflow_dr.config import Config, Flag
from mlflow_dr.fields import File, TrackingUri


class ReportConfig(Config):
    """`mlflow-dr report`: the run, and what is written."""

    run: Annotated[str, Flag(positional=True)]
    metric: MetricName = None
    layout: Annotated[Literal["html", "md", "latex"], Flag("--format")] = "html"
    """html writes the page; md and latex print a table for a paper."""
    output: File | None = None
    """The file of the page (default: the name of the run, .html)."""
    picture: File | None = None
    """Also write the curve into this .svg, .png or .pdf file."""
    no_log: bool = False
    """Do not keep the report with the run."""
    tracking_uri: TrackingUri = None


@click.command("report", cls=TakesSeveral)
@takes(ReportConfig)
def report_command(config: ReportConfig) -> None:
    """Write a page about a run: curves with intervals, best checkpoint, queries, speed and cost.

    RUN is the id of a run, the beginning of its id, or its name. The page is one HTML file without
    scripts. It is kept as an artifact of the run, too, with the curve as SVG and PNG.

    \b
    Example:
        mlflow-dr report 0123456789abcdef0123456789abcdef --picture curve.svg
        mlflow-dr report sea-tiny-1129-0741 --format latex
    """
    from mlflow_dr.report.contents import read_report
    from mlflow_dr.report.writing import (
        TABLES,
        check_picture,
        log_report,
        write_picture,
        write_report_page,
    )
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import resolve_run

    if config.picture is not None:
        check_picture(config.picture)
    run = resolve_run(connect(config.tracking_uri, may_create=False), config.run)
    report = read_report(run, config.metric)
    if config.layout == "html":
        name = re.sub(r"[^\w.+@-]+", "-", run.name)
        path = config.output or Path(f"{name}.html")
        write_report_page(report, path)
        click.echo(f"wrote {path}")
    elif config.output is not None:
        config.output.write_text(TABLES[config.layout](report) + "\n", encoding="utf-8")
        click.echo(f"wrote {config.output}")
    else:
        click.echo(TABLES[config.layout](report))
    if config.picture is not None:
        write_picture(report, config.picture)
        click.echo(f"wrote {config.picture}", err=config.layout != "html")
    if not config.no_log:
        log_report(report)
