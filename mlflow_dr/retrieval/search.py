"""Exact nearest neighbours by dot product, over a corpus that streams past in chunks.

Equal scores are ordered by a rank that the caller gives each passage, also at the cut, so that the
result does not depend on how the corpus was split into chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.errors import CheckpointError, MissingExtraError, UsageError
from mlflow_dr.extensions import Registry

SCORES_PER_BLOCK = 1 << 26
OVERFLOW = (
    "dot products of queries and passages overflow fp32; the encoder's vectors are so large that "
    "its weights must be broken"
)

SearchBackend = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]
"""Finds the best k passages of a chunk of the corpus for each query, exactly.

Args, in this order:
    queries: `(n_queries, dim) float32`, on the encoder's device.
    chunk: vectors of passages, `(n, dim) float32`, on the same device; n is at most about 16,384.
    k: how many passages, 1 <= k <= n.
    ranks: order of passages whose scores are equal, `(n,) int64`: the smaller rank comes first,
        also when only some of the passages with the k-th score belong to the best k.

Returns:
    Scores (dot products) `(n_queries, k) float32` and positions in the chunk `(n_queries, k)
    int64`, on the same device. Their order does not matter: the caller sorts them by score and
    rank. A position of -1, or a score that is not finite, ends the search with an error.

Another package adds one by `@SEARCH_BACKENDS.register("NAME")`, or by an entry point in the group
`mlflow_dr.search_backends`; `--search-backend NAME` chooses it.
"""

AUTO = "auto"
SEARCH_BACKENDS: Registry[SearchBackend] = Registry("search back end", "mlflow_dr.search_backends")


def find_backend(name: str, device: torch.device) -> SearchBackend:
    """The search back end of a name; `auto` is FAISS on the processor and torch elsewhere.

    Raises:
        UsageError: there is none of that name, or it does not run on the device.
    """
    if name == AUTO:
        name = "faiss" if device.type == "cpu" else "torch"
    if name == "faiss" and device.type != "cpu":
        raise UsageError(
            "search back end 'faiss' needs --device cpu; use 'torch' on an accelerator"
        )
    return SEARCH_BACKENDS.get(name)


class TopK:
    """The best k passages of each query among the chunks seen so far.

    Args:
        n_queries: number of queries.
        k: how many to keep.
        ranks: each passage's rank among equal scores, `(n_passages,) int64`, smaller first.
        device: where scores are compared.
    """

    def __init__(
        self, n_queries: int, k: int, ranks: np.ndarray, device: torch.device | str = "cpu"
    ) -> None:
        self._k = k
        self._ranks = torch.from_numpy(ranks).to(device)
        self.scores = torch.empty(n_queries, 0, device=device)
        self.rows = torch.empty(n_queries, 0, dtype=torch.int64, device=device)

    def update(self, queries: Tensor, chunk: Tensor, rows: Tensor, search: SearchBackend) -> None:
        """Search one chunk of the corpus, and merge the result.

        Args:
            queries: `(n_queries, dim) float32`.
            chunk: `(n, dim) float32`.
            rows: the chunk's row numbers in the corpus, `(n,) int64`.
            search: the back end.

        Raises:
            CheckpointError: the scores overflow.
        """
        scores, places = search(queries, chunk, min(self._k, len(chunk)), self._ranks[rows])
        # FAISS gives position -1 where a score is NaN or minus infinity
        if bool((places < 0).any()) or not bool(scores.isfinite().all()):
            raise CheckpointError(OVERFLOW)
        self._merge(scores, rows[places])

    def _merge(self, scores: Tensor, rows: Tensor) -> None:
        scores = torch.cat([self.scores, scores], dim=1)
        rows = torch.cat([self.rows, rows], dim=1)
        order = _best_first(scores, self._ranks[rows])[:, : self._k]
        self.scores = scores.gather(1, order)
        self.rows = rows.gather(1, order)


@SEARCH_BACKENDS.register("torch")
def search_torch(queries: Tensor, chunk: Tensor, k: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The best k of a chunk by matrix product and top-k, on whichever device the vectors are."""
    block = max(1, SCORES_PER_BLOCK // max(1, len(chunk)))
    parts = [_block_top(part, chunk, k, ranks) for part in queries.split(block)]
    scores, places = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(places)


def _block_top(queries: Tensor, chunk: Tensor, k: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
    scores = queries @ chunk.T
    best, places = scores.topk(min(k + 1, len(chunk)), dim=1)
    unclear = _cut_through_equals(best, k)
    best, places = best[:, :k], places[:, :k]
    if len(unclear):
        order = _best_first(scores[unclear], ranks.expand(len(unclear), -1))[:, :k]
        best[unclear] = scores[unclear].gather(1, order)
        places[unclear] = order
    return best, places


@SEARCH_BACKENDS.register("faiss")
def search_faiss(queries: Tensor, chunk: Tensor, k: int, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The best k of a chunk by FAISS' brute-force search on the processor.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    faiss = _faiss()
    wanted = min(k + 1, len(chunk))
    texts, base = queries.numpy(), chunk.numpy()
    scores, indices = faiss.knn(texts, base, wanted, metric=faiss.METRIC_INNER_PRODUCT)
    best, places = torch.from_numpy(scores), torch.from_numpy(indices)
    unclear = _cut_through_equals(best, k)
    best, places = best[:, :k].clone(), places[:, :k].clone()
    while len(unclear):
        wanted = min(2 * wanted, len(chunk))
        scores, indices = faiss.knn(
            texts[unclear.numpy()], base, wanted, metric=faiss.METRIC_INNER_PRODUCT
        )
        wide, wide_places = torch.from_numpy(scores), torch.from_numpy(indices)
        order = _best_first(wide, ranks[wide_places])[:, :k]
        best[unclear] = wide.gather(1, order)
        places[unclear] = wide_places.gather(1, order)
        # a query whose last column still has the k-th score may have more of them beyond it
        cut = wide[:, k - 1] == wide[:, -1] if wanted < len(chunk) else torch.zeros(0).bool()
        unclear = unclear[cut] if len(cut) else unclear[:0]
    return best, places


def _cut_through_equals(best: Tensor, k: int) -> Tensor:
    """Queries whose k-th and (k+1)-th score are equal, so that the ranks must decide."""
    if best.shape[1] <= k:
        return torch.empty(0, dtype=torch.int64)
    return (best[:, k - 1] == best[:, k]).nonzero().flatten()


def _best_first(scores: Tensor, ranks: Tensor) -> Tensor:
    """Columns of each line by descending score, then ascending rank."""
    by_rank = ranks.argsort(dim=1)
    by_score = scores.gather(1, by_rank).argsort(dim=1, descending=True, stable=True)
    return by_rank.gather(1, by_score)


def _faiss():  # type: ignore[no-untyped-def]
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            'FAISS is not installed: pip install "mlflow_dr[cpu]" (or "mlflow_dr[gpu]"; never both)'
        ) from error
    return faiss
