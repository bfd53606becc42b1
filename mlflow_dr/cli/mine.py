"""`mlflow-dr mine`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.mining.mine import MiningConfig, mine


@click.command("mine", cls=TakesSeveral)
@takes(MiningConfig)
def command(config: MiningConfig) -> None:
    """Find hard negatives for training queries: `mlflow-dr train --train-dir` reads the file.

    BM25 or an encoder ranks passages for every query; the highest-ranked ones that are not relevant
    become its negatives. If a query has several positives, margins count from the one with the
    lowest score.

    \b
    Example:
        mlflow-dr mine --dataset path/to/beir --output mined.jsonl
        mlflow-dr mine --dataset path/to/beir --output mined.jsonl.gz --with models:/m-0123 \\
            --relative-margin 0.05 --negatives 10
    """
    run = find_project_run(config.tracking_uri)
    mined = mine(config)
    lines = mined.summary(config.negatives)
    for line in lines:
        click.echo(line)
    if run is not None:
        run.log_report(mined.figures(), {"mined.txt": "\n".join(lines) + "\n"})
