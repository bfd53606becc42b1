"""A folder in BEIR's layout: what is read, and what every malformed line is answered with."""

import gzip
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, UsageError

Write = Callable[..., Path]


@pytest.fixture
def folder(beir_folder: Write) -> Path:
    return beir_folder(
        {"p1": ("Ships", "They float."), "p2": "Iron sinks.", "p3": "Cork swims."},
        {"q1": "what floats", "q2": "what sinks", "q3": "not judged"},
        dev={"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}},
        train={"q2": {"p2": 1, "p3": 0}, "q3": {"p3": 0}},
    )


def passages_of(folder: Path) -> list[Passage]:
    corpus = BeirFolder(folder).corpus()
    return corpus.passages(range(len(corpus)))


def judged(folder: Path, split: str = "dev") -> dict[str, dict[str, int]]:
    qrels = BeirFolder(folder).topics(split).qrels
    return {query_id: dict(found) for query_id, found in qrels.items()}


def packed(path: Path) -> Path:
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return target


def test_a_good_folder_is_read_completely_and_in_order(folder: Path) -> None:
    collection = BeirFolder(folder)
    assert collection.splits == ["dev", "train"]
    assert passages_of(folder) == [
        Passage("p1", "Ships", "They float."),
        Passage("p2", "", "Iron sinks."),
        Passage("p3", "", "Cork swims."),
    ]
    topics = collection.topics("dev")
    assert topics.queries == [Query("q1", "what floats"), Query("q2", "what sinks")]
    assert judged(folder) == {"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}}


def test_training_examples_come_from_the_train_split_with_a_relevant_passage(folder: Path) -> None:
    examples = BeirFolder(folder).examples()
    assert len(examples) == 1
    assert examples[0].query == Query("q2", "what sinks")
    assert examples.passages.passages(examples[0].positives) == [Passage("p2", "", "Iron sinks.")]
    assert examples[0].negatives.tolist() == []


@pytest.mark.parametrize(
    "fields", ['"answers": ["a", "b"]', '"metadata": {"answers": ["a", "b"]}, "more": 1']
)
def test_a_query_may_have_short_answers(folder: Path, fields: str) -> None:
    (folder / "queries.jsonl").write_text(f'{{"_id": "q1", "text": "t", {fields}}}\n')
    assert BeirFolder(folder).topics("dev").queries == [Query("q1", "t", ("a", "b"))]


def test_packed_files_are_read_like_plain_ones(folder: Path) -> None:
    plain = passages_of(folder), judged(folder), BeirFolder(folder).corpus().digest
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv", "qrels/train.tsv"):
        packed(folder / name)
    assert BeirFolder(folder).splits == ["dev", "train"]
    assert (passages_of(folder), judged(folder), BeirFolder(folder).corpus().digest) == plain


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("query-id\tcorpus-id\tscore\nq1\tp1\t2\nq2\tp2\t1\n", id="header"),
        pytest.param("q1\tp1\t2\nq2\tp2\t1\n", id="no header"),
        pytest.param("q1\tp1\t2\nq2\tp2\t1", id="no last line end"),
        pytest.param("q1 0 p1 2\nq2 0 p2 1\n", id="TREC"),
        pytest.param("q1\t0\tp1\t2\nq2\tQ0\tp2\t1\n", id="TREC with tabs"),
        pytest.param("query-id\tcorpus-id\tscore\r\nq1\tp1\t2\r\nq2\tp2\t1\r\n", id="CRLF"),
        pytest.param("\ufeffq1\tp1\t2\nq2\tp2\t1\n", id="byte order mark"),
        pytest.param("q1\tp1\t2\n\n \n\t\nq2\tp2\t1\n\n", id="blank lines"),
        pytest.param("q1\tp1\t2\nq2\tp2\t1\nq1\tp1\t2\n", id="a line repeated"),
        pytest.param("q1 \tp1\t 2\n q2\tp2\t1 \n", id="blanks beside tabs"),
        pytest.param("q1\t1.5\tp1\t2\nq2\t3\tp2\t1\n", id="TREC with rounds"),
        pytest.param(
            "query-id\tcorpus-id\tscore\tgrader\nq1\tp1\t2\t0\nq2\tp2\t1\t0\n",
            id="a fourth column",
        ),
        pytest.param(
            "Doc_ID\tlabel\tnote\tquery_id\np1\t2\t\tq1\np2\t1\tp1\tq2\n",
            id="columns in another order",
        ),
        pytest.param("topic 0 docno rel\nq1 0 p1 2\nq2 0 p2 1\n", id="TREC with a header"),
    ],
)
def test_layouts_of_judgements(folder: Path, text: str) -> None:
    (folder / "qrels/dev.tsv").write_bytes(text.encode())
    assert judged(folder) == {"q1": {"p1": 2}, "q2": {"p2": 1}}


