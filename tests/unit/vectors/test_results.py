"""Searching for the answers of questions: results and measures are those of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.validation.evaluate import evaluate_encoder
from mlflow_dr.validation.evaluate_config import EvaluateConfig
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig
from mlflow_dr.vectors.encoding import encode
from mlflow_dr.vectors.judging import corpus_rows, ranking_rows
from mlflow_dr.vectors.searching import search

MEASURES = "accuracy@1 accuracy@5"


@pytest.fixture
def folder(tmp_path: Path, make_tiny: Callable[..., Encoder], texts: list[str]) -> Path:
    """30 passages, whose ids are also numbers of questions, and 10 questions; an encoder."""
    made = tmp_path / "sea"
    made.mkdir()
    rows = [f"{n}\t{texts[n % 10]} {n}\tSea" for n in range(30)]
    (made / "psgs.tsv").write_text("id\ttext\ttitle\n" + "\n".join(rows) + "\n")
    questions = [f"{text}?\t['{n}', 'none']" for n, text in enumerate(texts)]
    (made / "qas-dev.tsv").write_text("\n".join(questions) + "\n")
    (made / "qas-test.tsv").write_text("\n".join(questions[::-1]) + "\n")
    save_encoder(tmp_path / "encoder", make_tiny(pooling="mean"))
    return made


def encoded(folder: Path, output: str, **others: Any) -> Path:
    path = folder.parent / output
    values = {"dataset": str(folder), "device": "cpu", "dtype": "fp32", **others}
    encode(EncodeConfig(encoder=str(folder.parent / "encoder"), output=path, **values))
    return path


def searched(*sources: Path, **others: Any) -> dict[str, float]:
    found = search(SearchConfig(sources=sources, device="cpu", **others))
    return {str(name): value for name, value in found.measures.items()}


def test_results_have_texts_scores_and_answers(folder: Path) -> None:
    output = folder.parent / "results.json"
    values = {"device": "cpu", "dtype": "fp32", "measures": MEASURES, "depth": 5}
    encoder = str(folder.parent / "encoder")
    report = evaluate_encoder(EvaluateConfig(encoder=encoder, dataset=str(folder), **values))
    passages, queries = encoded(folder, "passages"), encoded(folder, "queries", split="dev")
    told = searched(passages, queries=queries, output=output, measures=MEASURES, depth=5)
    assert told == {str(name): value for name, value in report.measures.items()}
    results = json.loads(output.read_text())
    assert [result["question"][-1] for result in results] == ["?"] * 10
    assert results[3]["answers"] == ["3", "none"]
    for number, result in enumerate(results):
        assert list(result) == ["question", "answers", "ctxs"]
        ranked = report.ranking[str(number)]
        assert [(c["id"], np.float32(c["score"])) for c in result["ctxs"]] == [
            (name, np.float32(score)) for name, score in ranked
        ]
        for passage in result["ctxs"]:
            assert list(passage) == ["id", "title", "text", "score", "has_answer"]
            assert passage["title"] == "Sea"
            assert passage["has_answer"] == (str(number) in passage["text"].split())
    found = [any(c["has_answer"] for c in result["ctxs"][:5]) for result in results]
    assert told["accuracy@5"] == np.mean(found) > 0
    searched(passages, queries=queries, output=output, file_format="dpr", force=True)
    assert isinstance(json.loads(output.read_text())[0]["ctxs"][0]["score"], str)
    assert len(json.loads(output.read_text())[0]["ctxs"]) == 30


def test_merged_shards_have_the_accuracy_of_the_whole(folder: Path) -> None:
    passages = encoded(folder, "passages")
    parts = [folder.parent / f"part{shard}" for shard in range(2)]
    for shard, part in enumerate(parts):
        searched(passages, split="dev", output=part, shard=f"{shard}/2")
    output = folder.parent / "merged.json"
    told = searched(*parts, merge=True, dataset=str(folder), measures=MEASURES, output=output)
    whole = folder.parent / "whole.json"
    assert searched(passages, split="dev", measures=MEASURES, output=whole) == told
    assert output.read_bytes() == whole.read_bytes()


def test_vectors_of_other_questions_and_results_without_a_collection_are_refused(
    folder: Path,
) -> None:
    passages, queries = encoded(folder, "passages"), encoded(folder, "queries", split="dev")
    with pytest.raises(UsageError, match=r"vectors of other questions than .*/test"):
        searched(passages, queries=queries, split="test", dataset=str(folder), measures=MEASURES)
    with pytest.raises(UsageError, match="no judgements, so mrr@10 cannot be measured"):
        searched(passages, queries=queries, measures="mrr@10")
    ranking = folder.parent / "ranking"
    ranking.write_text("0 Q0 3 1 2.5 x\n")
    with pytest.raises(UsageError, match=r"results have the texts .* give --dataset"):
        searched(ranking, merge=True, output=folder.parent / "r.json")


def test_rows_of_vectors_in_another_order_are_those_of_the_corpus() -> None:
    corpus = Corpus(pa.table({"id": ["a", "b", "c"], "title": [""] * 3, "text": [""] * 3}))
    rows = np.array([[2, 0, -1], [1, -1, -1]])
    assert (corpus_rows(corpus, corpus.ids, rows) == rows).all()
    found = corpus_rows(corpus, pa.chunked_array([["c", "a", "b"]]), rows)
    assert found.tolist() == [[1, 2, -1], [0, -1, -1]]
    with pytest.raises(DataError, match="passage 'x' is not in the collection"):
        corpus_rows(corpus, pa.chunked_array([["c", "a", "x"]]), rows)
    assert ranking_rows(corpus, {"q": [("c", 1.0)], "r": []}).tolist() == [[2], [-1]]
    with pytest.raises(DataError, match="the ranking is of another one"):
        ranking_rows(corpus, {"q": [("x", 1.0)]})
