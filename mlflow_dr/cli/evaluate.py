"""`mlflow-dr evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlflow_dr.cli.options import (
    TakesSeveral,
    check_one_set,
    encoder_options,
    evaluation_options,
    file_options,
    given_dataset,
    run_of_project,
    subset_options,
    tracking_uri,
)


@click.command("evaluate", cls=TakesSeveral)
@click.argument("encoder")
@click.option("--dataset", help="demo, msmarco, a folder, or irds:<id>.")
@file_options
@click.option("--split", help="The queries to put (default: dev, else test).")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report here, as JSON.")
@click.option("--ranking", type=click.Path(path_type=Path), help="Write a TREC run file here.")
@click.option("--force", is_flag=True, help="Replace these files if they are there.")
@subset_options
@evaluation_options
@encoder_options
@click.option("--trust-remote-code", is_flag=True, help="Let code in the directory run.")
@tracking_uri
def command(
    dataset: str | None,
    candidate_dir: Path | None,
    query_files: tuple[Path, ...],
    qrel_files: tuple[Path, ...],
    subsets: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure one encoder on one collection, without tracking.

    ENCODER is a directory (ours, sentence-transformers' or a bare backbone's), a hub name, or
    models:/<id> or models:/NAME@best for a published checkpoint. Under `mlflow run` the report is
    logged to the run, too.

    \b
    Example:
        mlflow-dr evaluate my-encoder --dataset irds:vaswani --measures "ndcg@10 recall@100"
    """
    dataset, sets = given_dataset(dataset, candidate_dir, query_files, qrel_files)
    if dataset is None:
        raise click.UsageError("give --dataset, or --candidate-dir, --query-file and --qrel-file")
    check_one_set(sets, options["split"])
    if len(subsets) > 1:
        raise click.UsageError("one --subset at a time; + joins several to one")

    from mlflow_dr.validation.once import Once, evaluate_once

    run = run_of_project(options["tracking_uri"])
    request = Once(dataset=dataset, subset=next(iter(subsets), None), **options)
    report = evaluate_once(request, run)
    for name, value in report.measures.items():
        click.echo(f"{name}\t{value:.4f}")
    click.echo(
        f"{report.passages} passages in {report.seconds:.1f} s "
        f"({report.passages / report.seconds:.0f} a second, {report.dtype})"
    )
