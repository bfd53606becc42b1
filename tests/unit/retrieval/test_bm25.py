"""BM25 against its formula in plain Python."""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from mlflow_dr.collection.corpus import TOKENISED_SCHEMA, Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval import bm25 as module
from mlflow_dr.retrieval.bm25 import Bm25Settings, Terms, bm25_index

ALL = 10**6
SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "divers", "pilot", "stars")


@pytest.fixture
def sentences(texts: list[str]) -> list[str]:
    """50 passages of unequal length, some twice, one without a word."""
    made = [f"{a} {b}" for a in texts[:4] for b in texts[4:]]
    made += [f"the {subject} and the {other}" for subject in SUBJECTS[:3] for other in SUBJECTS]
    return [*made, made[0], "..."]


def corpus_of(texts: Sequence[str]) -> Corpus:
    ids = [f"p{number}" for number in range(len(texts))]
    titles = [f"Ports {number % 3}" for number in range(len(texts))]
    return Corpus(pa.table({"id": ids, "title": titles, "text": list(texts)}))


def terms_of(text: str) -> list[str]:
    stem = Stemmer.Stemmer("english").stemWord
    return [stem(w) for w in re.findall(r"\w\w+", text.lower()) if w not in STOPWORDS_EN]


def formula(corpus: Corpus, query: str, k1: float, b: float) -> dict[int, float]:
    """Score by row in fp64, of passages that have a term of the query."""
    passages = [terms_of(f"{p.title} {p.text}") for p in corpus.passages(range(len(corpus)))]
    mean = sum(map(len, passages)) / len(passages)
    scores = {}
    for row, passage in enumerate(passages):
        counts, total = Counter(passage), 0.0
        for term in terms_of(query):
            holders = sum(term in other for other in passages)
            rarity = math.log(1 + (len(passages) - holders + 0.5) / (holders + 0.5))
            weight = counts[term] + k1 * (1 - b + b * len(passage) / mean)
            total += rarity * counts[term] / weight
        if total > 0:
            scores[row] = total
    return scores


QUERIES = ("ships at the harbour", "who follows the gulls and gulls", "ports", "Kelp, or divers?")


@pytest.mark.parametrize("settings", [Bm25Settings(), Bm25Settings(k1=1.5, b=0.75)])
@pytest.mark.parametrize("k", [1, 7, ALL])
def test_ranking_and_scores_follow_the_formula(
    sentences: list[str], settings: Bm25Settings, k: int
) -> None:
    corpus = corpus_of(sentences)
    queries = [Query(str(number), text) for number, text in enumerate(QUERIES)]
    found = bm25_index(corpus, settings).search(queries, k)
    assert found.rows.shape == found.scores.shape == (4, min(k, len(corpus)))
    for query, text in enumerate(QUERIES):
        expected = formula(corpus, text, settings.k1, settings.b)
        rows = [row for row in found.rows[query].tolist() if row >= 0]
        assert len(rows) == min(k, len(expected))
        scores = found.scores[query][: len(rows)]
        best = sorted(expected.values(), reverse=True)[: len(rows)]
        np.testing.assert_allclose(scores, best, rtol=1e-5)
        np.testing.assert_allclose(scores, [expected[row] for row in rows], rtol=1e-5)
        assert (np.diff(scores) <= 0).all()
        assert (found.rows[query][len(rows) :] == -1).all()
        assert np.isneginf(found.scores[query][len(rows) :]).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5, 24])
def test_equal_scores_are_ordered_by_descending_id_also_at_the_cut(k: int) -> None:
    found = bm25_index(corpus_of(["the same words"] * 24)).search([Query("q", "same")], k)
    ids = sorted((f"p{number}" for number in range(24)), reverse=True)
    assert [f"p{row}" for row in found.rows[0]] == ids[:k]


def test_a_passage_that_shares_no_term_is_not_found() -> None:
    corpus = corpus_of(["a lighthouse", "an otter", "more otters"])
    found = bm25_index(corpus).search([Query("q", "the otter"), Query("none", "zebra")], 3)
    assert sorted(found.rows[0].tolist()) == [-1, 1, 2]
    assert found.rows[1].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("text", ["", "  ", "the of and", "?", "xyzzy"])
