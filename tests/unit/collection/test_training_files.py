"""Training files in every layout: what is read of them, and what bad ones are answered with."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.collection.catalogue import Examples, chosen_split, open_collection, open_examples
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import CachedExamples
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.collection.training_files import TrainingFiles, corpus_of_file
from mlflow_dr.errors import DataError, UsageError

Row = dict[str, Any]

NO_PASSAGES = {name: pa.array([], pa.string()) for name in ("id", "title", "text")}
LINER = {"docid": "p1", "title": "Ships", "text": "a liner"}
TUG = {"docid": "p2", "title": "", "text": "a tug"}
BARGE = {"docid": "p3", "title": None, "text": "a barge"}

TEVATRON: Row = {
    "query_id": "q1",
    "query": "which ship",
    "positive_passages": [LINER],
    "negative_passages": [TUG, BARGE],
}
BY_ID: Row = {
    "query_id": "q1",
    "query_text": "which ship",
    "query_image": None,
    "positive_document_ids": ["p1"],
    "negative_document_ids": ["p2", "p3"],
    "answer": None,
    "source": "ours",
}
TOKENISED: Row = {"query": [7, 8], "positives": [[1, 2]], "negatives": [[3], [4, 5]]}
DPR: Row = {
    "dataset": "ships",
    "question": "which ship",
    "answers": ["liner", "a liner"],
    "positive_ctxs": [
        {"title": "Ships", "text": "a liner", "score": 1000, "title_score": 1, "passage_id": "p1"}
    ],
    "negative_ctxs": [{"title": "", "text": "a bus", "score": 0, "psg_id": 9}],
    "hard_negative_ctxs": [
        {"title": "", "text": "a tug", "score": 3.5, "psg_id": "p2"},
        {"title": None, "text": "a barge", "score": 3.1, "passage_id": 3},
    ],
}
CORPUS = [Passage("p3", "", "a barge"), Passage("p1", "Ships", "a liner"), Passage("p2", "", "tug")]


def lines(*rows: Row) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a file: bytes as they are, rows as its name says."""

    def write(name: str, *rows: Row | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b"".join(row if isinstance(row, bytes) else lines(row) for row in rows)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        elif name.endswith(".array.json"):
            path.write_text(json.dumps(rows, indent=2))
        else:
            path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture
def ships() -> Corpus:
    return cached_corpus("ships", CORPUS)


def shown(examples: Examples, index: int = 0) -> tuple[Query, list[Passage], list[Passage]]:
    query, positives, negatives, _ = examples[index]
    passages = examples.passages.passages
    return query, passages(positives), passages(negatives)


def ids(examples: Examples, rows: np.ndarray) -> list[str]:
    return [passage.id for passage in examples.passages.passages(rows)]


def query_ids(examples: Examples) -> list[str]:
    return [examples[index].query.id for index in range(len(examples))]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    return record.getMessage()


# Tevatron, with passages


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.array.json"]
)
def test_tevatron_rows_in_every_kind_of_file(write: Callable[..., Path], name: str) -> None:
    row = dict(TEVATRON, answers=["x", "y"])
    examples = open_examples(write(name, row, dict(row, query_id="q2")))
    assert query_ids(examples) == ["q1", "q2"]
    assert shown(examples) == (
        Query("q1", "which ship", ("x", "y")),
        [Passage("p1", "Ships", "a liner")],
        [Passage("p2", "", "a tug"), Passage("p3", "", "a barge")],
    )
    assert len(examples.passages) == 3
    assert examples[0].scores is None


def test_optional_fields_of_tevatron_rows(write: Callable[..., Path]) -> None:
    bare = {"query": "which ship", "positive_passages": [{"text": "a liner"}]}
    numbered = dict(TEVATRON, query_id=12, positive_passages=[dict(LINER, docid=7)])
    examples = open_examples(write("a.jsonl", bare, numbered, dict(bare, negative_passages=None)))
    assert query_ids(examples) == ["0", "12", "2"]
    assert examples.passages[0].text == "a liner"
    assert ids(examples, examples[1].positives) == ["7"]
    assert examples[0].negatives.tolist() == []
    assert examples[2].positives.tolist() == examples[0].positives.tolist()


