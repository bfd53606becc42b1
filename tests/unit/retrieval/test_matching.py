"""Answers found in this process and in others."""

import logging
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval import matching
from mlflow_dr.retrieval.matching import AnswerMatcher
from mlflow_dr.retrieval.measures import check_topics, measure_topics, parse_measures

QUERIES = [
    Query("0", "who?", ("rye",)),
    Query("1", "what?", ("oats", "barley")),
    Query("2", "why?", ()),
]
ROWS = np.array([[2, 0, 1, -1], [0, 2, -1, -1], [0, 1, 2, 3]])
HITS = np.array([[False, True, False, False], [False, True, False, False], [False] * 4])


@pytest.fixture
def corpus() -> Corpus:
    texts = ["Rye grows", "Wheat", "Barley is sown", ""]
    return cached_corpus("answers", [Passage(str(n), "", text) for n, text in enumerate(texts)])


@pytest.fixture
def many(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnswerMatcher]:
    """Two processes, started however little there is to do."""
    monkeypatch.setattr(matching, "SECONDS_WORTH_PROCESSES", 0.0)
    with AnswerMatcher(corpus, processes=2) as matcher:
        matcher.prepare(3, 4)
        yield matcher


def test_processes_find_what_one_finds(corpus: Corpus, many: AnswerMatcher) -> None:
    assert (AnswerMatcher(corpus).hits(QUERIES, ROWS) == HITS).all()
    assert len(many._pools) == 2
    for _ in range(2):
        assert (many.hits(QUERIES, ROWS) == HITS).all()


def test_little_work_and_passages_in_memory_start_no_process(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = AnswerMatcher(corpus, processes=8)
    matcher.prepare(3, 4)
    assert not matcher._pools
    monkeypatch.setattr(matching, "SECONDS_WORTH_PROCESSES", 0.0)
    table = pa.table({"id": ["0"], "title": [""], "text": ["Rye"]})
    matcher = AnswerMatcher(Corpus(table), processes=8)
    assert matcher.hits(QUERIES[:1], np.array([[0, -1]])).tolist() == [[True, False]]
    assert not matcher._pools


def test_answers_that_are_no_expressions_are_counted_once(
    corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    queries = [Query("0", "who?", ("(", "ry.")), Query("1", "what?", ("[",))]
    matcher = AnswerMatcher(corpus, "regex")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert matcher.hits(queries, ROWS[:2])[:, :2].tolist() == [[False, True], [False] * 2]
    (record,) = caplog.records
    assert "2 answers are not regular expressions" in record.message


def test_accuracy_is_of_answers_and_the_rest_of_judgements() -> None:
    measures = parse_measures("accuracy@1 mrr@10 accuracy@2")
    ranking = {"0": [("p", 2.0)], "1": [("p", 2.0)], "2": []}
    topics = Topics(QUERIES, {"0": {"p": 1}, "1": {"x": 1}, "2": {"p": 1}})
    values = measure_topics(topics, ranking, measures, HITS)
    assert [list(values[name].values()) for name in "012"] == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert list(values["0"]) == list(measures)
    only = parse_measures("accuracy@2")
    assert measure_topics(Topics(QUERIES, {}), ranking, only, HITS)["1"] == {"accuracy@2": 1.0}


def test_measures_that_a_split_cannot_have_are_refused() -> None:
    accuracy, mrr = parse_measures("accuracy@1"), parse_measures("mrr@10")
    answered = Topics(QUERIES, {})
    judged = Topics([Query("0", "who?")], {"0": {"p": 1}})
    check_topics("here", answered, accuracy)
    check_topics("here", judged, mrr)
    with pytest.raises(UsageError, match=r"no judgements, so mrr@10 cannot .* 'accuracy@1 acc"):
        check_topics("here", answered, accuracy + mrr)
    with pytest.raises(UsageError, match=r"no answers, so accuracy .* use success@k"):
        check_topics("here", judged, accuracy)
    with pytest.raises(UsageError, match="accuracy has no parameters"):
        parse_measures("accuracy(rel=2)@5")
