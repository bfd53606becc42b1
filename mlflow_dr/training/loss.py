"""Losses, and the objective: the one place that knows temperature, negatives and processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from torch.utils.checkpoint import checkpoint

from mlflow_dr.encoder.model import at_least_fp32
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.vector_form import VectorForm
from mlflow_dr.training.flags import losses

SCORES_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from. All vectors and scores are at least fp32, and autocast is off.

    With `--negatives_x_device` the rows are those of all processes, in the order of their ranks,
    and every process computes the same loss; without it they are those of this process.

    Attributes:
        queries: `(n_queries, dim)`.
        passages: `(n_queries * group, dim)`. The passages of a query follow each other, its
            positive first; `group` is `--train_n_passages` and `--other_negatives` together.
        keys: `(n_queries * group,) int64`, equal for equal passages; None with
            `--mask_duplicates false`.
        teacher_scores: `(n_queries, group)`, a teacher's scores of each query's own passages; None
            for a loss that does not need them.
        temperature: `--temperature`.
        teacher_temperature: `--distil_temperature`.
        scores_at_once: elements of the largest score matrix that should be held at once.
    """

    queries: Tensor
    passages: Tensor
    keys: Tensor | None = None
    teacher_scores: Tensor | None = None
    temperature: float = 1.0
    teacher_temperature: float = 1.0
    scores_at_once: int = SCORES_AT_ONCE

    @property
    def positives(self) -> Tensor:
        """The row of each query's positive in `passages`, `(n_queries,) int64`."""
        group = len(self.passages) // len(self.queries)
        return torch.arange(len(self.queries), device=self.queries.device) * group

    def scores(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Scores of queries and all passages of the batch, divided by the temperature.

        Args:
            start: the first query.
            stop: the query after the last one; all when None.

        Returns:
            `(stop - start, n_queries * group)`. Other copies of a query's positive have the score
            minus infinity, if there are keys.
        """
        scores = self.queries[start:stop] @ self.passages.T / self.temperature
        if self.keys is None:
            return scores
        positives = self.positives[start:stop]
        copies = self.keys[positives][:, None] == self.keys[None, :]
        copies[torch.arange(len(positives)), positives] = False
        return scores.masked_fill(copies, -torch.inf)

    def own_scores(self) -> Tensor:
        """Scores of each query's own passages, divided by the temperature: `(n_queries, group)`."""
        own = self.passages.view(len(self.queries), -1, self.passages.shape[1])
        return torch.einsum("qd,qpd->qp", self.queries, own) / self.temperature


Loss = Callable[[LossInputs], Tensor]
"""A loss: takes the vectors of a batch and returns the mean over its queries, a scalar.

It must be a function of the vectors alone, not of the encoder. Then it works as it is with the
gradient cache (the gradient at each vector is propagated chunk by chunk) and with several
processes (gathering vectors and scaling gradients is done outside).
"""


def needs_teacher(loss: Loss) -> Loss:
    """Decorate a loss that needs `teacher_scores`; training data without them are refused."""
    loss.needs_teacher = True  # type: ignore[attr-defined]
    return loss


@losses.register("contrastive")
def contrastive(inputs: LossInputs) -> Tensor:
    """InfoNCE with the other passages of the batch as negatives.

    van den Oord et al. 2018; in-batch negatives as in DPR, Karpukhin et al. 2020. A score matrix
    of more than `scores_at_once` elements is computed in parts, forward and backward.
    """
    n_queries = len(inputs.queries)
    rows = max(1, inputs.scores_at_once // len(inputs.passages))
    if rows >= n_queries:
        return _cross_entropy(inputs, 0, n_queries) / n_queries
    total = inputs.queries.new_zeros(())
    for start in range(0, n_queries, rows):
        # computed again in the backward pass instead of being kept
        total = total + checkpoint(
            _cross_entropy, inputs, start, min(start + rows, n_queries), use_reentrant=False
        )
    return total / n_queries


def _cross_entropy(inputs: LossInputs, start: int, stop: int) -> Tensor:
    """The sum of the losses of queries `start` to `stop`."""
    return cross_entropy(inputs.scores(start, stop), inputs.positives[start:stop], reduction="sum")


@losses.register("distillation")
@needs_teacher
def distillation(inputs: LossInputs) -> Tensor:
    """Kullback-Leibler divergence from a teacher's scores, as in RocketQAv2 (Ren et al. 2021)."""
    if inputs.teacher_scores is None:
        raise UsageError("the loss 'distillation' needs a teacher's scores of the passages")
    scores = inputs.own_scores()
    wanted = softmax(inputs.teacher_scores.to(scores.dtype) / inputs.teacher_temperature, dim=1)
    return kl_div(log_softmax(scores, dim=1), wanted, reduction="batchmean")


@dataclass(frozen=True)
class Objective:
    """A loss, distillation from a teacher mixed with it, and where its negatives come from.

    Attributes:
        temperature: divides the scores.
        across_devices: passages of all processes are negatives; the gradient is that of one
            process with the whole batch.
        mask_duplicates: other copies of a query's positive in the batch are not used as negatives.
        distil_weight: weight of `distillation` in the sum, 0 to 1; the loss has the rest.
        distil_temperature: divides the teacher's scores.
        scores_at_once: elements of the largest score matrix that is held at once.
        loss: the name of a registered loss.
        matryoshka_dims: the loss is also that of so many of the first dimensions, added up; see
            `VectorForm`.
        normalize: whether vectors of fewer dimensions get length 1 again.
    """

    temperature: float = 1.0
    across_devices: bool = False
    mask_duplicates: bool = True
    distil_weight: float = 0.0
    distil_temperature: float = 1.0
    scores_at_once: int = SCORES_AT_ONCE
    loss: str = "contrastive"
    matryoshka_dims: tuple[int, ...] = ()
    normalize: bool = False

    @property
    def needs_teacher(self) -> bool:
        """Whether training data need a teacher's scores.

        Raises:
            UsageError: there is no loss of that name, or it cannot be imported.
        """
        loss = losses.get(self.loss)
        return self.distil_weight > 0 or bool(getattr(loss, "needs_teacher", False))

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
            passages: `(n_queries * group, dim)`; the positive of a query comes first of its own.
            keys: `(n_queries * group,) int64`, equal for equal passages.
            teacher: `(n_queries, group)`, a teacher's scores of each query's own passages.

        Returns:
            The mean over queries, a scalar, computed in fp32.
        """
        if self.across_devices:
            queries, passages = across(queries), across(passages)
            keys = None if keys is None else across(keys)
            teacher = None if teacher is None else across(teacher)
        inputs = LossInputs(
            at_least_fp32(queries),
            at_least_fp32(passages),
            keys if self.mask_duplicates else None,
            teacher,
            self.temperature,
            self.distil_temperature,
            self.scores_at_once,
        )
        total = inputs.queries.new_zeros(())
        with torch.autocast(queries.device.type, enabled=False):
            for dims in (None, *self.matryoshka_dims):
                form = VectorForm(dims, normalize=self.normalize)
                vectors = form.truncated(inputs.queries), form.truncated(inputs.passages)
                total = total + self._loss(replace(inputs, queries=vectors[0], passages=vectors[1]))
        return total

    def _loss(self, inputs: LossInputs) -> Tensor:
        """The loss of vectors of one number of dimensions."""
        total = inputs.queries.new_zeros(())
        if self.distil_weight < 1:
            total = (1 - self.distil_weight) * losses.get(self.loss)(inputs)
        if self.distil_weight > 0 and inputs.teacher_scores is not None:
            total = total + self.distil_weight * distillation(inputs)
        return total


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
