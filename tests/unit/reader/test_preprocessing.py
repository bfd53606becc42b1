import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest import LogCaptureFixture

from mlflow_dr.errors import DataError
from mlflow_dr.reader.data import ReaderData, ReaderQuestion
from mlflow_dr.reader.preprocessing import ReaderLimits, reader_data
from mlflow_dr.reader.sequences import SequenceBuilder

Write = Callable[..., Path]


def names(data: ReaderData, rows: Any) -> list[str]:
    return [data.passage(row).id for row in rows]


def answers_of(data: ReaderData, question: ReaderQuestion) -> list[list[str]]:
    found = []
    for row, spans in zip(question.positives, question.spans, strict=True):
        ids, offset = data.sequence(question, row)
        tokens = [ids[start + offset : end + offset + 1] for start, end in spans]
        found.append([data.builder._tokenizer.decode(some) for some in tokens])
    return found


def test_positives_have_spans_and_the_others_are_negatives(
    write_results: Write, builder: SequenceBuilder, caplog: LogCaptureFixture
) -> None:
    data = reader_data(write_results(), builder, training=True)
    assert len(data) == 1
    question = data[0]
    assert (question.question, question.answers) == ("who sat on the mat", ["the cat", "cat"])
    assert names(data, question.positives) == ["p1", "p2", "p3"]
    assert names(data, question.others) == ["n1", "n2"]
    assert answers_of(data, question)[0] == ["the cat", "the cat", "cat", "cat"]
    assert "left out 1 questions without a passage to learn from" in caplog.text
    assert "left out 0" not in caplog.text


def test_passages_of_the_gold_article_are_the_positives(
    write_results: Write, builder: SequenceBuilder, tmp_path: Path
) -> None:
    asked = {"question": "Who sat on the mat?", "question_tokens": "who sat on the mat"}
    gold = tmp_path / "gold.json.gz"
    content = {"data": [{**asked, "title": "OTHER", "context": "", "example_id": 7}]}
    gold.write_bytes(gzip.compress(json.dumps(content, indent=1).encode()))
    question = (data := reader_data(write_results(), builder, training=True, gold=gold))[0]
    assert names(data, question.positives) == ["p2"]
    assert question.question == "Who sat on the mat?"


def test_the_limits_are_dprs(write_results: Write, builder: SequenceBuilder) -> None:
    assert [ReaderLimits().negatives(count) for count in (1, 7, 20)] == [50, 70, 150]
    limits = ReaderLimits(max_positives=2, min_negatives=1, negatives_per_positive=0)
    question = (data := reader_data(write_results(), builder, training=True, limits=limits))[0]
    assert names(data, question.positives) == ["p1", "p2"]
    assert names(data, question.others) == ["n1"]


def test_for_prediction_the_first_passages_are_taken_as_they_are(
    write_results: Write, builder: SequenceBuilder
) -> None:
    limits = ReaderLimits(max_predicted=3)
    data = reader_data(write_results(), builder, training=False, limits=limits)
    assert len(data) == 2
    assert names(data, data[0].others) == ["n1", "p1", "p2"]
    assert names(data, data[1].others) == ["n1"]
    assert data.n_passages == 3
    assert not len(data[0].positives)


def test_other_results_or_lengths_are_prepared_again(
    write_results: Write, builder: SequenceBuilder, tokenizer: Any
) -> None:
    path = write_results()
    assert len(reader_data(path, builder, training=True)[0].tokens) == 5
    assert len(reader_data(path, SequenceBuilder(tokenizer, 4), training=True)[0].tokens) == 4
    write_results([json.loads(path.read_text())[0] | {"question": "who"}])
    assert reader_data(path, builder, training=True)[0].question == "who"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ctxs": [{"id": 1, "text": "cat"}]}, r"results.json\[0\]: a passage has no has_answer"),
        ({"answers": ["red"]}, "no question has a passage in which an answer is found"),
        ({"answers": [""]}, "no question has a passage in which an answer is found"),
        ({"ctxs": []}, "no question has a passage in which an answer is found"),
        ({"ctxs": None}, r"results.json\[0\]: ctxs: expected"),
        ({"answers": [1]}, r"results.json\[0\]: answers\[0\]: expected"),
    ],
)
def test_bad_results_are_one_line(
    write_results: Write, builder: SequenceBuilder, change: dict[str, Any], message: str
) -> None:
    first = json.loads(write_results().read_text())[0]
    with pytest.raises(DataError, match=message):
        reader_data(write_results([first | change]), builder, training=True)


def test_empty_results_are_refused_and_empty_questions_are_read(
    write_results: Write, builder: SequenceBuilder
) -> None:
    odd = [{"question": "", "answers": "x", "ctxs": []}]
    assert len(reader_data(write_results(odd), builder, training=False)[0].tokens) == 0
    with pytest.raises(DataError, match="there are no questions"):
        reader_data(write_results([]), builder, training=False)


def test_a_gold_file_of_another_layout_is_refused(
    write_results: Write, builder: SequenceBuilder
) -> None:
    with pytest.raises(DataError, match=r"gold\.json: no file of gold"):
        reader_data(write_results(), builder, training=True, gold=write_results([], "gold.json"))
