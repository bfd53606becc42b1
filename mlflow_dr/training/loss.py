"""The training objective: temperature, negatives and world size have one owner, here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.checkpoint import checkpoint

from mlflow_dr.encoder.head import at_least_fp32

SCORES_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Objective:
    """Contrastive loss with in-batch and hard negatives, and distillation from a teacher.

    InfoNCE (van den Oord et al. 2018) with in-batch negatives as in DPR (Karpukhin et al. 2020);
    Kullback-Leibler divergence from a teacher's scores as in RocketQAv2 (Ren et al. 2021).

    Attributes:
        temperature: divides the scores.
        across_devices: passages of all processes are negatives, and the gradient is that of one
            process with the whole batch.
        mask_duplicates: a passage that is the query's own positive once more is no negative.
        distil_weight: the teacher's share of the loss, 0 to 1.
        distil_temperature: divides the teacher's scores.
        scores_at_once: size of the score matrix above which it is computed in parts, forward and
            backward, so that it is never held as a whole.
    """

    temperature: float = 1.0
    across_devices: bool = False
    mask_duplicates: bool = True
    distil_weight: float = 0.0
    distil_temperature: float = 1.0
    scores_at_once: int = SCORES_AT_ONCE

    def __call__(
        self,
        queries: Tensor,
        passages: Tensor,
        keys: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            queries: `(n_queries, dim)`.
            passages: `(n_queries * n_passages, dim)`; each query's positive comes first of its own.
            keys: `(n_queries * n_passages,) int64`, equal for equal passages.
            teacher: `(n_queries, n_passages)`, a teacher's scores of each query's own passages.

        Returns:
            The mean over queries, a scalar, computed in fp32.
        """
        if self.across_devices:
            queries, passages = across(queries), across(passages)
            keys = None if keys is None else across(keys)
            teacher = None if teacher is None else across(teacher)
        queries, passages = at_least_fp32(queries), at_least_fp32(passages)
        loss = queries.new_zeros(())
        with torch.autocast(queries.device.type, enabled=False):
            if self.distil_weight < 1:
                known = keys if self.mask_duplicates else None
                loss = (1 - self.distil_weight) * self._contrastive(queries, passages, known)
            if self.distil_weight > 0 and teacher is not None:
                loss = loss + self.distil_weight * self._distilled(queries, passages, teacher)
        return loss

    def _contrastive(self, queries: Tensor, passages: Tensor, keys: Tensor | None) -> Tensor:
        rows = max(1, self.scores_at_once // len(passages))
        if rows >= len(queries):
            return self._summed(queries, passages, keys, 0) / len(queries)
        total = queries.new_zeros(())
        for start in range(0, len(queries), rows):
            part = queries[start : start + rows]
            # computed again in the backward pass instead of being kept
            total = total + checkpoint(
                self._summed, part, passages, keys, start, len(queries), use_reentrant=False
            )
        return total / len(queries)

    def _summed(
        self,
        queries: Tensor,
        passages: Tensor,
        keys: Tensor | None,
        start: int,
        n_queries: int | None = None,
    ) -> Tensor:
        """The sum of the losses of queries `start` and following."""
        each = len(passages) // (n_queries or len(queries))
        scores = queries @ passages.T / self.temperature
        targets = torch.arange(start, start + len(queries), device=scores.device) * each
        if keys is not None:
            same = keys[targets][:, None] == keys[None, :]
            same[torch.arange(len(targets)), targets] = False
            scores = scores.masked_fill(same, -torch.inf)
        return cross_entropy(scores, targets, reduction="sum")

    def _distilled(self, queries: Tensor, passages: Tensor, teacher: Tensor) -> Tensor:
        own = passages.view(len(queries), -1, passages.shape[1])
        scores = torch.einsum("qd,qpd->qp", queries, own) / self.temperature
        wanted = softmax(teacher.to(scores.dtype) / self.distil_temperature, dim=1)
        return kl_div(log_softmax(scores, dim=1), wanted, reduction="batchmean")


def across(local: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; the gradient flows to our own.

    Each process computes the same loss from all rows and keeps the gradient of its own rows.
    DistributedDataParallel then takes the mean over processes where the sum is meant, so the
    gradient is multiplied by their number here, and nowhere else.

    Args:
        local: `(n, ...)`, with the same `n` in every process.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return local
    return _Across.apply(local)


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = len(local)
        local = local.contiguous()
        parts = [torch.empty_like(local) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = distributed.get_rank() * ctx.rows
        return gradients[0][start : start + ctx.rows] * distributed.get_world_size()
