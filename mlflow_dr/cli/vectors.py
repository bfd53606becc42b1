"""`mlflow-dr encode`, `search`, `index` and `convert`: vectors that are kept, and rankings."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.cli.tevatron import EncodeCommand, SearchCommand
from mlflow_dr.vectors.config import ConvertConfig, EncodeConfig, IndexConfig, SearchConfig


@click.command("encode", cls=EncodeCommand)
@takes(EncodeConfig)
def encode_command(config: EncodeConfig) -> int:
    """Encode the passages of a collection, or the queries of a split, into files of vectors.

    ENCODER is a directory, a hub name, or models:/<id> or models:/NAME@best for a published
    checkpoint. Each shard has a manifest of its own and needs no other shard. If the command is
    stopped, start it again: it continues where it was.

    \b
    Example:
        mlflow-dr encode models:/m-0123 --dataset msmarco --output passages
        mlflow-dr encode models:/m-0123 --dataset msmarco --output passages --shard 0/4
        mlflow-dr encode models:/m-0123 --dataset msmarco --split dev --output queries
        mlflow-dr encode --check passages
    """
    if config.check is not None:
        from mlflow_dr.vectors.encoding import missing_vectors

        faults = missing_vectors(config.check)
        for fault in faults:
            click.echo(fault)
        if not faults:
            click.echo(f"{config.check} is complete")
        return 1 if faults else 0

    from mlflow_dr.vectors.encoding import encode

    manifests = encode(config)
    first, rows = manifests[0], sum(manifest.rows for manifest in manifests)
    of = f"shard {first.shard}/{first.shards}, " if len(manifests) < first.shards else ""
    click.echo(
        f"{of}{rows} of {first.texts} {first.kind}, {first.dimension} dimensions, "
        f"{first.vector_dtype}"
    )
    click.echo(f"wrote {config.output}")
    return 0


@click.command("search", cls=SearchCommand)
@takes(SearchConfig)
def search_command(config: SearchConfig) -> None:
    """Rank the passages of a folder of vectors for queries, exactly, and measure the ranking.

    SOURCES is a folder that `encode` has written, or Parquet files of other programs with an id and
    a vector in each row. With --merge, SOURCES are the rankings of all shards. Memory does not grow
    with the number of passages.

    \b
    Example:
        mlflow-dr search passages --question "what do gulls eat"
        mlflow-dr search passages --queries queries --output dev.trec
        mlflow-dr search passages --split dev --depth 1000 --output dev.trec
        mlflow-dr search passages --queries queries --shard 0/2 --output part0.trec
        mlflow-dr search --merge part0.trec part1.trec --dataset msmarco --output dev.trec
    """
    from mlflow_dr.vectors.found import hits_text
    from mlflow_dr.vectors.searching import search

    found = search(config)
    if found.hits:
        click.echo(hits_text(found))
        return
    for name, value in found.measures.items():
        click.echo(f"{name}\t{value:.4f}")
    if config.merge:
        click.echo(f"{found.queries} queries")
    else:
        click.echo(f"{found.queries} queries, {found.passages} passages")
    if config.output is not None:
        click.echo(f"wrote {config.output}")


@click.command("index", cls=TakesSeveral)
@takes(IndexConfig)
def index_command(config: IndexConfig) -> None:
    """Build a FAISS index of vectors, and measure what it loses against exact search.

    VECTORS is a folder that `encode` has written, or Parquet files of other programs. The index is
    pyserini's: the files `index` and `docid`. Kinds are `fast` (clusters, scanned with 4
    bits for two dimensions; the best are scored again in fp16), `small` (again in 8 bits), `exact`,
    and every factory string of FAISS. Similarity is the inner product.

    \b
    Example:
        mlflow-dr index passages --output passages.index
        mlflow-dr index passages --output small.index --factory small --queries queries
        mlflow-dr index passages --output hnsw.index --factory HNSW32 --recall 0.95
    """
    from mlflow_dr.vectors.indexing import index

    manifest = index(config)
    settings = "".join(f", {name} {value}" for name, value in manifest["settings"].items())
    click.echo(f"{manifest['factory']}{settings}, {manifest['passages']} passages")
    if manifest["queries"]:
        for k in (10, 100):
            click.echo(f"recall@{k}\t{manifest[f'recall_at_{k}']:.4f}")
        seconds, exact = manifest["seconds"], manifest["exact_seconds"]
        click.echo(
            f"{seconds * 1000:.3f} ms a query, {exact / seconds:.1f} times as fast as exact search "
            f"({exact * 1000:.3f} ms; {manifest['queries']} queries at once)"
        )
    click.echo(f"wrote {config.output}")


@click.command("convert", cls=TakesSeveral)
@takes(ConvertConfig)
def convert_command(config: ConvertConfig) -> None:
    """Write a ranking in another format.

    Read are TREC's six columns, and `query-id passage-id score`, as Tevatron writes it.

    \b
    Example:
        mlflow-dr convert --input rank.txt --output rank.trec
        mlflow-dr convert --input rank.txt --output rank.tsv --format msmarco
    """
    from mlflow_dr.vectors.searching import convert

    queries = convert(config)
    click.echo(f"{queries} queries")
    click.echo(f"wrote {config.output}")
