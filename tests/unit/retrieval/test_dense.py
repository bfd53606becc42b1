"""Encoding and search in one pass, against NumPy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import CheckpointError
from mlflow_dr.retrieval import dense, encode, shard_search
from mlflow_dr.retrieval.dense import SearchRequest, dense_search, rank_candidates
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.retrieval.search import exact_scores
from mlflow_dr.stores.token_table import TokenTable, token_table

ASKED = ([0, 19, 7], [], [3], [5, 5], [19])


class Setting:
    """20 passages and 5 queries with their vectors."""

    def __init__(self, encoder: Encoder, texts: list[str]) -> None:
        self.encoder = encoder
        self.text_tokenizer = TextTokenizer.of(encoder)
        self.queries = [Query(str(number), text) for number, text in enumerate(texts[:5])]
        passages = [Passage(str(n), "", text) for n, text in enumerate(texts + texts[::-1])]
        self.table: TokenTable = token_table(self.text_tokenizer.passage_ids(passages))
        ids = token_table(self.text_tokenizer.query_ids(self.queries))
        pad = self.text_tokenizer.pad_id
        queries = encode_all(encoder.query_encoder, ids, pad).numpy()
        self.scores = queries @ encode_all(encoder, self.table, pad).numpy().T

    def search(self, k: int, asked: tuple[list[int], ...] = ()) -> SearchResult:
        rows = [np.array(rows, np.int64) for rows in asked]
        ranks = np.arange(len(self.table))
        request = SearchRequest(self.queries, k, extra_rows=rows)
        (result,) = dense_search(
            self.encoder, self.text_tokenizer, [request], self.table, ranks, quiet=True
        )
        return result


@pytest.fixture
def setting(make_tiny: Callable[..., Encoder], texts: list[str]) -> Setting:
    return Setting(make_tiny(pooling="mean", query_prompt="find "), texts)


@pytest.mark.parametrize(("chunk", "merge"), [(16384, 65536), (3, 65536), (16384, 2), (7, 3)])
def test_the_best_and_the_requested_rows_do_not_depend_on_blocks(
    setting: Setting, chunk: int, merge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(encode.TOKENS_PER_BATCH, "cpu", 40)
    monkeypatch.setattr(shard_search, "passages_per_chunk", lambda *_: chunk)
    for module in (dense, shard_search):
        monkeypatch.setattr(module, "queries_per_merge", lambda _: merge)
    found = setting.search(6, ASKED)
    assert found.rows.shape == found.scores.shape == (5, 6)
    best = -np.sort(-setting.scores, axis=1)[:, :6]
    np.testing.assert_allclose(found.scores, best, atol=1e-5)
    at_rows = np.take_along_axis(setting.scores, found.rows, axis=1)
    np.testing.assert_allclose(found.scores, at_rows, atol=1e-5)
    assert [len(scores) for scores in found.extra_scores] == [3, 0, 1, 2, 1]
    for query, asked in enumerate(ASKED):
        np.testing.assert_allclose(
            found.extra_scores[query], setting.scores[query, asked], atol=1e-5
        )


def test_no_requested_rows_give_no_extra_scores(setting: Setting) -> None:
    assert list(setting.search(3).extra_scores) == []
    assert [len(scores) for scores in setting.search(3, ([],) * 5).extra_scores] == [0] * 5


def test_k_is_limited_by_the_size_of_the_corpus(setting: Setting) -> None:
    found = setting.search(500)
    assert found.rows.shape == (5, 20)
    assert (np.sort(found.rows, axis=1) == np.arange(20)).all()


def test_queries_use_a_separate_query_encoder(
    make_tiny: Callable[..., Encoder], texts: list[str]
) -> None:
    first, second = make_tiny(seed=1), make_tiny(seed=2)
    both = Encoder(
        first.backbone, first.tokenizer, first.settings, untied_query_encoder=second
    ).eval()
    apart, alone = Setting(both, texts), Setting(first, texts)
    best = -np.sort(-apart.scores, axis=1)[:, :4]
    np.testing.assert_allclose(apart.search(4).scores, best, atol=1e-5)
    assert np.abs(apart.scores - alone.scores).max() > 0.1


def test_several_searches_of_subsets_share_one_pass(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each search gives what it gives alone, and only requested passages are encoded."""
    monkeypatch.setattr(shard_search, "passages_per_chunk", lambda *_: 4)
    ranks = np.arange(len(setting.table))
    few, other = np.array([1, 4, 6, 7, 18]), np.array([0, 4, 5])
    candidates = [np.array([3, 1, 8]), np.array([2]), np.array([], np.int64)]
    searches = [
        SearchRequest(setting.queries, 3, few),
        SearchRequest(setting.queries[:2], 10, other),
        SearchRequest(setting.queries[2:], 2, candidates=candidates),
    ]
    encoded = []
    real = shard_search.SearchShard.__call__

    def counted(self: Any, encoder: Any, table: Any, batches: Any) -> Any:
        batches = list(batches)
        encoded.extend(np.concatenate(batches).tolist())
        return real(self, encoder, table, batches)

    monkeypatch.setattr(shard_search.SearchShard, "__call__", counted)
    found = dense_search(
        setting.encoder, setting.text_tokenizer, searches, setting.table, ranks, quiet=True
    )
    assert sorted(encoded) == sorted({*few, *other, 3, 1, 8, 2})
    scores = setting.scores.round(3)  # some texts are equal
    for query in range(5):
        order = few[np.argsort(-scores[query, few], kind="stable")]
        assert found[0].rows[query].tolist() == order[:3].tolist()
    order = other[np.argsort(-scores[1, other], kind="stable")]
    assert found[1].rows.shape == (2, 3)
    assert found[1].rows[1].tolist() == order.tolist()
    own = candidates[0][np.argsort(-scores[2, candidates[0]], kind="stable")]
    assert found[2].rows.tolist() == [own[:2].tolist(), [2, -1], [-1, -1]]
    np.testing.assert_allclose(found[2].scores[0], setting.scores[2, own[:2]], atol=1e-5)


def test_equal_candidates_are_ordered_by_rank() -> None:
    found = rank_candidates(
        [np.array([4, 2, 9])], [np.array([1.0, 1.0, 1.0], np.float32)], 2, np.arange(10)[::-1]
    )
    assert found.rows.tolist() == [[9, 4]]


def test_a_requested_score_that_overflows_is_refused() -> None:
    vectors = torch.full((1, 4), 1e30)
    with pytest.raises(CheckpointError, match="overflow"):
        exact_scores(vectors, vectors, torch.tensor([0]), torch.tensor([0]))


def test_the_plan_of_a_table_is_made_once_for_all_checkpoints(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    plan = dense.plan_batches

    def counted(lengths: np.ndarray, *rest: Any) -> list[np.ndarray]:
        planned.append(len(lengths))
        return plan(lengths, *rest)

    monkeypatch.setattr(dense, "plan_batches", counted)
    table, everything = setting.table, None
    first = dense._kept_plan(table, 64, everything)
    assert dense._kept_plan(table, 64, everything) is first
    some = np.arange(3, 20)
    for rows in (some, some.copy(), some[1:], everything):
        batches = dense._kept_plan(table, 64, rows)
        expected = plan(table.lengths, 64, rows)
        assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in expected]
    assert dense._kept_plan(table, 128, everything) != batches
    assert len(planned) == 5