def test_scores_in_tevatron_passages_are_the_teachers(write: Callable[..., Path]) -> None:
    scored = dict(
        TEVATRON,
        positive_passages=[dict(LINER, score=9.5)],
        negative_passages=[dict(TUG, score=1), dict(BARGE, score=-2.5)],
    )
    examples = open_examples(write("a.jsonl", scored, TEVATRON))
    assert examples[0].scores is not None
    assert examples[0].scores.tolist() == [9.5, 1, -2.5]
    assert examples[1].scores is None


def test_unusable_records_are_counted_in_one_warning(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    unusable = [dict(TEVATRON, query=" "), dict(TEVATRON, positive_passages=[])]
    examples = open_examples(write("a.jsonl", TEVATRON, *unusable, dict(TEVATRON, query=None)))
    assert len(examples) == 1
    assert "a.jsonl:2" in warning(caplog)
    assert "2 records without a query" in warning(caplog)
    assert "1 records without a usable positive passage" in warning(caplog)
    assert "a.jsonl:3" in warning(caplog)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{not json\n", r":2: not JSON"),
        (b'["q"]\n', r":2: expected 'object', got 'array'"),
        (b'{"query": "\xe9"}\n', r":2: not JSON .*utf-8"),
        ({"query_id": "q"}, r":2: no 'positive_passages'; it has query_id"),
        (dict(TEVATRON, query_id=1.5), r":2: query_id: expected 'int \| str \| null', got 'float'"),
        (dict(TEVATRON, query=["q"]), r":2: query: expected 'str \| null', got 'array'"),
        (dict(TEVATRON, answers=[1]), r":2: answers\[0\]: expected 'str', got 'int'"),
        (dict(TEVATRON, answers={"a": 1}), r":2: answers: expected .* got 'object'"),
        (dict(TEVATRON, positive_passages={}), r":2: positive_passages: expected .* got 'object'"),
        (
            dict(TEVATRON, negative_passages=["p"]),
            r":2: negative_passages\[0\]: expected 'object', got 'str'",
        ),
        (
            dict(TEVATRON, negative_passages=[TUG, {"docid": "p"}]),
            r":2: negative_passages\[1\]: no 'text'",
        ),
        (
            dict(TEVATRON, positive_passages=[dict(LINER, title=1)]),
            r":2: positive_passages\[0\]\.title: expected 'str \| null', got 'int'",
        ),
        (
            dict(TEVATRON, positive_passages=[dict(LINER, docid=["p"])]),
            r":2: positive_passages\[0\]\.docid: expected .* got 'array'",
        ),
        (
            dict(TEVATRON, positive_passages=[dict(LINER, score="high")]),
            r":2: positive_passages\[0\]\.score: expected 'float \| null', got 'str'",
        ),
        (
            dict(TEVATRON, positive_passages=[dict(LINER, score=True)]),
            r":2: positive_passages\[0\]\.score: expected 'float \| null', got 'bool'",
        ),
    ],
)
def test_a_malformed_tevatron_row_is_named_by_its_line(
    write: Callable[..., Path], row: Row | bytes, message: str
) -> None:
    path = write("a.jsonl", TEVATRON, row)
    with pytest.raises(DataError, match=r"a\.jsonl" + message):
        open_examples(path)


def test_an_infinite_score_is_an_error(write: Callable[..., Path]) -> None:
    scored = dict(TEVATRON, positive_passages=[dict(LINER, score=float("inf"))])
    with pytest.raises(DataError, match=r"\[1\]: .*score: expected 'float' <= 3\.4e\+38"):
        open_examples(write("a.array.json", TEVATRON, scored))


def test_a_malformed_row_of_parquet_is_named_by_its_index(write: Callable[..., Path]) -> None:
    path = write("a.parquet", TEVATRON, dict(TEVATRON, negative_passages=[dict(TUG, text=None)]))
    with pytest.raises(
        DataError,
        match=r"a\.parquet\[1\]: negative_passages\[0\]\.text: expected 'str', got 'null'",
    ):
        open_examples(path)