def test_a_first_judgement_without_header_is_not_lost(folder: Path) -> None:
    (folder / "qrels/dev.tsv").write_text("q1\tp1\t1\n")
    assert judged(folder) == {"q1": {"p1": 1}}


def test_negative_relevance_is_kept(folder: Path) -> None:
    (folder / "qrels/dev.tsv").write_text("q1\tp1\t1\nq1\tp2\t-2\n")
    assert judged(folder) == {"q1": {"p1": 1, "p2": -2}}


@pytest.mark.parametrize(
    ("line", "passage"),
    [
        ('{"_id": "x", "text": "t"}', Passage("x", "", "t")),
        ('{"_id": "x", "title": null, "text": "t"}', Passage("x", "", "t")),
        ('{"_id": 7, "title": "T", "text": "t"}', Passage("7", "T", "t")),
        ('{"_id": "x", "text": "", "metadata": {"a": 1}}', Passage("x", "", "")),
        ('{"_id": "é字", "text": "t\\u0000\\n"}', Passage("é字", "", "t\x00\n")),
    ],
    ids=["no title", "null title", "number as id", "no text, more fields", "any characters"],
)
def test_the_accepted_forms_of_a_passage(folder: Path, line: str, passage: Passage) -> None:
    (folder / "corpus.jsonl").write_text(line + "\n", encoding="utf-8")
    assert passages_of(folder) == [passage]


def test_byte_order_mark_line_ends_and_blank_lines_in_jsonl(folder: Path) -> None:
    lines = '\ufeff{"_id": "a", "text": "1"}\r\n\r\n  \r\n{"_id": "b", "text": "2"}'
    (folder / "corpus.jsonl").write_bytes(lines.encode())
    assert [passage.id for passage in passages_of(folder)] == ["a", "b"]


