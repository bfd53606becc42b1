"""`mlflow-dr loaders`: ways to load documents, compared."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.loaders.config import LoadersConfig


@click.command("loaders", cls=TakesSeveral)
@takes(LoadersConfig)
def loaders_command(config: LoadersConfig) -> None:
    """Measure what it costs to bring documents from disk to the training process and the device.

    Each combination of document store, workers and the other options is a cell: a fresh process
    that loads the same passages in the same order. The report says how fast each is, how much
    memory it takes and where the time goes. If the study is stopped, start it again: what is
    measured is kept.

    \b
    Example:
        mlflow-dr loaders --passages 100000 --model tiny
        mlflow-dr loaders --dataset msmarco --store lookup ir_datasets --workers 0 2 threads:2
        mlflow-dr loaders --store lookup --cache warm cold --payload lookup --output study
    """
    from mlflow_dr.loaders.report import study_text, write_study
    from mlflow_dr.loaders.study import logged_study

    study = logged_study(config)
    click.echo(study_text(study))
    if config.output is not None:
        write_study(study, config.output)
        click.echo(f"wrote {config.output}")