# Tevatron, by id


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("corpus.jsonl", [{"_id": p.id, "title": p.title, "text": p.text} for p in CORPUS]),
        ("corpus.jsonl.gz", [{"docid": p.id, "text": p.text, "image": None} for p in CORPUS]),
        ("corpus.jsonl", [{"document_id": p.id, "document_text": p.text} for p in CORPUS]),
        ("psgs_w100.tsv", [b'id\ttext\ttitle\np3\ta\tb\np1\t"a ""liner"""\tc\np2\ta\tb\n']),
    ],
)
def test_ids_are_looked_up_in_the_passages_next_to_the_file(
    write: Callable[..., Path], ships: Corpus, name: str, content: list[Row | bytes]
) -> None:
    write(name, *content)
    path = write("mined.jsonl", BY_ID)
    for source in (path, path.parent):
        examples = open_examples(source, lambda: pytest.fail("the corpus beside comes first"))
        assert (examples[0].positives.tolist(), examples[0].negatives.tolist()) == ([1], [2, 0])
        assert examples[0].query == Query("q1", "which ship")
        assert examples.passages.ids.to_pylist() == ["p3", "p1", "p2"]
    if name.endswith("tsv"):
        assert examples.passages[1] == Passage("p1", "c", 'a "liner"')


def test_ids_are_looked_up_in_the_given_corpus_without_passages_next_to_the_file(
    write: Callable[..., Path], ships: Corpus
) -> None:
    path = write("mined.jsonl", dict(BY_ID, query="ignored", answers="liner"))
    examples = open_examples(path, lambda: ships)
    assert examples.passages is ships
    assert examples[0].query.answers == ("liner",)
    older = dict(BY_ID, query_text=None, query="which ship", answer="liner")
    again = open_examples(write("older.jsonl", older), lambda: ships)
    assert again[0].query == examples[0].query
    assert again.digest == examples.digest


def test_ids_without_a_corpus_are_an_error_that_says_where_it_belongs(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    path = write("mined.jsonl", BY_ID)
    with pytest.raises(DataError, match=rf"name passages by id, and {tmp_path} has no corpus\.js"):
        open_examples(path)


def test_two_tables_of_passages_next_to_the_file_are_an_error(write: Callable[..., Path]) -> None:
    write("psgs_a.tsv", b"")
    write("psgs_b.tsv", b"")
    with pytest.raises(
        DataError, match=r"several tables of passages, psgs_a\.tsv, psgs_b\.tsv; leave only"
    ):
        open_examples(write("mined.jsonl", BY_ID))


def test_scores_by_id_stay_with_their_passages(write: Callable[..., Path], ships: Corpus) -> None:
    row = dict(BY_ID, negative_document_ids=["gone", "p3"])
    row |= {"positive_scores": [4], "negative_scores": [0.5, -1]}
    example = open_examples(write("mined.jsonl", row), lambda: ships)[0]
    assert example.scores is not None
    assert example.scores.tolist() == [4, -1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(BY_ID, positive_scores=[1, 2]), "2 positive_scores for 1 passages; give one"),
        (
            dict(BY_ID, negative_scores=["a", 1]),
            r"negative_scores\[0\]: expected 'float \| null', got 'str'",
        ),
        (dict(BY_ID, positive_document_ids="p1"), "positive_document_ids: expected .* got 'str'"),
        (
            dict(BY_ID, negative_document_ids=["p1", None]),
            r"negative_document_ids\[1\]: expected 'int \| str', got 'null'",
        ),
    ],
)
def test_a_malformed_row_by_id_is_named_by_its_line(
    write: Callable[..., Path], ships: Corpus, row: Row, message: str
) -> None:
    with pytest.raises(DataError, match=rf"mined\.jsonl:2: .*{message}"):
        open_examples(write("mined.jsonl", BY_ID, row), lambda: ships)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"p1\tone column less\n", r":2: 2 columns, the first of them 'p1'; expected id, text, t"),
        (b"\ttext\ttitle\n", r":2: 3 columns, the first of them ''"),
        (b"p1\ta\tb\np1\tc\td\n", r":3: passage id 'p1' is used twice; .*psgs\.tsv:2$"),
        (b"p1\t\xe9\tb\n", r":\d: cannot be read \(invalid"),
        (b"", "the corpus has no passages"),
    ],
)
def test_malformed_tables_of_passages(
    write: Callable[..., Path], content: bytes, message: str
) -> None:
    write("psgs.tsv", b"id\ttext\ttitle\n" + content)
    with pytest.raises(DataError, match=rf"psgs\.tsv.*{message}"):
        open_examples(write("mined.jsonl", BY_ID))


