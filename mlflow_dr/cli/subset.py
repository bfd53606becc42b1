"""`mlflow-dr subset`."""

from __future__ import annotations

from pathlib import Path

import click

from mlflow_dr.cli.options import (
    TakesSeveral,
    check_one_set,
    device,
    dtype,
    file_options,
    given_dataset,
    subset_options,
)


@click.command("subset", cls=TakesSeveral)
@click.option("--dataset", help="demo, msmarco, a folder, or irds:<id>.")
@file_options
@click.option("--split", help="Whose queries and judgements (default: dev, else test).")
@subset_options
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to write, which is not there yet.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(("beir", "asyncval")),
    default="beir",
    show_default=True,
    help="A BEIR folder, or Asyncval's candidates, queries and judgements.",
)
@click.option(
    "--shards", type=click.IntRange(min=1), default=1, show_default=True, help="Passage files."
)
@click.option("--tokenizer", help="Write token ids of this tokenizer, as Asyncval itself wants.")
@device
@dtype
def command(
    dataset: str | None,
    candidate_dir: Path | None,
    query_files: tuple[Path, ...],
    qrel_files: tuple[Path, ...],
    split: str | None,
    subsets: tuple[str, ...],
    seed: int,
    judged: str,
    output: Path,
    layout: str,
    shards: int,
    tokenizer: str | None,
    device: str,
    dtype: str,
) -> None:
    """Write a subset of a collection, ahead of the validations that use it.

    \b
    Example:
        mlflow-dr subset --dataset msmarco --subset bm25@50+random:10000 --output small
        mlflow-dr subset --dataset small --subset full --output files --format asyncval --shards 4
    """
    dataset, sets = given_dataset(dataset, candidate_dir, query_files, qrel_files)
    if dataset is None:
        raise click.UsageError("give --dataset, or --candidate-dir, --query-file and --qrel-file")
    if len(subsets) != 1:
        raise click.UsageError("give one --subset; + joins several to one")
    check_one_set(sets, split)
    if tokenizer and layout != "asyncval":
        raise click.UsageError("--tokenizer writes token ids, which --format asyncval alone holds")

    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.collection.formats import chosen_split
    from mlflow_dr.subsets.export import write_subset
    from mlflow_dr.subsets.spec import parse_subset
    from mlflow_dr.subsets.strategies import SubsetSources
    from mlflow_dr.subsets.subset import make_subset

    spec = parse_subset(subsets[0], seed, judged)
    tokens = None
    if tokenizer:
        from mlflow_dr.encoder.tokenize import plain_tokens

        tokens = plain_tokens(tokenizer)
    collection = open_collection(dataset)
    chosen = chosen_split(collection, split)
    corpus = collection.corpus()
    sources = SubsetSources(corpus, collection.topics(chosen), device=device, dtype=dtype)
    subset = make_subset(spec, sources)
    write_subset(output, subset, chosen, layout, shards, tokens)
    origins = ", ".join(f"{name} {count}" for name, count in subset.sizes.items())
    click.echo(f"{len(subset)} passages ({origins}), {len(subset.topics.queries)} queries")
    click.echo(f"wrote {output}")
