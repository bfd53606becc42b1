"""Collections of passages, and of questions with answers."""

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.downloads import fetched
from mlflow_dr.collection.question_answering import QuestionCollection
from mlflow_dr.collection.questions import parse_answers, read_questions
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, UsageError

PASSAGES = 'id\ttext\ttitle\n1\tRye grows here.\tRye\n2\t"Oats ""grow""\nthere."\tOats\n'
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


@pytest.fixture
def folder(write: Write) -> Path:
    write("psgs_small.tsv", PASSAGES)
    write("qas-dev.tsv", "who grows?\t['rye', \"rye's\", 'rye']\n\"a\ttab\"\t[]\n")
    write("nq-test.qa.csv.gz", "where?\t['there']\n")
    return write("notes.txt", "").parent


def test_a_folder_of_passages_and_questions_is_a_collection(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collection = open_collection(str(folder))
    assert isinstance(collection, QuestionCollection)
    assert (collection.name, sorted(collection.splits)) == (str(folder), ["dev", "test"])
    assert [passage.title for passage in collection.corpus().passages([0, 1])] == ["Rye", "Oats"]
    queries, qrels = collection.topics("dev")
    assert queries == [Query("0", "who grows?", ("rye", "rye's")), Query("1", "a\ttab")]
    assert not qrels
    assert "1 questions have no answers" in caplog.text
    with pytest.raises(UsageError, match=r"no split 'train'; it has: test, dev|dev, test"):
        collection.topics("train")
    with pytest.raises(UsageError, match="no training examples"):
        collection.examples()


def test_training_examples_beside_the_questions_are_read(folder: Path, write: Write) -> None:
    record = {"query_id": "a", "query_text": "who?", "positive_document_ids": ["1"]}
    write("qas-train.jsonl", json.dumps({"question": "who?", "answers": ["rye"]}))
    write("nq-train.jsonl", json.dumps(record))
    collection = open_collection(str(folder))
    assert sorted(collection.splits) == ["dev", "test", "train"]
    assert len(collection.examples()) == 1
    assert collection.examples()[0].query.text == "who?"


def test_files_are_named_and_their_name_opens_them_again(
    folder: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("odd, name?.csv", "who?\t['rye']\n")
    monkeypatch.chdir(folder)
    collection = open_collection("dpr:psgs_small.tsv?queries=odd%2C name%3F.csv,qas-dev.tsv")
    assert collection.splits == ["odd, name?", "qas-dev"]
    monkeypatch.chdir("/")
    again = open_collection(collection.name)
    assert again.name == collection.name
    assert again.topics("odd, name?").queries[0].answers == ("rye",)
    assert len(again.corpus()) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.tsv", r"none\.tsv: no such file"),
        ("psgs_small.tsv?qrels=x", r"expected dpr:PASSAGES\?queries=FILE"),
        ("psgs_small.tsv?queries=", r"expected dpr:PASSAGES\?queries=FILE"),
        ("psgs_small.tsv?queries=qas-dev.tsv,none.tsv", r"none\.tsv: no such file"),
        ("none.tsv?queries=qas-dev.tsv", r"none\.tsv: no such file"),
        ("psgs_small.tsv?queries=qas-dev.tsv,qas-dev.tsv", "two files .* called 'qas-dev'"),
    ],
)
def test_names_of_another_form_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=message):
        open_collection(f"dpr:{name}")


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("a.jsonl", {"question": "who?", "answers": ["x", "y"], "id": 7}, Query("7", "who?", "xy")),
        ("a.jsonl", {"question": "who?", "answer": ["x"]}, Query("0", "who?", "x")),
        ("a.json", [{"question": "who?", "answers": "x", "ctxs": [{}]}], Query("0", "who?", "x")),
        (
            "a.jsonl.gz",
            {"id": "k", "input": "who?", "output": [{"answer": "x"}, {"provenance": []}]},
            Query("k", "who?", "x"),
        ),
    ],
)
def test_questions_are_read_from_json(
    write: Write, name: str, record: Any, expected: Query
) -> None:
    (query,) = read_questions(write(name, json.dumps(record)))
    assert query == expected._replace(answers=tuple(expected.answers))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "who?\t['x']\nwhy?\tx\n", r"a\.tsv:2: the answers 'x' are no list of strings"),
        ("a.tsv", "who?\t[1]\n", r":1: the answers '\[1\]' are no list"),
        ("a.tsv", "who?\t__import__('os')\n", "are no list"),
        ("a.tsv", "who?\t" + "[" * 9000 + "\n", "are no list"),
        ("a.csv", "who?,['x']\n", r":1: 1 columns, .* separated by a tab"),
        ("a.csv", "who?\t\"['x']\n\twhy?\n", r"a\.csv:1: a quotation mark is not closed|cannot"),
        ("a.csv", "", "the file has no questions"),
        ("a.jsonl", '{"question": "who?"}', r":1: expected question and answers, .* has question"),
        ("a.jsonl", '{"id": 1, "question": "a", "answers": []}\n' * 2, "id '1' is used twice"),
        ("a.jsonl", '{"question": "a", "answers": [3]}', r"answers\[0\]|answers: "),
        ("a.tsv.gz", b"", "no questions"),
    ],
)
def test_malformed_questions_get_one_line(
    write: Write, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_questions(write(name, content))
    assert "\n" not in str(caught.value)


def test_cells_may_be_long(write: Write) -> None:
    long = "x" * 200_000
    (query,) = read_questions(write("a.tsv", f"{long}\t['{long}']\n"))
    assert (query.text, query.answers) == (long, (long,))
    assert parse_answers(f"('a', {long!r})", "here") == ("a", long)


def test_questions_without_text_are_left_out_and_counted(
    folder: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("qas-dev.tsv", " \t['a']\nwho?\t['b']\n")
    with caplog.at_level(logging.WARNING):
        assert [query.id for query in open_collection(str(folder)).topics("dev").queries] == ["1"]
    assert "left out: 1 questions have no text" in caplog.text
    write("qas-dev.tsv", " \t['a']\n")
    with pytest.raises(DataError, match="none of 1 questions has text"):
        open_collection(str(folder)).topics("dev")


def test_published_files_come_from_the_cache_or_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_collection("nq").splits == ["dev", "test"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"nq-dev\.qa\.csv is not in the cache.* put it at") as told:
        open_collection("nq").topics("dev")
    place = Path(str(told.value).rpartition("put it at ")[2])
    place.parent.mkdir(parents=True)
    place.write_text("who?\t['x']\n")
    assert open_collection("nq").topics("dev").queries == [Query("0", "who?", ("x",))]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "far").write_bytes(b"content")
    path = fetched((tmp_path / "far").as_uri())
    (tmp_path / "far").unlink()
    assert fetched((tmp_path / "far").as_uri()) == path
    assert path.read_bytes() == b"content"
    with pytest.raises(DataError, match=r"other cannot be fetched .* put it at"):
        fetched((tmp_path / "other").as_uri())


def test_questions_of_trivia_qa_in_its_own_layout(write: Write) -> None:
    answer = {"Value": "Paris", "Aliases": ["Paris", "Lutetia"], "Type": "WikipediaEntity"}
    data = [
        {"Question": "capital?", "QuestionId": "tc_1", "Answer": answer, "SearchResults": []},
        {"Question": "test?", "QuestionId": "tc_2"},
    ]
    path = write("web-dev.json.gz", json.dumps({"Data": data, "Domain": "Web"}, indent=4))
    assert read_questions(path) == [
        Query("tc_1", "capital?", ("Paris", "Lutetia")),
        Query("tc_2", "test?"),
    ]
    for wrong, error in (
        ({"Question": "no id"}, "no file of TriviaQA"),
        ({"Question": "twice", "QuestionId": "tc_1"}, "tc_1"),
        ({"Question": "blank", "QuestionId": " "}, r"Data\[2\]"),
    ):
        with pytest.raises(DataError, match=error):
            read_questions(write("wrong.json", json.dumps({"Data": [*data, wrong]})))
    with pytest.raises(DataError, match="no file of TriviaQA"):
        read_questions(write("cut.json", json.dumps({"Data": data})[:-9]))