@pytest.mark.parametrize("name", ["psgs.tsv", "psgs.tsv.gz"])
def test_a_line_of_a_table_ends_where_a_files_line_ends(
    write: Callable[..., Path], name: str
) -> None:
    """And not at whatever else Unicode calls the end of a line."""
    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    table = f'id\ttext\ttitle\r\np1\t{odd}\t{odd}\r\np2\t"{odd}\n\r\n""j"""\tt\n'
    passages = corpus_of_file(write(name, table.encode("utf-8-sig")))
    assert [*passages.batches()] == [
        [Passage("p1", odd, odd), Passage("p2", "t", f'{odd}\n\r\n"j"')]
    ]


def test_an_open_quotation_mark_is_named(
    write: Callable[..., Path],
) -> None:
    rows = [
        "id\ttext\ttitle",
        "1\tRye grows slowly\tRye",
        '2\t"Alpha begins the tale\tMills',
        "3\tBarley is sown in spring\tBarley",
        '4\tThe ferry crosses at noon" she said\tFerries',
    ]
    path = write("psgs.tsv", "\n".join(rows).encode())
    with pytest.raises(DataError, match=r"psgs\.tsv:3: a quotation mark is not closed .* line 5"):
        corpus_of_file(path)


def test_a_quotation_mark_in_the_names_of_the_columns(write: Callable[..., Path]) -> None:
    path = write("psgs.tsv", b'id\t"text\ttitle\n1\tRye" grows\tRye\n2\tOats\tOats\n')
    with pytest.raises(DataError, match=r"psgs\.tsv:1: a quotation mark is not closed .* line 2"):
        corpus_of_file(path)


def test_a_table_is_read_as_dpr_reads_it(write: Callable[..., Path]) -> None:
    """By Python's csv with tabs: quoted line ends, doubled quotes; lines of names are left out."""
    table = (
        'id\ttext\ttitle\n1\t"a ""b""\nc"\t"t\tu"\n2\tsaid "he"\t\nid\ttext\ttitle\n\n3\t"x" y\tz\n'
    )
    rows = [row for row in csv.reader(io.StringIO(table), delimiter="\t") if row]
    expected = [Passage(row[0], row[2], row[1]) for row in rows if row[0] != "id"]
    (passages,) = corpus_of_file(write("psgs.tsv", table.encode())).batches()
    assert passages == expected
    assert len(passages) == 3


@pytest.mark.parametrize("character", ["\x00", " "])
def test_an_id_that_judgements_cannot_name(write: Callable[..., Path], character: str) -> None:
    path = write("psgs.tsv", f"id\ttext\ttitle\np1{character}\ta\tb\n".encode())
    with pytest.raises(DataError, match=r"psgs\.tsv:2: id 'p1.* has "):
        corpus_of_file(path)
    path.unlink()
    rows = dict(BY_ID, negative_document_ids=["p2", f"p1{character}"])
    with pytest.raises(DataError, match=r"mined\.jsonl:1: negative_document_ids\[1\]: id 'p1"):
        open_examples(write("mined.jsonl", rows), lambda: Corpus(pa.table(NO_PASSAGES)))


def test_an_endless_passage_is_refused(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.collection.dpr.LONGEST_LINE", 1000)
    path = write("psgs.tsv", b'1\t"' + b"x" * 80 + b"\n" * 2000)
    with pytest.raises(DataError, match=r"psgs\.tsv:1: cannot be read \(field larger"):
        corpus_of_file(path)


# Folders that are not complete


def test_a_broken_link_among_training_files(write: Callable[..., Path]) -> None:
    path = write("train-1.jsonl", TEVATRON)
    (path.parent / "train-2.jsonl").symlink_to("gone.jsonl")
    (path.parent / "dev.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"train-2\.jsonl: a link to gone\.jsonl, which does not"):
        open_examples(path.parent)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"], "train-00001-of-00003"),
        (["train-1-of-3.jsonl", "train-3-of-3.jsonl"], "train-2-of-3"),
        (["train.00001-of-00002.jsonl"], "train.00000-of-00002"),
    ],
)
def test_a_missing_file_of_a_numbered_series_is_named(
    write: Callable[..., Path], names: list[str], missing: str
) -> None:
    for name in names:
        folder = write(name, TEVATRON).parent
    with pytest.raises(
        DataError, match=rf"{missing}\.jsonl is missing; there are {len(names)} of \d"
    ):
        open_examples(folder)


