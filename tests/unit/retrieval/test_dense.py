"""Encoding and search in one pass, against NumPy."""

from collections.abc import Callable

import numpy as np
import pytest

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.retrieval import dense, encode
from mlflow_dr.retrieval.dense import search_corpus
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.ranking import Found
from mlflow_dr.stores.token_table import TokenTable, token_table

ASKED = ([0, 19, 7], [], [3], [5, 5], [19])


class Setting:
    """20 passages and 5 queries with their vectors."""

    def __init__(self, encoder: Encoder, texts: list[str]) -> None:
        self.encoder = encoder
        self.tokenizing = Tokenizing(encoder.tokenizer, encoder.settings)
        self.queries = [Query(str(number), text) for number, text in enumerate(texts[:5])]
        passages = [Passage(str(n), "", text) for n, text in enumerate(texts + texts[::-1])]
        self.table: TokenTable = token_table(self.tokenizing.passage_ids(passages))
        ids = token_table(self.tokenizing.query_ids(self.queries))
        pad = self.tokenizing.pad_id
        queries = encode_all(encoder.for_queries, ids, pad).numpy()
        self.scores = queries @ encode_all(encoder, self.table, pad).numpy().T

    def search(self, k: int, asked: tuple[list[int], ...] = ()) -> Found:
        rows = [np.array(one, np.int64) for one in asked]
        ranks = np.arange(len(self.table))
        return search_corpus(
            self.encoder, self.tokenizing, self.queries, self.table, ranks, k, rows, quiet=True
        )


@pytest.fixture
def setting(make_tiny: Callable[..., Encoder], texts: list[str]) -> Setting:
    return Setting(make_tiny(pooling="mean", query_prompt="find "), texts)


@pytest.mark.parametrize(("chunk", "merge"), [(16384, 65536), (3, 65536), (16384, 2), (7, 3)])
def test_the_best_and_what_is_asked_for_whatever_the_blocks(
    setting: Setting, chunk: int, merge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encode.TOKENS_PER_BATCH, "cpu", 40)
    monkeypatch.setattr(dense, "PASSAGES_PER_CHUNK", chunk)
    monkeypatch.setattr(dense, "QUERIES_PER_MERGE", merge)
    found = setting.search(6, ASKED)
    assert found.rows.shape == found.scores.shape == (5, 6)
    best = -np.sort(-setting.scores, axis=1)[:, :6]
    np.testing.assert_allclose(found.scores, best, atol=1e-5)
    at_rows = np.take_along_axis(setting.scores, found.rows, axis=1)
    np.testing.assert_allclose(found.scores, at_rows, atol=1e-5)
    assert [len(one) for one in found.also] == [3, 0, 1, 2, 1]
    for place, asked in enumerate(ASKED):
        np.testing.assert_allclose(found.also[place], setting.scores[place, asked], atol=1e-5)


def test_nothing_is_asked_for(setting: Setting) -> None:
    assert list(setting.search(3).also) == []
    assert [len(one) for one in setting.search(3, ([],) * 5).also] == [0] * 5


def test_no_more_passages_than_there_are(setting: Setting) -> None:
    found = setting.search(500)
    assert found.rows.shape == (5, 20)
    assert (np.sort(found.rows, axis=1) == np.arange(20)).all()


def test_queries_that_have_an_encoder_of_their_own(
    make_tiny: Callable[..., Encoder], texts: list[str]
) -> None:
    one, other = make_tiny(seed=1), make_tiny(seed=2)
    both = Encoder(one.backbone, one.tokenizer, one.settings, query_tower=other).eval()
    apart, alone = Setting(both, texts), Setting(one, texts)
    best = -np.sort(-apart.scores, axis=1)[:, :4]
    np.testing.assert_allclose(apart.search(4).scores, best, atol=1e-5)
    assert np.abs(apart.scores - alone.scores).max() > 0.1
