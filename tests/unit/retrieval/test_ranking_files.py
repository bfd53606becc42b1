"""Ranking files: whatever their order, one right answer or one clear error."""

import gzip
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError
from mlflow_dr.retrieval.ranking import read_ranking

QUERIES = [Query("q1", "one"), Query("q2", "two")]


@pytest.fixture
def corpus() -> Corpus:
    ids = [f"p{number}" for number in range(10)]
    return Corpus(pa.table({"id": ids, "title": [""] * 10, "text": ids}))


def trec(scores: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"{query} Q0 {passage} 1 {score} tag\n"
        for query, found in scores.items()
        for passage, score in found.items()
    ]


SCORES = {"q1": {f"p{n}": float(n % 7) for n in range(10)}, "q2": {"p3": -2.0, "p4": -1.0}}


def top_passages(path: Path, k: int, corpus: Corpus) -> list[list[int]]:
    return [rows.tolist() for rows in read_ranking(path, k, QUERIES, corpus)]


@pytest.mark.parametrize("packed", [False, True])
def test_passages_are_ordered_by_score_and_not_by_line(
    tmp_path: Path, corpus: Corpus, packed: bool
) -> None:
    """Shuffled and interleaved; equal scores by descending id, as trec_eval has them."""
    lines = trec(SCORES)
    random.Random(1).shuffle(lines)
    data = "".join(lines).encode()
    path = tmp_path / ("run.gz" if packed else "run.trec")
    path.write_bytes(gzip.compress(data) if packed else data)
    assert top_passages(path, 3, corpus) == [[6, 5, 4], [4, 3]]
    assert top_passages(path, 100, corpus) == [[6, 5, 4, 3, 9, 2, 8, 1, 7, 0], [4, 3]]


def test_only_the_best_lines_of_a_query_are_kept(tmp_path: Path, corpus: Corpus) -> None:
    lines = [f"q1 Q0 x{number} 1 {number % 1000 / 1000} t\n" for number in range(20_000)]
    random.Random(2).shuffle(lines)
    path = tmp_path / "run.trec"
    path.write_text("".join([*lines, "q1 Q0 p1 1 7 t\n", "q1 Q0 p2 1 8 t\n", "q2 Q0 p0 1 1 t\n"]))
    assert top_passages(path, 2, corpus) == [[2, 1], [0]]


def test_ms_marcos_ranks_and_lines_with_scores(tmp_path: Path, corpus: Corpus) -> None:
    ranks, scores = tmp_path / "ranks.tsv", tmp_path / "scores.tsv"
    ranks.write_text("q1\tp5\t2\nq2\tp1\t1\nq1\tp7\t1\nq1\tp2\t10\n")
    scores.write_text("q1\tp5\t2.5\nq2\tp1\t1\nq1\tp7\t1e1\nq1\tp2\t10.5\n")
    assert top_passages(ranks, 2, corpus) == [[7, 5], [1]]
    assert top_passages(scores, 2, corpus) == [[2, 7], [1]]


def test_unknown_ids_and_a_query_without_a_line(
    tmp_path: Path, corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 nobody 1 9 t\nq1 Q0 p1 2 8 t\nstranger Q0 p2 1 9 t\n")
    assert top_passages(path, 5, corpus) == [[1], []]
    (message,) = caplog.messages
    assert "1 passages that the corpus lacks; 1 of 2 queries have no line" in message
    assert "'q2'" in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "run.trec: the file has no line"),
        ("\n\n", "run.trec: the file has no line"),
        ("stranger Q0 p1 1 9 t\n", "no line names a query of the collection"),
        ("q1 Q0 nobody 1 9 t\n", "no line names a passage of the collection"),
        ("q1 Q0 p1 1 9 t\nq1 Q0 p2 2 t\n", "run.trec:2: 5 columns; expected"),
        ("q1 p1\n", "run.trec:1: 2 columns; expected"),
        ("q1 Q0 p1 1 high t\n", "run.trec:1: 'high' is not a score"),
        ("q1 Q0 p1 1 nan t\n", "run.trec:1: 'nan' is not a score"),
        ("q1 Q0 p1 1 1e999 t\n", "run.trec:1: '1e999' is not a score"),
        (f"q1 p1 {'9' * 5000}\n", "run.trec:1: '9+... is not a rank"),
        (f"q1 p1 {'9' * 500}\n", "run.trec:1: '9+... is not a rank"),
        ("q1\tp1\t1\nq1\t\t2\n", "run.trec:2: an id is empty"),
        ("q1 Q0 p1\x00 1 9 t\n", "run.trec:1: id .* has a NUL character"),
        ("q1 p1 12\nq1 p2 9\n", "run.trec: no query has a passage of rank 0 or 1"),
        ("q1 p1 1\nq1 p2 0.5\n", "run.trec:2: '0.5' is not a rank"),
        ("q1 p1 1\nq1 p2 1_0\n", "run.trec:2: '1_0' is not a rank"),
        ("q1 p1 1\nq1 p2 \u0662\n", "run.trec:2: '\u0662' is not a rank"),
        ("q1 Q0 p1 1 1_0.5 t\n", "run.trec:1: '1_0.5' is not a score"),
        ("q1 Q0 p1 1 9 t\nq2 p1 1\n", "run.trec:2: 3 columns"),
    ],
)
def test_a_malformed_file_is_one_clear_error(
    tmp_path: Path, corpus: Corpus, text: str, reason: str
) -> None:
    path = tmp_path / "run.trec"
    path.write_text(text)
    with pytest.raises(DataError, match=reason):
        read_ranking(path, 5, QUERIES, corpus)


@pytest.mark.parametrize(
    "line",
    ["{q}\tQ0\t{p}\t1\t9\tt\n", "{q}\t{p}\t1\n", " {q} \t {p} \t 9.5 \n"],
    ids=["TREC", "ranks", "scores"],
)
def test_ids_with_blanks_between_tabs(tmp_path: Path, line: str) -> None:
    passage = "the p\u00a0one"
    table = pa.table({"id": ["other", passage], "title": ["", ""], "text": ["", ""]})
    path = tmp_path / "run.tsv"
    path.write_text(line.format(q="a q", p=passage), encoding="utf-8")
    (rows,) = read_ranking(path, 5, [Query("a q", "text")], Corpus(table))
    assert rows.tolist() == [1]


def test_a_blank_that_ascii_lacks_is_part_of_an_id(tmp_path: Path) -> None:
    """As in trec_eval."""
    table = pa.table({"id": ["p\u00a01", "p\u30001"], "title": ["", ""], "text": ["", ""]})
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 p\u30001 1 9 t\nq1  Q0 p\u00a01 2 8 t\n", encoding="utf-8")
    assert top_passages(path, 5, Corpus(table))[0] == [1, 0]


def test_no_such_file(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_ranking(tmp_path / "run.trec", 5, QUERIES, corpus)


def test_rows_are_int64(tmp_path: Path, corpus: Corpus) -> None:
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 p1 1 9 t\n")
    assert {rows.dtype for rows in read_ranking(path, 5, QUERIES, corpus)} == {np.dtype(np.int64)}
