"""`mlflow-dr doctor`: what this machine has, and what would fail on it."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.config import Config
from mlflow_dr.fields import TrackingUri

COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


class DoctorConfig(Config):
    """`mlflow-dr doctor`: which tracking server."""

    tracking_uri: TrackingUri = None


@click.command("doctor", cls=TakesSeveral)
@takes(DoctorConfig)
def doctor_command(config: DoctorConfig) -> int:
    """Check this machine, the tracking server and the hub, before something fails.

    Each check does in small what training and validating do: it multiplies matrices, searches,
    writes a file into the cache, and a tag and a file to the experiment of new runs
    (MLFLOW_EXPERIMENT_NAME), which it removes again. The exit code is 1 if something would fail.

    \b
    Example:
        mlflow-dr doctor --tracking-uri http://127.0.0.1:5000
    """
    from mlflow_dr.doctor.examine import examine

    failed = 0
    for finding in examine(config.tracking_uri):
        failed += finding.level == "fail"
        level = click.style(f"{finding.level:5}", fg=COLORS[finding.level])
        click.echo(f"{level} {finding.name:16} {finding.text}")
    click.echo(f"{failed} of these would fail" if failed else "nothing would fail")
    return int(bool(failed))
