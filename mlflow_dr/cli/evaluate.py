"""`mlflow-dr evaluate`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.validation.config import EvaluateConfig


@click.command("evaluate", cls=TakesSeveral)
@takes(EvaluateConfig)
def command(config: EvaluateConfig) -> None:
    """Measure one encoder on one collection, without tracking.

    ENCODER is a directory (ours, sentence-transformers' or a bare backbone's), a hub name, or
    models:/<id> or models:/NAME@best for a published checkpoint. Under `mlflow run` the report is
    logged to the run, too.

    \b
    Example:
        mlflow-dr evaluate my-encoder --dataset irds:vaswani --measures "ndcg@10 recall@100"
    """
    from mlflow_dr.validation.evaluate import evaluate_encoder

    report = evaluate_encoder(config, find_project_run(config.tracking_uri))
    for name, value in report.measures.items():
        click.echo(f"{name}\t{value:.4f}")
    click.echo(
        f"{report.passages} passages in {report.seconds:.1f} s "
        f"({report.passages / report.seconds:.0f} a second, {report.dtype})"
    )
