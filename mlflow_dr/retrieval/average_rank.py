"""Average rank and NLL of questions among the passages of training examples: cheap validation.

The passages of all questions, each text once, are one pool. A question's rank is the number of
passages that score above its own positive, from 0; of passages with the same score half count.
Source: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020,
section 5; DPR's own code ranks repeated texts as often as they occur, and each process its own
part of the questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SCORES_AT_A_TIME = 1 << 26


def own_ranks(
    queries: Tensor, passages: Tensor, own: np.ndarray, as_dpr: bool = False
) -> np.ndarray:
    """The rank of each question's own passage among all passages, from 0, `(n_queries,) float64`.

    Args:
        queries: `(n_queries, dim) float32`.
        passages: the pool, `(n_passages, dim) float32`.
        own: index of each question's positive, `(n_queries,) int64`.
        as_dpr: whether the rank is the place in a sorted list, as in DPR's code, where equal scores
            stand in any order.
    """
    ranks = np.empty(len(queries))
    step = max(1, SCORES_AT_A_TIME // max(1, len(passages)))
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ passages.T
        columns = torch.from_numpy(own[start : start + step]).to(scores.device)
        if as_dpr:
            order = scores.sort(dim=1, descending=True).indices
            ranks[start : start + step] = (order == columns[:, None]).int().argmax(1).cpu().numpy()
            continue
        positive = scores.gather(1, columns[:, None])
        above = (scores > positive).sum(dim=1)
        equal = (scores == positive).sum(dim=1) - 1
        ranks[start : start + step] = (above + 0.5 * equal).cpu().numpy()
    return ranks


def batch_nll(
    queries: Tensor, passages: Tensor, rows: Sequence[np.ndarray], size: int
) -> np.ndarray:
    """The loss of each question in a batch, `(n_queries,) float64`: DPR's, with its negatives.

    Each question's passages and those of the other questions of its batch compete, repeats
    included.

    Args:
        queries: `(n_queries, dim) float32`.
        passages: `(n_passages, dim) float32`.
        rows: of each question its positive and then its negatives, `(n_own,) int64`.
        size: questions of a batch; the last one may have fewer.
    """
    losses = np.empty(len(queries))
    for start in range(0, len(queries), size):
        some = rows[start : start + size]
        starts = np.cumsum([0, *map(len, some)])[:-1]
        scores = queries[start : start + size] @ passages[np.concatenate(some)].T
        target = torch.from_numpy(starts).to(scores.device)
        loss = torch.nn.functional.cross_entropy(scores, target, reduction="none")
        losses[start : start + size] = loss.double().cpu().numpy()
    return losses
