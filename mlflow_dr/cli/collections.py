"""`mlflow-dr datasets`, `mine` and `subset`: what is made of a collection, and written."""

from __future__ import annotations

from typing import Annotated, Literal

import click
from pydantic import Field

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.collection.catalogue import ENTRIES, all_formats
from mlflow_dr.config import Flag
from mlflow_dr.fields import (
    CollectionConfig,
    Count,
    Devices,
    Dtype,
    File,
    Judged,
    SearchBackendName,
    Seed,
    Subsets,
)
from mlflow_dr.mining.mine import MiningConfig, mine


@click.command("datasets")
def datasets_command() -> None:
    """List the datasets that can be named.

    \b
    Example:
        mlflow-dr datasets
    """
    for entry in ENTRIES:
        click.echo(f"{entry.name:10}{entry.sizes}\n{'':10}from {entry.source}")
    for form in all_formats():
        click.echo(f"{form.pattern}\n{'':10}from {form.description}")


@click.command("mine", cls=TakesSeveral)
@takes(MiningConfig)
def mine_command(config: MiningConfig) -> None:
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
        run.log_report({}, {"mined.txt": "\n".join(lines) + "\n"})


class SubsetConfig(CollectionConfig):
    """`mlflow-dr subset`: a part of a collection, and the files to write."""

    split: str | None = None
    """Whose queries and judgements (default: dev, else test)."""
    subset: Annotated[Subsets, Field(min_length=1, max_length=1)]
    judged: Judged = "relevant"
    seed: Seed = 0
    output: File
    """The folder to write; it must not exist yet."""
    layout: Annotated[Literal["beir", "asyncval"], Flag("--format")] = "beir"
    """A BEIR folder, or Asyncval's candidates, queries and judgements."""
    shards: Count = 1
    """Passage files."""
    tokenizer: str | None = None
    """Write token ids of this tokenizer, as Asyncval itself expects them."""
    device: Devices = "auto"
    dtype: Dtype = "auto"
    search_backend: SearchBackendName = "auto"


@click.command("subset", cls=TakesSeveral)
@takes(SubsetConfig)
def subset_command(config: SubsetConfig) -> None:
    """Write a subset of a collection, ahead of the validations that use it.

    \b
    Example:
        mlflow-dr subset --dataset msmarco --subset bm25@50+random:10000 --output small
        mlflow-dr subset --dataset small --subset full --output files --format asyncval --shards 4
    """
    name, split = config.one_dataset(config.split)
    if config.tokenizer and config.layout != "asyncval":
        raise click.UsageError("--tokenizer writes token ids; they need --format asyncval")

    from mlflow_dr.collection.catalogue import chosen_split, open_collection
    from mlflow_dr.subsets.spec import parse_subset
    from mlflow_dr.subsets.strategies import SubsetSources
    from mlflow_dr.subsets.subset import make_subset, write_subset

    spec = parse_subset(config.subset[0], config.seed, config.judged)
    tokens = None
    if config.tokenizer:
        from mlflow_dr.encoder.tokenize import plain_tokens

        tokens = plain_tokens(config.tokenizer)
    collection = open_collection(name)
    split = chosen_split(collection, split)
    corpus, topics = collection.corpus(), collection.topics(split)
    sources = SubsetSources(
        corpus,
        topics,
        device=config.device,
        dtype=config.dtype,
        search_backend=config.search_backend,
    )
    subset = make_subset(spec, sources)
    write_subset(config.output, subset, split, config.layout, config.shards, tokens)
    origins = ", ".join(f"{name} {count}" for name, count in subset.sizes.items())
    click.echo(f"{len(subset)} passages ({origins}), {len(subset.topics.queries)} queries")
    click.echo(f"wrote {config.output}")
