"""`mlflow-dr evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_dr.cli.options import evaluation_options, tracking_uri


@click.command("evaluate")
@click.argument("encoder")
@click.option("--dataset", required=True, help="demo, msmarco, a folder, or irds:<id>.")
@click.option("--split", help="The queries to put (default: dev, else test).")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report here, as JSON.")
@click.option("--ranking", type=click.Path(path_type=Path), help="Write a TREC run file here.")
@evaluation_options
@click.option("--pooling", help="Replaces what the encoder's directory says.")
@click.option("--normalize/--no-normalize", default=None, help="Likewise.")
@click.option("--max-length", type=click.IntRange(min=3), help="Likewise, for both sides.")
@click.option("--trust-remote-code", is_flag=True, help="Let code in the directory run.")
@tracking_uri
def command(**options: Any) -> None:
    """Measure one encoder on one collection, without tracking.

    ENCODER is a directory (ours, sentence-transformers' or a bare backbone's), a hub name, or
    models:/<id> for a published checkpoint.

    \b
    Example:
        mlflow-dr evaluate my-encoder --dataset irds:vaswani --measures "ndcg@10 recall@100"
    """
    from mlflow_dr.validation.once import Once, evaluate_once

    report = evaluate_once(Once(**options))
    for name, value in report.measures.items():
        click.echo(f"{name}\t{value:.4f}")
    click.echo(
        f"{report.passages} passages in {report.seconds:.1f} s "
        f"({report.passages / report.seconds:.0f} a second, {report.dtype})"
    )
