"""`mlflow-dr evaluate` with a published model, against sentence-transformers and trec_eval."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

DEPTH = 100
PASSAGES = 150
Ranked = dict[str, list[tuple[str, float]]]


class Evaluated(NamedTuple):
    report: dict
    ranking: Ranked
    qrels: dict[str, dict[str, int]]
    printed: str


@pytest.fixture(scope="module")
def part(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first passages of the collection, with their queries."""
    folder = tmp_path_factory.mktemp("part")
    (folder / "qrels").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        lines = (collection / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:PASSAGES]))
    head, *rows = (collection / "qrels" / "dev.tsv").read_text().splitlines(keepends=True)
    numbers = {row: int(row.split("\t")[1].removeprefix("p")) for row in rows}
    kept = [row for row in rows if numbers[row] < PASSAGES]
    (folder / "qrels" / "dev.tsv").write_text("".join([head, *kept]))
    return folder


@pytest.fixture(scope="module")
def evaluated(
    call: Callable[..., subprocess.CompletedProcess],
    minilm: Path,
    part: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Evaluated:
    directory = tmp_path_factory.mktemp("evaluate")
    argv = ["mlflow-dr", "evaluate", minilm, "--dataset", part, "--dtype", "fp32"]
    argv += ["--device", "cpu", "--output", directory / "r.json", "--ranking", directory / "f.trec"]
    done = call(*argv)
    assert done.returncode == 0, done.stderr
    report = json.loads((directory / "r.json").read_text())
    return Evaluated(report, _ranking(directory / "f.trec"), _qrels(part), done.stdout)


def _ranking(path: Path) -> Ranked:
    ranking: Ranked = {}
    for line in path.read_text().splitlines():
        query, q0, passage, rank, score, _ = line.split()
        found = ranking.setdefault(query, [])
        found.append((passage, float(score)))
        assert (q0, int(rank)) == ("Q0", len(found))
    return ranking


def _qrels(collection: Path) -> dict[str, dict[str, int]]:
    rows = (collection / "qrels" / "dev.tsv").read_text().splitlines()[1:]
    return {q: {p: int(rel)} for q, p, rel in (row.split("\t") for row in rows)}


def _texts(collection: Path, file: str) -> dict[str, str]:
    records = map(json.loads, (collection / file).read_text().splitlines())
    return {
        record["_id"]: f"{record.get('title', '')} {record['text']}".strip() for record in records
    }


def test_the_report_says_what_was_measured_on_what(
    evaluated: Evaluated, minilm: Path, part: Path
) -> None:
    report = evaluated.report
    assert report["encoder"] == str(minilm)
    assert report["dataset"] == str(part)
    assert (report["split"], report["depth"], report["dtype"]) == ("dev", DEPTH, "fp32")
    assert report["passages"] == PASSAGES
    assert report["seconds"] > 0
    assert list(report["measures"]) == ["mrr@10", "ndcg@10", "recall@100"]
    assert report["queries"].keys() == evaluated.qrels.keys()
    for name, mean in report["measures"].items():
        values = [query[name] for query in report["queries"].values()]
        assert mean == pytest.approx(sum(values) / len(values), abs=1e-12)
        assert f"{name}\t{mean:.4f}\n" in evaluated.printed


def test_measures_are_trec_evals_on_the_written_ranking(evaluated: Evaluated) -> None:
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(evaluated.qrels, {"ndcg_cut.10", "recall.100"})
    expected = evaluator.evaluate({q: dict(found) for q, found in evaluated.ranking.items()})
    # trec_eval's recip_rank has no cut-off: the ranking is cut to 10 first
    first_ten = {q: dict(found[:10]) for q, found in evaluated.ranking.items()}
    reciprocal = pytrec_eval.RelevanceEvaluator(evaluated.qrels, {"recip_rank"}).evaluate(first_ten)
    for query, values in evaluated.report["queries"].items():
        assert values["ndcg@10"] == pytest.approx(expected[query]["ndcg_cut_10"], abs=1e-6)
        assert values["recall@100"] == pytest.approx(expected[query]["recall_100"], abs=1e-6)
        assert values["mrr@10"] == pytest.approx(reciprocal[query]["recip_rank"], abs=1e-6)


@pytest.fixture(scope="module")
def theirs(
    minilm: Path, part: Path, evaluated: Evaluated
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """sentence-transformers' vectors of all passages and of the queries of dev, by id."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu").to(torch.float32)
    passages, queries = _texts(part, "corpus.jsonl"), _texts(part, "queries.jsonl")
    queries = {query: queries[query] for query in evaluated.qrels}
    return (
        dict(zip(passages, model.encode(list(passages.values())), strict=True)),
        dict(zip(queries, model.encode(list(queries.values())), strict=True)),
    )


def test_the_ranking_is_sentence_transformers_brute_force(
    evaluated: Evaluated, theirs: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> None:
    passages, queries = theirs
    ids, matrix = list(passages), np.stack(list(passages.values()))
    for query, found in evaluated.ranking.items():
        row = matrix @ queries[query]
        by_id = dict(zip(ids, row, strict=True))
        scores = [score for _, score in found]
        np.testing.assert_allclose(scores, np.sort(row)[::-1][:DEPTH], atol=1e-5)
        np.testing.assert_allclose(scores, [by_id[passage] for passage, _ in found], atol=1e-5)
        order = np.argsort(-row)[: DEPTH + 1]
        if (row[order[:-1]] - row[order[1:]] > 1e-5).all():  # rounding decides nothing
            assert [passage for passage, _ in found] == [ids[row] for row in order[:-1]]


def test_vectors_are_sentence_transformers(
    minilm: Path, part: Path, theirs: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
) -> None:
    from mlflow_dr.collection.records import Passage
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.tokenize import TextTokenizer
    from mlflow_dr.retrieval.encode import encode_all
    from mlflow_dr.stores.token_table import token_table

    records = [json.loads(x) for x in (part / "corpus.jsonl").read_text().splitlines()[:60]]
    passages = [Passage(record["_id"], record["title"], record["text"]) for record in records]
    encoder = load_encoder(minilm)
    text_tokenizer = TextTokenizer.of(encoder)
    table = token_table(text_tokenizer.passage_ids(passages))
    assert table.lengths.max() == encoder.settings.passage_max_length  # some are truncated
    ours = encode_all(encoder, table, text_tokenizer.pad_id)
    expected = np.stack([theirs[0][passage.id] for passage in passages])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)
