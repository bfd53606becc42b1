"""The contrastive loss with in-batch and hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def contrastive_loss(queries: Tensor, passages: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query's positive against all passages of the batch.

    InfoNCE (van den Oord et al. 2018) with in-batch negatives as in DPR (Karpukhin et al. 2020).

    Args:
        queries: `(n_queries, dim)`.
        passages: `(n_queries * n_passages, dim)`; each query's positive comes first among its own.
        temperature: divides the scores.

    Returns:
        The mean loss, a scalar, computed in fp32.
    """
    each = len(passages) // len(queries)
    scores = queries.float() @ passages.float().T / temperature
    targets = torch.arange(len(queries), device=scores.device) * each
    return cross_entropy(scores, targets)