@pytest.mark.parametrize("first", [0, 1])
def test_a_complete_numbered_series_is_read(write: Callable[..., Path], first: int) -> None:
    for number in (first, first + 1):
        folder = write(f"train-0000{number}-of-00002.jsonl", TEVATRON).parent
    assert len(open_examples(folder)) == 2


def test_an_unfinished_download_is_named(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write("train-1.jsonl", TEVATRON).parent
    write("train-2.jsonl.part", TEVATRON)
    (folder / "train-1.jsonl.tmp").touch()  # of one that is finished
    assert len(open_examples(folder)) == 1
    (warning,) = caplog.messages
    assert "train-2.jsonl.part: skipped, because it is an unfinished download" in warning


def test_a_truncated_packed_table_of_passages(write: Callable[..., Path]) -> None:
    rows = "".join(f"p{n}\t{n * 7919}\tt\n" for n in range(5000)).encode()
    path = write("psgs.tsv.gz", rows)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"psgs\.tsv\.gz: the compressed file is damaged or trun"):
        open_examples(write("mined.jsonl", BY_ID))


# Tevatron, tokenised


def test_token_ids_are_read_as_they_are(write: Callable[..., Path]) -> None:
    rows = (TOKENISED, dict(TOKENISED, positives=[[3]], negatives=[], query_id="named"))
    examples = open_examples(write("split00.json", *rows))
    assert query_ids(examples) == ["0", "named"]
    query, positives, negatives = shown(examples)
    assert (query.text, query.tokens) == ("", [7, 8])
    assert [passage.tokens for passage in positives + negatives] == [[1, 2], [3], [4, 5]]
    assert {passage.text for passage in positives + negatives} == {""}
    assert examples[1].positives.tolist() == [1]  # known by its content
    assert examples.passages.tokenised


def test_the_same_fields_may_hold_text(write: Callable[..., Path]) -> None:
    row = {"query": "which ship", "positives": ["a liner"], "negatives": ["a tug"]}
    examples = open_examples(write("a.jsonl", row))
    query, positives, negatives = shown(examples)
    assert query == Query("0", "which ship")
    assert [passage.text for passage in positives + negatives] == ["a liner", "a tug"]
    assert not examples.passages.tokenised


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(TOKENISED, query=[1.5]), r"query\[0\]: expected 'int', got 'float'"),
        (dict(TOKENISED, positives=[[1, -1]]), r"positives\[0\]\[1\]: expected 'int' >= 0"),
        (
            dict(TOKENISED, negatives=[[1], [True]]),
            r"negatives\[1\]\[0\]: expected 'int', got 'bool'",
        ),
        (
            dict(TOKENISED, negatives=[[1], 5]),
            r"negatives\[1\]: expected 'str \| array', got 'int'",
        ),
        (dict(TOKENISED, positives=[1, 2]), r"positives\[0\]: expected 'str \| array', got 'int'"),
        (dict(TOKENISED, query="text"), r"the query is text and its passages are token ids"),
        (dict(TOKENISED, positives=["text"]), r"the query is token ids and its passages are text"),
        (dict(TOKENISED, negatives=["text"]), r"a passage of text among passages of token ids"),
        (
            {"query": "q", "positives": ["text"], "negatives": []},
            r"a passage of text among passages of token ids",
        ),
    ],
)
def test_a_malformed_tokenised_row_is_named_by_its_line(
    write: Callable[..., Path], row: Row, message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        open_examples(write("a.jsonl", TOKENISED, row))


# DPR


@pytest.mark.parametrize("name", ["dpr.array.json", "dpr.jsonl"])
def test_dpr_questions_with_their_hard_negatives(write: Callable[..., Path], name: str) -> None:
    examples = open_examples(write(name, DPR, dict(DPR, hard_negative_ctxs=[])))
    assert shown(examples) == (
        Query("0", "which ship", ("liner", "a liner")),
        [Passage("p1", "Ships", "a liner")],
        [Passage("p2", "", "a tug"), Passage("3", "", "a barge")],
    )
    assert examples[0].scores is None  # a retriever's scores, no teacher's
    assert examples[1].query.id == "1"
    assert ids(examples, examples[1].negatives) == ["9"]  # the others, where there are no hard ones


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(DPR, question=5), r"question: expected 'str \| null', got 'int'"),
        (dict(DPR, positive_ctxs=[{"title": "t"}]), r"positive_ctxs\[0\]: no 'text'"),
        (
            dict(DPR, hard_negative_ctxs=[5]),
            r"hard_negative_ctxs\[0\]: expected 'object', got 'int'",
        ),
        ({"question": "q"}, r"no 'positive_ctxs'; it has question"),
    ],
)
def test_a_malformed_question_is_named_by_its_index(
    write: Callable[..., Path], row: Row, message: str
) -> None:
    with pytest.raises(DataError, match=rf"dpr\.array\.json\[1\]: {message}"):
        open_examples(write("dpr.array.json", DPR, row))


