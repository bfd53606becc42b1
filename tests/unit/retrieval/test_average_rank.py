"""Average rank and NLL against loops that share no code with them."""

import math

import numpy as np
import pytest
import torch

from mlflow_dr.retrieval import average_rank
from mlflow_dr.retrieval.average_rank import batch_nll, own_ranks
from mlflow_dr.retrieval.measures import OF_POOL, Measure, of_pool, parse_measures
from mlflow_dr.tracking.validations import LOWER_IS_BETTER, Metric


def test_ranks_count_half_of_the_passages_with_the_same_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(average_rank, "SCORES_AT_A_TIME", 30)
    chance = np.random.default_rng(0)
    queries, passages = (chance.integers(-1, 2, (n, 3)).astype(np.float32) for n in (9, 14))
    own = chance.integers(0, 14, 9)
    expected = []
    for query, row in zip(queries, own, strict=True):
        scores = passages @ query
        others = np.delete(scores, row)
        expected.append((others > scores[row]).sum() + (others == scores[row]).sum() / 2)
    tensors = torch.from_numpy(queries), torch.from_numpy(passages)
    assert own_ranks(*tensors, own).tolist() == expected
    for rank, half, query, row in zip(
        own_ranks(*tensors, own, as_dpr=True), expected, queries, own, strict=True
    ):
        ties = (passages @ query == passages[row] @ query).sum() - 1
        assert abs(rank - half) <= ties / 2


def test_the_loss_is_over_the_passages_of_a_batch() -> None:
    chance = np.random.default_rng(1)
    queries, passages = (chance.normal(size=(n, 4)).astype(np.float32) for n in (5, 9))
    rows = [np.array(some) for some in ([0, 1], [2], [3, 1, 4], [5, 8], [7])]
    tensors = torch.from_numpy(queries), torch.from_numpy(passages)
    losses = batch_nll(*tensors, rows, 2)
    for start in (0, 2, 4):
        batch = range(start, min(start + 2, 5))
        for number in batch:
            scores = [float(queries[number] @ passages[r]) for b in batch for r in rows[b]]
            own = float(queries[number] @ passages[rows[number][0]])
            expected = math.log(sum(map(math.exp, scores))) - own
            assert losses[number] == pytest.approx(expected, abs=1e-5)


def test_names_of_measures_of_a_pool() -> None:
    measures = parse_measures("Average_Rank@30 nll_at_16")
    assert measures == ("average_rank@30", "nll@16")
    assert [measure.name for measure in measures] == list(OF_POOL) == list(LOWER_IS_BETTER)
    assert of_pool(measures)
    assert not of_pool(parse_measures("mrr@10 precision(rel=2)@5"))
    assert [Metric("val", Measure(m).metric).sign for m in (*measures, "ndcg@10")] == [-1, -1, 1]
