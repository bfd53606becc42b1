"""Rankings by ids, and the TREC run file."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError
from mlflow_dr.retrieval.ranking import (
    TREC,
    UNWRITABLE,
    NamedRanking,
    check_ranking_ids,
    n_excluded,
    without_excluded,
    write_ranking,
)

IDS = ["p0", "q1", "p2", "字3", "p4"]


@pytest.fixture
def corpus() -> Corpus:
    empty = [""] * len(IDS)
    return Corpus(pa.table([IDS, empty, empty], schema=SCHEMA))


QUERIES = [Query("q1", "is a passage, too"), Query("q2", "is not")]
ROWS = np.array([[1, 4, 0], [3, 1, 4]])
SCORES = np.array([[3.0, 2.0, 1.0], [0.5, 0.25, -0.5]], dtype=np.float32)


def left(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """What is ranked: without passages that have their query's id."""
    return without_excluded(QUERIES, corpus.ids, ROWS, SCORES)


def read_trec(path: Path) -> dict[str, list[tuple[str, float]]]:
    """As trec_eval reads it: its own order, by score and then by descending id; ranks ignored."""
    found: dict[str, list[tuple[str, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query_id, _, passage_id, _, score, _ = line.split(" ")
        found.setdefault(query_id, []).append((passage_id, float(np.float32(score))))
    return {
        q: sorted(each, key=lambda pair: (pair[1], pair[0].encode()), reverse=True)
        for q, each in found.items()
    }


def test_rows_become_ids_in_their_order(corpus: Corpus) -> None:
    ranking = NamedRanking(QUERIES, corpus.ids, ROWS, SCORES, depth=3)
    assert ranking == {
        "q1": [("q1", 3.0), ("p4", 2.0), ("p0", 1.0)],
        "q2": [("字3", 0.5), ("q1", 0.25), ("p4", -0.5)],
    }


def test_a_passage_with_a_querys_id_is_left_out_for_this_query_only(corpus: Corpus) -> None:
    ranking = NamedRanking(QUERIES, corpus.ids, *left(corpus), depth=3)
    assert [pid for pid, _ in ranking["q1"]] == ["p4", "p0"]
    assert [pid for pid, _ in ranking["q2"]] == ["字3", "q1", "p4"]


@pytest.mark.parametrize("depth", [1, 2])
def test_the_depth_is_reached_when_the_querys_own_id_is_left_out(
    corpus: Corpus, depth: int
) -> None:
    ranking = NamedRanking(QUERIES, corpus.ids, *left(corpus), depth)
    assert [pid for pid, _ in ranking["q1"]] == ["p4", "p0"][:depth]
    assert [pid for pid, _ in ranking["q2"]] == ["字3", "q1"][:depth]


def test_a_corpus_smaller_than_the_depth(corpus: Corpus) -> None:
    ranking = NamedRanking(QUERIES, corpus.ids, *left(corpus), depth=100)
    assert [len(found) for found in ranking.values()] == [2, 3]


def test_the_ranking_file_is_what_trec_eval_reads(corpus: Corpus, tmp_path: Path) -> None:
    ranking = NamedRanking(QUERIES, corpus.ids, *left(corpus), depth=2)
    write_ranking(tmp_path / "ranking.trec", [ranking], tag="mine")
    assert (tmp_path / "ranking.trec").read_text(encoding="utf-8") == (
        "q1 Q0 p4 1 2 mine\nq1 Q0 p0 2 1 mine\nq2 Q0 字3 1 0.5 mine\nq2 Q0 q1 2 0.25 mine\n"
    )


def test_reading_a_ranking_file_gives_the_same_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    # neighbours in fp32, and ties: what a rounding of the scores would swap
    scores = np.float32(0.7) + np.arange(200) // 2 * np.spacing(np.float32(0.7))
    scores = np.concatenate([scores, rng.standard_normal(200) * 1e-8]).astype(np.float32)
    ids = [f"p{n}" for n in rng.permutation(400)]
    found = sorted(
        zip(ids, scores.tolist(), strict=True), key=lambda pair: (pair[1], pair[0]), reverse=True
    )
    write_ranking(tmp_path / "ranking.trec", [{"q": found}])
    assert read_trec(tmp_path / "ranking.trec") == {"q": found}


@pytest.mark.parametrize(("query_id", "passage_id"), [("q 1", "p"), ("q", "p\t1"), ("q", "")])
def test_ids_that_the_format_cannot_hold(tmp_path: Path, query_id: str, passage_id: str) -> None:
    with pytest.raises(DataError, match="cannot hold white space"):
        write_ranking(
            tmp_path / "ranking.trec", [{"q0": [("p", 1.0)], query_id: [(passage_id, 1.0)]}]
        )
    assert list(tmp_path.iterdir()) == []


def test_white_space_is_what_splits_a_line() -> None:
    ids = [f"p{chr(code)}1" for code in [*range(0xD800), *range(0xE000, 0x10000)]]
    refused = pc.match_substring_regex(pa.array(ids), UNWRITABLE[TREC]).to_pylist()
    assert refused == [len(passage_id.split()) == 2 for passage_id in ids]
    check_ranking_ids(pa.array(["p1", "字3"]))


def test_own_ids_are_found_in_chunks_and_for_repeated_queries() -> None:
    ids = pa.chunked_array([["a", "b"], ["c", "7", "d"]])
    queries = [Query(name, "") for name in ("7", "x", "a", "7")]
    rows = np.array([[0, 3, 1], [0, 1, 2], [0, -1, -1], [3, 0, -1]])
    scores = np.array([[3.0, 2.0, 1.0]] * 4, np.float32)
    kept, values = without_excluded(queries, ids, rows, scores)
    assert kept.tolist() == [[0, 1, -1], [0, 1, 2], [-1, -1, -1], [0, -1, -1]]
    assert values[:2].tolist() == [[3, 1, 2], [3, 2, 1]]
    same, _ = without_excluded(queries[1:2], ids, rows[1:2], scores[1:2])
    assert same is not None and same.tolist() == [[0, 1, 2]]


def test_passages_that_a_query_excludes_are_not_in_its_ranking() -> None:
    ids = pa.chunked_array([["a", "b"], ["c", "7", "d"]])
    queries = [Query("7", "", excluded=["b", "unknown"]), Query("x", "", excluded=["d", "a"])]
    rows = np.array([[0, 3, 1, 2], [4, 0, 1, -1]])
    scores = np.array([[4.0, 3.0, 2.0, 1.0]] * 2, np.float32)
    assert n_excluded(queries, keep_own_id=False) == 3
    kept, _ = without_excluded(queries, ids, rows, scores)
    assert kept.tolist() == [[0, 2, -1, -1], [1, -1, -1, -1]]
    with_own, values = without_excluded(queries, ids, rows, scores, keep_own_id=True)
    assert with_own.tolist() == [[0, 3, 2, -1], [1, -1, -1, -1]]
    assert values[0].tolist() == [4, 3, 1, 2]