def test_a_truncated_array_leaves_nothing_behind(
    write: Callable[..., Path], own_cache: Path
) -> None:
    path = write("dpr.array.json", DPR, DPR)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"dpr\.array\.json:\d+: the file breaks off .*at byte \d"):
        open_examples(path)
    assert {path.suffix for path in (own_cache / "examples").iterdir()} == {".lock"}


# files and folders


def test_an_unknown_layout_is_one_error_with_its_fields(write: Callable[..., Path]) -> None:
    path = write("a.jsonl", {"premise": "q", "hypothesis": "p"})
    with pytest.raises(DataError) as caught:
        open_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:1: a record with the fields premise, hypothesis; ")
    for field in ("positive_passages", "positive_document_ids", "positives", "positive_ctxs"):
        assert field in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.array.json"])
def test_a_file_without_records_is_an_error(write: Callable[..., Path], name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: no records; expected training examples"):
        open_examples(write(name))


@pytest.mark.parametrize("cut", [20, 2000])
def test_a_truncated_packed_file_is_an_error_with_its_line(
    write: Callable[..., Path], cut: int
) -> None:
    rows = [dict(TEVATRON, query_id=str(n), query=f"{n * 7919}") for n in range(2000)]
    path = write("a.jsonl.gz", *rows)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the compressed file is damaged"):
        open_examples(path)


def test_a_damaged_parquet_file_is_an_error(write: Callable[..., Path]) -> None:
    path = write("a.parquet", TEVATRON)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: the Parquet file cannot be read"):
        open_examples(path)


def test_the_files_of_a_folder_are_read_by_name(write: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("split01.jsonl", "split00.json", "split02.jsonl.gz"):
        write(f"set/{name}", dict(TEVATRON, query_id=name))
    write("set/README.md", b"no data")
    write("set/dev.jsonl", b"not read")
    write("set/.split03.jsonl", b"not read")
    expected = ["split00.json", "split01.jsonl", "split02.jsonl.gz"]
    assert query_ids(open_examples(tmp_path / "set")) == expected
    bare = {"query": "q", "positive_passages": [LINER]}
    write("set/split01.jsonl", bare, bare)
    assert query_ids(open_examples(tmp_path / "set"))[1:3] == ["1", "2"]  # through all files


def test_files_named_train_are_read_first_in_a_folder(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("train.jsonl", "train_01.jsonl", "dev.jsonl", "more.jsonl", "corpus.jsonl"):
        write(name, dict(TEVATRON, query_id=name))
    assert query_ids(open_examples(tmp_path)) == ["train.jsonl", "train_01.jsonl"]
    assert query_ids(open_examples(tmp_path / "dev.jsonl")) == ["dev.jsonl"]  # when it is named


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["nq-dev.json", "nq-train.json", "more.json"], ["nq-train.json"]),
        (["biencoder-nq-dev.json", "biencoder-nq.json"], ["biencoder-nq.json"]),
        (["msmarco_Dev.jsonl", "msmarco_Train.jsonl"], ["msmarco_Train.jsonl"]),
        (["train.jsonl", "train_queries.jsonl"], ["train.jsonl"]),
        (["train_no_test.jsonl", "more.jsonl"], ["train_no_test.jsonl"]),
        (["devices.jsonl", "my-test2.jsonl"], ["devices.jsonl"]),
    ],
)
def test_the_split_may_stand_anywhere_in_the_name(
    write: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    read: list[str],
) -> None:
    for name in names:
        write(f"set/{name}", dict(TEVATRON, query_id=name))
    with caplog.at_level(logging.INFO):
        assert query_ids(open_examples(tmp_path / "set")) == read
    assert caplog.messages == [
        f"{tmp_path / 'set'}: of {len(names)} files these are read: {', '.join(read)}"
    ]


