"""Training examples as sentence-transformers has them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.collection.catalogue import Examples, open_collection, open_examples
from mlflow_dr.errors import DataError, UsageError

if TYPE_CHECKING:
    from hub_endpoint import HubEndpoint

Rows = Sequence[Mapping[str, Any]]


def contents(examples: Examples) -> list[tuple[str, list[str], list[str], list[float] | None]]:
    """Query, positives, negatives and scores of each example."""
    found = []
    for index in range(len(examples)):
        query, positives, negatives, scores = examples[index]
        sides = (examples.passages.passages(rows) for rows in (positives, negatives))
        positive_texts, negative_texts = ([passage.text for passage in side] for side in sides)
        found.append(
            (
                query.text,
                positive_texts,
                negative_texts,
                None if scores is None else scores.tolist(),
            )
        )
    return found


def read(path: Path, rows: Rows) -> list[Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return contents(open_examples(path))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"anchor": "q", "positive": "p"}], [("q", ["p"], [], None)]),
        ([{"query": "q", "answer": "p", "id": 3}], [("q", ["p"], [], None)]),
        (
            [{"anchor": "q", "positive": "p", "negative": "n"}] * 2,
            [("q", ["p"], ["n"], None)] * 2,
        ),
        (
            [{"query": "q", "positive": "p", "negative_1": "a", "negative_2": "b"}],
            [("q", ["p"], ["a", "b"], None)],
        ),
        (
            [{"anchor": "q", "positive": "p", "negatives": ["a", "b"], "label": [3, 2, 0.5]}],
            [("q", ["p"], ["a", "b"], [3, 2, 0.5])],
        ),
        (
            [{"query": "q", "positive": "p", "negative": "n", "score": 2.5}],
            [("q", ["p"], ["n"], [2.5, 0])],
        ),
        (
            [{"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [2], "neg_scores": [1]}],
            [("q", ["p"], ["n"], [2, 1])],
        ),
        (
            [
                {"query": "q", "passage": "a", "score": 0.1},
                {"query": "q", "passage": "b", "score": 0.9},
                {"query": "r", "passage": "c", "score": 0.3},
            ],
            [
                ("q", ["b"], ["a"], [pytest.approx(0.9), pytest.approx(0.1)]),
                ("r", ["c"], [], [0.3]),
            ],
        ),
        (
            [
                {"query": "q", "passage": text, "label": label}
                for text, label in (("a", 0), ("b", 1), ("c", 1))
            ],
            [("q", ["b", "c"], ["a"], None)],
        ),
    ],
)
def test_columns_say_what_they_are(tmp_path: Path, rows: Rows, expected: list[Any]) -> None:
    found = read(tmp_path / "train.jsonl", rows)
    for (query, positives, negatives, scores), wanted in zip(found, expected, strict=True):
        assert (query, positives, negatives) == wanted[:3]
        assert scores == (wanted[3] and pytest.approx(wanted[3]))


def test_formats_are_read_alike(tmp_path: Path) -> None:
    rows = [
        {"anchor": "a, b", "positive": 'with "quotes"', "negative": "two\nlines"},
        {"anchor": "c", "positive": "d", "negative": "é"},
    ]
    expected = read(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    text = 'anchor,positive,negative\r\n"a, b","with ""quotes""","two\nlines"\r\nc,d,é\r\n'
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("b.parquet", "c.csv", "d.csv.gz"):
        assert contents(open_examples(tmp_path / name)) == expected
    scored = tmp_path / "e.csv"
    scored.write_text("query,passage,score\nq,a,0\nq,b,1\n")
    assert contents(open_examples(scored)) == [("q", ["b"], ["a"], None)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": 3, "positive": "p"}, r"train.jsonl:1: anchor or .* is 3; expected the text"),
        ({"anchor": "q", "positive": {"a": 1}}, r"the positive is .*; expected a text, or several"),
        ({"anchor": "q", "positive": "p", "negative": [1]}, r"negative is .*; expected a text"),
        ({"query": "q", "passage": "p", "score": "high"}, "score is 'high'; expected numbers"),
        ({"query": "q", "passage": "p", "score": 1e39}, "expected finite numbers"),
        ({"query": "q", "pos": ["p"], "neg": ["n"], "scores": [1, 2, 3]}, "3 scores for 2 pass"),
        ({"premise": "q", "hypothesis": "p"}, r"pairs of sentence-transformers \(anchor or query"),
        ({"anchor": "q", "positive": None}, "1 records without a usable positive passage"),
    ],
)
def test_malformed_rows(tmp_path: Path, row: Mapping[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / "train.jsonl", [row])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anchor,positive\nq\n", r"c.csv\[0\]: the row has more or fewer cells than the header"),
        ("anchor,positive\nq,p\nq,p,n\n", r"c.csv\[1\]: the row has more or fewer cells"),
        ('anchor,positive\nq,"p\n', r"c.csv\[0\]: not CSV \(unexpected end of data\)"),
        ("anchor,positive\n", "no records"),
        (b"anchor,positive\nq,\xff\n", r"c.csv\[0\]: not CSV \('utf-8'"),
    ],
)
def test_malformed_tables(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "c.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        open_examples(tmp_path / "c.csv")


def test_names_of_the_hub_have_configurations(hub_endpoint: HubEndpoint) -> None:
    pair = [{"anchor": "q", "positive": "p"}]
    triplet = [{"anchor": "q", "positive": "p", "negative": "n"}]
    end = "-00000-of-00001.parquet"
    hub_endpoint.put("sentence-transformers/qa", {"pair/train" + end: pair, "README.md": ""})
    collection = open_collection("sentence-transformers/qa")
    assert (collection.splits, contents(collection.examples())) == ([], [("q", ["p"], [], None)])
    files = {"pair/train" + end: pair, "triplet/train" + end: triplet, "triplet/dev" + end: pair}
    hub_endpoint.put("sentence-transformers/nli", files)
    collection = open_collection("sentence-transformers/nli/triplet@main")
    assert contents(collection.examples()) == [("q", ["p"], ["n"], None)]
    assert not collection.splits
    with pytest.raises(
        UsageError, match=r"has several; name one .*nli/pair; it has: pair, triplet"
    ):
        open_collection("sentence-transformers/nli").examples()
    hub_endpoint.put("a/table", {"train.csv": b"query,answer\nq,p\n"})
    assert contents(open_collection("a/table").examples()) == [("q", ["p"], [], None)]
