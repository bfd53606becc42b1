"""`mlflow-dr mine`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from mlflow_dr.cli.options import Finite, device, dtype, run_of_project, tracking_uri


@click.command("mine")
@click.option("--dataset", required=True, help="demo, msmarco, a folder, or irds:<id>.")
@click.option(
    "--train-dir",
    "--train_dir",
    help="Training examples to mine for: a file or folder (default: the dataset's own).",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The training file to write, JSON lines; packed where it ends in .gz.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.option(
    "--with",
    "miner",
    default="bm25",
    show_default=True,
    help="bm25, or an encoder: a directory, a hub name, or models:/... of a published one.",
)
@click.option(
    "--depth",
    "--range-max",
    type=click.IntRange(min=1),
    default=100,
    show_default=True,
    help="How many passages of a ranking are looked at, positives aside.",
)
@click.option(
    "--range-min",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Skip so many of the first of them.",
)
@click.option(
    "--negatives",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="How many for each query.",
)
@click.option(
    "--sample",
    type=click.Choice(["top", "random"]),
    default="top",
    show_default=True,
    help="The best of those that are left, or any.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random sample.")
@click.option("--margin", type=float, help="Score at least so much below the positive.")
@click.option(
    "--relative-margin",
    type=Finite(0, 1),
    help="Likewise as a share of the positive's score (NV-Retriever: 0.05).",
)
@click.option("--max-score", type=float, help="Score at most this.")
@click.option("--min-score", type=float, help="Score at least this.")
@click.option(
    "--exclude-answers/--keep-answers",
    default=True,
    show_default=True,
    help="Leave out passages that hold an answer, where the collection has answers.",
)
@click.option(
    "--match",
    type=click.Choice(["string", "regex"]),
    default="string",
    show_default=True,
    help="How answers are matched; regex where they are regular expressions (CuratedTREC).",
)
@click.option("--k1", type=float, default=0.9, show_default=True, help="BM25's k1.")
@click.option("--b", type=float, default=0.4, show_default=True, help="BM25's b.")
@click.option(
    "--language",
    default="english",
    show_default=True,
    help="BM25's stop words and stemmer (Snowball's languages), or none.",
)
@device
@dtype
@click.option("--trust-remote-code", is_flag=True, help="Let code in the encoder's directory run.")
@tracking_uri
def command(k1: float, b: float, language: str, **options: Any) -> None:
    """Find hard negatives for training queries: `mlflow-dr train --train-dir` reads the file.

    A search, by BM25 or by an encoder, ranks passages for every query; the best of them that are
    not relevant become its negatives. With several positives, margins count from the one of the
    lowest score.

    \b
    Example:
        mlflow-dr mine --dataset path/to/beir --output mined.jsonl
        mlflow-dr mine --dataset path/to/beir --output mined.jsonl.gz --with models:/m-0123 \\
            --relative-margin 0.05 --negatives 10
    """
    from mlflow_dr.mining.mine import MiningConfig, mine
    from mlflow_dr.mining.rule import Rule
    from mlflow_dr.retrieval.bm25 import Bm25Settings

    run = run_of_project(options["tracking_uri"])
    rule = Rule(**{field.name: options.pop(field.name) for field in fields(Rule)})
    mined = mine(MiningConfig(rule=rule, bm25=Bm25Settings(k1, b, language), **options))
    lines = mined.summary(rule.negatives)
    for line in lines:
        click.echo(line)
    if run is not None:
        run.log_report(mined.figures(), {"mined.txt": "\n".join(lines) + "\n"})