GOOD = '{"_id": "a", "text": "1"}\n'
MALFORMED = [
    pytest.param("{not json", "not JSON", id="not JSON"),
    pytest.param('["a"]', "expected 'object', got 'array'", id="no object"),
    pytest.param('{"text": "t"}', "no '_id'", id="no id"),
    pytest.param('{"_id": "", "text": "t"}', "no '_id'|an id is empty", id="empty id"),
    pytest.param('{"_id": 1.5, "text": "t"}', "_id: expected .* got 'float'", id="fraction as id"),
    pytest.param('{"_id": true, "text": "t"}', "_id: expected .* got 'bool'", id="boolean as id"),
    pytest.param('{"_id": null, "text": "t"}', "no '_id'|got 'null'", id="null as id"),
    pytest.param('{"_id": "b\\u0000c", "text": "t"}', "has a NUL character", id="NUL in id"),
    pytest.param('{"_id": "b ", "text": "t"}', "white space at its start or end", id="blank in id"),
    pytest.param('{"_id": "\\ud800", "text": "t"}', "not JSON", id="half a surrogate pair"),
    pytest.param(
        f'{{"_id": {"9" * 5000}, "text": "t"}}',
        "_id: Integer value out of range",
        id="5,000 digits",
    ),
    pytest.param('{"_id": "b"}', "no 'text'", id="no text"),
    pytest.param('{"_id": "b", "text": null}', "no 'text'|got 'null'", id="null text"),
    pytest.param('{"_id": "b", "text": ["t"]}', "text: expected .* got 'array'", id="list as text"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_passage_is_named_by_its_line(folder: Path, line: str, message: str) -> None:
    (folder / "corpus.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=rf"corpus\.jsonl:3: .*{message}"):
        BeirFolder(folder).corpus()


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_query_is_named_by_its_line(folder: Path, line: str, message: str) -> None:
    (folder / "queries.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(DataError, match=rf"queries\.jsonl:3: .*{message}"):
        BeirFolder(folder).topics("dev")


def test_a_title_that_is_not_a_string(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"_id": "a", "title": 3, "text": "t"}\n')
    with pytest.raises(
        DataError, match=r"corpus\.jsonl:1: title: expected 'str \| null', got 'int'"
    ):
        BeirFolder(folder).corpus()


@pytest.mark.parametrize("again", ['"_id": "a"', '"_id": 1'], ids=["string", "number"])
def test_a_passage_id_used_twice_names_both_lines(folder: Path, again: str) -> None:
    lines = [GOOD, '{"_id": "1", "text": "2"}\n', f'{{{again}, "text": "3"}}\n']
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    first = 1 if again.endswith('"a"') else 3
    with pytest.raises(
        DataError, match=rf"corpus\.jsonl:5: passage id .* is used twice; .*corpus\.jsonl:{first}$"
    ):
        BeirFolder(folder).corpus()


def test_a_query_id_used_twice(folder: Path) -> None:
    (folder / "queries.jsonl").write_text(GOOD + GOOD)
    with pytest.raises(DataError, match=r"queries\.jsonl:2: query id 'a' is used twice"):
        BeirFolder(folder).topics("dev")


def test_text_that_is_not_utf8(folder: Path) -> None:
    (folder / "corpus.jsonl").write_bytes(
        GOOD.encode() + '{"_id": "b", "text": "é"}'.encode("latin-1")
    )
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: not JSON .*utf-8"):
        BeirFolder(folder).corpus()
    (folder / "qrels/dev.tsv").write_bytes("q1\tp1\t1\nqé\tp1\t1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"dev\.tsv:2: not UTF-8"):
        BeirFolder(folder).topics("dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\tp1", "2 columns"),
        ("q1", "1 columns"),
        ("q1 0 p1 1 more", "5 columns"),
        ("q1\tp1\t1.0", "relevance '1.0' is not a whole number"),
        ("q1\tp1\t32768", "relevance '32768' is not a whole number from -32,767 to 32,767"),
        ("q1\tp1\t-1732233600000", "relevance '-1732233600000' is not a whole number from"),
        pytest.param(f"q1\tp1\t{'9' * 5000}", "relevance '9+' is not a whole number", id="9s"),
        ("q1\tp1\thigh", "relevance 'high' is not a whole number"),
        ("q1\tp1\t--1", "relevance '--1' is not a whole number"),
        ("q2\tp2\t3", "have relevance 3 here and 1 on an earlier line"),
        ("q1\tp1\t1\t0", "4 columns, the second of them 'p1'; TREC's have 0 there"),
        ("q1\t7\t1\t0", "4 columns, the second of them '7'; TREC's have 0 there"),
        ("q1\t\t1", "an id is empty"),
        ("q1\tp1\t1\tgood", "4 columns, the second of them 'p1'; TREC's have 0 there"),
        ("q1\tp1\x00tail\t1", r"id 'p1\\x00tail' has a NUL character"),
        ("q\x001\tp1\t1", r"id 'q\\x001' has a NUL character"),
    ],
)
def test_malformed_judgements(folder: Path, line: str, message: str) -> None:
    (folder / "qrels/dev.tsv").write_text(f"q2\tp2\t1\n\n{line}\n")
    with pytest.raises(DataError, match=rf"dev\.tsv:3: .*{message}"):
        BeirFolder(folder).topics("dev")


@pytest.mark.parametrize("line", ["q1\tp1\t1", "q1\tp1\t1\t0\t0"])
def test_a_line_of_other_columns_than_the_first_line_names(folder: Path, line: str) -> None:
    (folder / "qrels/dev.tsv").write_text(f"query-id\tcorpus-id\tscore\tgrader\n{line}\n")
    with pytest.raises(DataError, match=r"dev\.tsv:2: \d columns; the first line names 4"):
        BeirFolder(folder).topics("dev")


def test_ids_that_differ_by_unicode_normalisation_are_two(folder: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (folder / "corpus.jsonl").write_text(
        "".join(f'{{"_id": "{key}", "text": "t"}}\n' for key in (composed, decomposed))
    )
    (folder / "qrels/dev.tsv").write_text(f"q1\t{composed}\t1\nq1\t{decomposed}\t2\n")
    assert judged(folder) == {"q1": {composed: 1, decomposed: 2}}


def test_a_broken_link_is_refused_even_with_a_packed_file_beside_it(folder: Path) -> None:
    packed(folder / "corpus.jsonl")
    (folder / "corpus.jsonl").symlink_to(folder / "gone.jsonl")
    with pytest.raises(DataError, match=r"corpus\.jsonl: a link to .*gone\.jsonl, which does not"):
        BeirFolder(folder).corpus()


def test_messages_quote_the_start_of_long_values(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text(f'{{"_id": ["{"x" * 200_000}"], "text": "t"}}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: _id: expected") as error:
        BeirFolder(folder).corpus()
    assert len(str(error.value)) < 500


def test_a_truncated_packed_file(folder: Path) -> None:
    lines = "".join(f'{{"_id": "{n}", "text": "{n * 7919}"}}\n' for n in range(2000))
    (folder / "corpus.jsonl").write_text(lines)
    path = packed(folder / "corpus.jsonl")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:\d+: .*truncated") as error:
        BeirFolder(folder).corpus()
    assert 2 < int(str(error.value).split(":")[1]) < 2000


def test_a_file_that_is_not_packed_at_all(folder: Path) -> None:
    (folder / "corpus.jsonl").rename(folder / "corpus.jsonl.gz")
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz:1: .*damaged"):
        BeirFolder(folder).corpus()


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_a_missing_file_is_named_in_both_spellings(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: no such file \(nor {name}\.gz\)"):
        BeirFolder(folder).topics("dev")


def test_a_folder_without_judgements(folder: Path) -> None:
    for path in (folder / "qrels").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no <split>\.tsv"):
        BeirFolder(folder).topics("dev")


def test_an_unknown_split_names_those_that_exist(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no split 'test'; it has: dev, train"):
        BeirFolder(folder).topics("test")


def test_judgements_of_unknown_queries_and_passages_are_counted_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "qrels/dev.tsv").write_text(
        "q1\tp1\t1\nq1\tgone1\t1\nq1\tgone2\t1\nq2\tgone1\t1\nnobody\tp1\t1\n"
    )
    topics = BeirFolder(folder).topics("dev")
    assert topics.qrels == {"q1": {"p1": 1}}
    assert [query.id for query in topics.queries] == ["q1"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 judgements name passages that the corpus lacks (such as 'gone1')" in record.message
    assert "1 judged queries are not in the query file (such as 'nobody')" in record.message


def test_a_query_without_text_is_left_out_with_a_count(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": " "}\n{"_id": "q2", "text": "t"}\n'
    )
    assert judged(folder) == {"q2": {"p2": 1}}
    assert "1 judged queries have no text (such as 'q1')" in caplog.text
    assert "not in the query file" not in caplog.text


def test_no_warning_when_everything_fits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    BeirFolder(folder).topics("dev")
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q1\tgone\t1\n", "1 judgements name passages"),
        ("nobody\tp1\t1\n", "1 judged queries are not"),
        ("query-id\tcorpus-id\tscore\n", "the file has none"),
        ("", "the file has none"),
    ],
    ids=["unknown passage", "unknown query", "only a header", "empty"],
)
def test_no_judgement_left_is_an_error(folder: Path, text: str, message: str) -> None:
    (folder / "qrels/dev.tsv").write_text(text)
    with pytest.raises(DataError, match=f"no judgement is left to measure with: {message}"):
        BeirFolder(folder).topics("dev")


def test_a_changed_file_is_read_again(folder: Path) -> None:
    before = BeirFolder(folder).corpus()
    lines = (folder / "corpus.jsonl").read_text().replace("Iron", "Gold")
    (folder / "corpus.jsonl").write_text(lines)
    after = BeirFolder(folder).corpus()
    assert (before[1].text, after[1].text) == ("Iron sinks.", "Gold sinks.")
    assert before.digest != after.digest


def replaced_in_place(path: Path, new: bytes) -> None:
    path.write_bytes(new)


def replaced_by_renaming(path: Path, new: bytes) -> None:
    (path.parent / "new").write_bytes(new)
    (path.parent / "new").replace(path)


@pytest.mark.parametrize("replace", [replaced_in_place, replaced_by_renaming])
def test_a_file_of_equal_size_and_time_is_another_file(
    folder: Path, replace: Callable[[Path, bytes], None]
) -> None:
    path = folder / "corpus.jsonl"
    before, state = BeirFolder(folder).corpus(), path.stat()
    time.sleep(0.02)  # longer than the clock of a file system needs to tick
    replace(path, path.read_bytes().replace(b"Iron", b"Gold"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = BeirFolder(folder).corpus()
    assert (before[1].text, after[1].text) == ("Iron sinks.", "Gold sinks.")


def test_an_unchanged_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BeirFolder(folder).corpus()
    monkeypatch.setattr("mlflow_dr.collection.beir.read_records", lambda *_: pytest.fail("read"))
    assert len(BeirFolder(folder).corpus()) == 3


def test_a_failed_reading_leaves_no_files(folder: Path, own_cache: Path) -> None:
    (folder / "corpus.jsonl").write_text(GOOD * 2)
    for _ in range(2):
        with pytest.raises(DataError, match=r"first use is at .*corpus\.jsonl:1"):
            BeirFolder(folder).corpus()
    assert [path.suffix for path in (own_cache / "corpora").iterdir()] == [".lock"]


def test_a_corpus_without_passages(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the corpus has no passages"):
        BeirFolder(folder).corpus()


def test_a_first_line_with_a_fraction_is_not_a_header(
    beir_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = beir_folder({"d1": "text"}, {"q1": "query"}, dev={"q1": {"d1": 1}})
    path = folder / "qrels" / "dev.tsv"
    path.write_text("q1\td1\t1.5\n")
    with pytest.raises(DataError, match=r"dev\.tsv:1: relevance '1\.5' is not a whole number"):
        BeirFolder(folder).topics("dev")