def test_a_folder_without_training_files_says_what_it_has(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write("dev.jsonl", TEVATRON)
    with pytest.raises(DataError, match=r"there are only dev\.jsonl; name the file itself"):
        TrainingFiles(tmp_path).examples()


def test_a_file_in_another_layout_in_a_folder_is_named(write: Callable[..., Path]) -> None:
    write("a/0.jsonl", TEVATRON)
    path = write("a/1.jsonl", DPR)
    with pytest.raises(
        DataError, match=r"1\.jsonl:1: no 'positive_passages'; it has dataset, question"
    ):
        open_examples(path.parent)


@pytest.mark.parametrize("folder", [False, True])
def test_a_changed_file_is_read_again(write: Callable[..., Path], folder: bool) -> None:
    path = write("a.jsonl", TEVATRON)
    source = path.parent if folder else path
    before = open_examples(source)
    write("a.jsonl", dict(TEVATRON, query="which boat"))  # of the same size
    os.utime(path, ns=(1, 1))
    after = open_examples(source)
    assert (before[0].query.text, after[0].query.text) == ("which ship", "which boat")
    assert before.digest != after.digest


def test_an_unchanged_file_is_read_only_once(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", TEVATRON)
    first = open_examples(path)
    monkeypatch.setattr(
        "mlflow_dr.collection.training_files.read_examples",
        lambda *_: (pytest.fail("read") for _ in range(1)),
    )
    assert open_examples(path).digest == first.digest


def test_a_changed_corpus_next_to_the_file_is_read_again(write: Callable[..., Path]) -> None:
    path = write("mined.jsonl", BY_ID)
    rows = [{"docid": p.id, "text": p.text} for p in CORPUS]
    write("corpus.jsonl", *rows)
    assert open_examples(path)[0].positives.tolist() == [1]
    write("corpus.jsonl", *rows[1:], rows[0])
    assert open_examples(path)[0].positives.tolist() == [0]


def test_a_training_file_is_a_collection_without_splits(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", TEVATRON)
    monkeypatch.chdir(tmp_path)
    collection = open_collection("a.jsonl")
    assert isinstance(collection, TrainingFiles)
    assert (collection.name, collection.source) == (str(path), f"file {path}")
    assert list(collection.splits) == []
    assert collection.corpus().ids.to_pylist() == ["p1", "p2", "p3"]
    examples = collection.examples()
    assert isinstance(examples, CachedExamples)
    assert examples.passages.digest == collection.corpus().digest
    with pytest.raises(UsageError, match=r"a\.jsonl has training examples and no judged queries"):
        collection.topics("dev")
    with pytest.raises(UsageError, match="no judged queries to validate on"):
        chosen_split(collection, None)
    with pytest.raises(UsageError, match="no split 'dev'; it has: none, only training examples"):
        chosen_split(collection, "dev")


def test_a_training_file_is_read_on_demand(write: Callable[..., Path]) -> None:
    collection = open_collection(str(write("a.jsonl", b"not json")))
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        collection.examples()


def test_a_folder_with_judgements_is_opened_as_beir(
    beir_folder: Callable[..., Path],
) -> None:
    folder = beir_folder({"p1": "a", "p2": "b"}, {"q": "t"}, train={"q": {"p2": 1}})
    (folder / "mined.jsonl").write_bytes(lines(dict(BY_ID, negative_document_ids=["p2"])))
    examples = open_examples(folder)
    assert ids(examples, examples[0].positives) == ["p2"]
    mined = open_examples(folder / "mined.jsonl")
    assert ids(mined, mined[0].positives) == ["p1"]
    assert mined.passages.digest == examples.passages.digest


def test_examples_of_a_named_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no dataset 'nowhere'"):
        open_examples("nowhere")