def test_a_query_without_a_known_term_finds_nothing(sentences: list[str], text: str) -> None:
    found = bm25_index(corpus_of(sentences)).search([Query("q", text)], 5, [np.array([0, 3])])
    assert (found.rows == -1).all()
    assert found.extra_scores[0].tolist() == [0.0, 0.0]


def test_scores_of_requested_rows(sentences: list[str]) -> None:
    corpus = corpus_of(sentences)
    asked = [np.array([5, 0, len(corpus) - 1]), np.array([], np.int64)]
    queries = [Query("0", QUERIES[0]), Query("1", QUERIES[1])]
    found = bm25_index(corpus).search(queries, 1, asked)
    expected = formula(corpus, QUERIES[0], 0.9, 0.4)
    best = [expected.get(row, 0.0) for row in asked[0].tolist()]
    np.testing.assert_allclose(found.extra_scores[0], best, rtol=1e-5)
    assert found.extra_scores[1].shape == (0,)


def test_no_queries_give_no_rows(sentences: list[str]) -> None:
    assert bm25_index(corpus_of(sentences)).search([], 5).rows.shape == (0, 5)


def test_the_index_is_built_once(sentences: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [Query("q", QUERIES[0])]
    first = bm25_index(corpus_of(sentences)).search(queries, 5)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_write", lambda *_: pytest.fail("indexed again"))
        second = bm25_index(corpus_of(sentences)).search(queries, 5)
    assert (first.rows == second.rows).all()
    assert (first.scores == second.scores).all()
    other = bm25_index(corpus_of([*sentences, "one more ship"])).search(queries, ALL)
    assert len(sentences) in other.rows


def test_other_parameters_have_their_own_index(sentences: list[str]) -> None:
    corpus, queries = corpus_of(sentences), [Query("q", QUERIES[0])]
    variants = (
        Bm25Settings(),
        Bm25Settings(k1=2.0),
        Bm25Settings(b=0.9),
        Bm25Settings(language="none"),
    )
    scores = {
        bm25_index(corpus, settings).search(queries, 1).scores.item() for settings in variants
    }
    assert len(scores) == 4


def test_terms_of_a_language() -> None:
    assert Terms("english")("The ships' captains, and a ship") == ["ship", "captain", "ship"]
    assert Terms("none")("The ships, a ship") == ["the", "ships", "ship"]
    assert Terms("german")("Die Häuser und das Haus") == ["haus", "haus"]
    # composed or not, a word is one word
    assert Terms("none")("cafe\u0301") == Terms("none")("CAFÉ") == ["café"]


def test_an_unknown_language(sentences: list[str]) -> None:
    with pytest.raises(UsageError, match=r"language 'klingon': expected none or one of .*finnish"):
        bm25_index(corpus_of(sentences), Bm25Settings(language="klingon"))


@pytest.mark.parametrize(
    "wrong", [{"k1": -1}, {"k1": math.nan}, {"k1": math.inf}, {"b": -0.1}, {"b": 1.1}]
)
def test_a_parameter_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(wrong))} .*: expected a number"):
        Bm25Settings(**wrong)  # type: ignore[arg-type]


def test_a_corpus_without_a_word() -> None:
    corpus = Corpus(pa.table({"id": ["p"], "title": [""], "text": ["... the !"]}))
    with pytest.raises(DataError, match="no passage of the corpus has a word"):
        bm25_index(corpus)


def test_texts_that_are_tokenised_already(sentences: list[str]) -> None:
    rows = [{"id": "p", "title": "", "text": "", "tokens": [7, 8]}]
    with pytest.raises(DataError, match="the corpus is tokenised already"):
        bm25_index(Corpus(pa.Table.from_pylist(rows, TOKENISED_SCHEMA)))
    with pytest.raises(DataError, match="query 'q' is tokenised already"):
        bm25_index(corpus_of(sentences)).search([Query("q", "", tokens=[7])], 1)


def test_bm25s_keeps_its_messages_to_itself(
    sentences: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.NOTSET):
        bm25_index(corpus_of(sentences)).search([Query("q", "")], 1)
    assert not [record for record in caplog.records if record.name == "bm25s"]
