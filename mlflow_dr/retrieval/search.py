"""Exact nearest neighbours by dot product, over a corpus that streams past in chunks.

Matrix products round differently in each library, and for each size of a matrix. So a back end only
finds candidates, with a margin. The scores of candidates that may be among the best are computed
again, pair by pair. The result is the same in any chunks, and by any back end. Equal scores are
ordered by a rank that the caller gives each passage, also at the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlflow_dr import compat
from mlflow_dr.devices import is_onednn_faster
from mlflow_dr.errors import CheckpointError, MissingExtraError, UsageError
from mlflow_dr.extensions import Registry

SCORES_PER_BLOCK = {"cpu": 1 << 22, "cuda": 1 << 26}  # on a processor they fit its cache
PASSAGES_PER_PRODUCT = {"cpu": 1 << 14, "cuda": 1 << 17}  # many queries share what is read of them
PASSAGES_PER_BLOCK = 64
# a chunk has many times more passages than are kept, because each chunk is merged; a GPU waits for
# the host several times in each
FEWEST_PER_CHUNK, MOST_PER_CHUNK = {"cpu": 16384, "cuda": 65536}, 131072
RESULTS_PER_MERGE = 1 << 21
NUMBERS_PER_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}  # on a processor they fit its cache
MARGIN = 16  # candidates beyond k
MOST_CANDIDATES = 4  # times k: of more than that, the best of a chunk are chosen first
ROUNDING = 2.0**-24  # relative, of one operation in fp32
OVERFLOW = (
    "dot products of queries and passages, or lengths of their vectors, overflow fp32; the "
    "encoder's vectors are so large that its weights must be broken"
)

SearchBackend = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Finds the best k passages of a chunk of the corpus for each query.

Args, in this order:
    queries: `(n_queries, dim) float32`, on the encoder's device.
    chunk: vectors of passages, `(n, dim) float32`, on the same device; n is at most about 131,072.
    k: how many passages, 1 <= k <= n.

Returns:
    Scores (dot products) `(n_queries, k) float32` and positions in the chunk `(n_queries, k)
    int64`, on the same device, in any order. The scores may be rounded as a matrix product in fp32
    rounds. A position of -1, or a score that is not finite, ends the search with an error.

Another package adds one by `@SEARCH_BACKENDS.register("NAME")`, or by an entry point in the group
`mlflow_dr.search_backends`; `--search-backend NAME` chooses it.
"""

AUTO = "auto"
SEARCH_BACKENDS: Registry[SearchBackend] = Registry("search back end", "mlflow_dr.search_backends")


def find_backend(name: str, device: torch.device) -> SearchBackend:
    """The search back end of a name; `auto` is `torch`.

    Raises:
        UsageError: there is none of that name, or it does not run on the device.
    """
    if name == AUTO:
        name = "torch"
    if name == "faiss" and device.type != "cpu":
        raise UsageError(
            "search back end 'faiss' needs --device cpu; use 'torch' on an accelerator"
        )
    return SEARCH_BACKENDS.get(name)


def passages_per_chunk(k: int, device: torch.device) -> int:
    """How many passages should be searched at a time for the best k."""
    return min(max(FEWEST_PER_CHUNK[device.type], 128 * k), MOST_PER_CHUNK)


def queries_per_merge(k: int) -> int:
    """How many queries should be merged at a time; it takes several times their results' memory."""
    return max(64, RESULTS_PER_MERGE // max(1, k))


class TopK:
    """The best k passages of each query among the chunks seen so far.

    Args:
        n_queries: number of queries.
        k: how many to keep.
        ranks: each passage's rank among equal scores, `(n_passages,) int64`, smaller first.
        device: where scores are compared.
    """

    def __init__(
        self,
        n_queries: int,
        k: int,
        ranks: np.ndarray | Tensor,
        device: torch.device | str = "cpu",
    ) -> None:
        self._k = k
        self._ranks = torch.as_tensor(ranks, device=device)
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
        longest = torch.linalg.vector_norm(chunk, dim=1).max()
        errors = (
            (chunk.shape[1] + 2) * ROUNDING * longest * torch.linalg.vector_norm(queries, dim=1)
        )
        # whether no score overflows; a GPU is asked once, after everything else
        is_sound = errors.isfinite().all()
        floors = self._floors()
        left = torch.arange(len(queries), device=queries.device)
        if search is search_torch and self.scores.shape[1] == self._k:
            lowest = (floors - errors).masked_fill(~errors.isfinite(), torch.nan)
            most = MOST_CANDIDATES * self._k
            query_rows, positions, left, is_finite = _pairs_above(queries, chunk, lowest, most)
            scores = _pair_scores(queries, chunk, query_rows, positions)
            is_sound = is_sound & is_finite & scores.isfinite().all()
            self._merge(*_side_by_side(query_rows, scores, rows[positions]))
        self._widen(len(chunk))
        k = min(self._k, len(chunk))
        wanted = min(k + MARGIN, len(chunk))
        while len(left):
            scores, positions = search(queries[left], chunk, wanted)
            # FAISS gives position -1 where a score is NaN or minus infinity
            is_found = (positions >= 0) & scores.isfinite()
            is_open = is_found & (scores >= (floors[left] - errors[left])[:, None])
            # a passage that was not found may score as much as the last one that was, and an error
            lowest = scores.amin(dim=1) + errors[left]
            scores, is_finite = _exact_where(is_open, queries[left], chunk, positions)
            needed = torch.maximum(scores.topk(k, dim=1).values[:, -1], floors[left])
            has_overflow = ~(is_found.all(dim=1) & errors[left].isfinite())
            is_sound = is_sound & ~has_overflow.any() & is_finite
            is_done = (lowest < needed) | has_overflow | (wanted == len(chunk))
            self._merge(left[is_done], scores[is_done], rows[positions[is_done]])
            left, wanted = left[~is_done], min(2 * wanted, len(chunk))
        if not bool(is_sound):
            raise CheckpointError(OVERFLOW)

    def merge(self, scores: Tensor, rows: Tensor) -> None:
        """Merge the best passages of another part of the corpus.

        Args:
            scores: the best first, `(n_queries, n) float32`; may be kept and changed.
            rows: `(n_queries, n) int64`; may be kept and changed.
        """
        if not self.scores.shape[1]:
            self.scores, self.rows = scores, rows
            return
        floors = self._floors()
        self._widen(scores.shape[1])
        scores = scores.masked_fill(scores < floors[:, None], -torch.inf)
        self._merge(torch.arange(len(scores), device=scores.device), scores, rows)

    def _floors(self) -> Tensor:
        """The lowest score of each query's best k; minus infinity where there are fewer."""
        if self.scores.shape[1] == self._k:
            return self.scores[:, -1].clone()
        return torch.full((len(self.scores),), -torch.inf, device=self.scores.device)

    def _widen(self, n: int) -> None:
        """Make room for the passages of a chunk, up to k."""
        if added := min(n, self._k - self.scores.shape[1]):  # padding by nothing makes a copy, too
            self.scores = functional.pad(self.scores, (0, added), value=-torch.inf)
            self.rows = functional.pad(self.rows, (0, added), value=-1)

    def _merge(self, queries: Tensor, scores: Tensor, rows: Tensor) -> None:
        """Put the candidates of some queries among their best.

        Args:
            queries: `(n,) int64`.
            scores: `(n, n_candidates) float32`; minus infinity marks no candidate.
            rows: `(n, n_candidates) int64`.
        """
        counts = scores.isfinite().sum(dim=1)
        touched = counts.nonzero().flatten()
        if not len(touched):
            return
        queries, width = queries[touched], self.scores.shape[1]
        scores, columns = scores[touched].topk(int(counts.max()), dim=1)
        rows = rows[touched].gather(1, columns)
        scores = torch.cat([self.scores[queries], scores], dim=1)
        rows = torch.cat([self.rows[queries], rows], dim=1)
        order = _best_first(scores, self._ranks[rows])[:, :width]
        self.scores[queries] = scores.gather(1, order)
        self.rows[queries] = rows.gather(1, order)


def stacked(groups: list[TopK]) -> tuple[np.ndarray, np.ndarray]:
    """Rows `(n_queries, k) int64` and scores `(n_queries, k) float32` of groups of queries.

    Args:
        groups: one below the other; each is taken out of the list when it has been copied, so that
            not everything is in memory twice.
    """
    shape = sum(len(each.rows) for each in groups), groups[0].rows.shape[1]
    rows, scores, start = np.empty(shape, np.int64), np.empty(shape, np.float32), 0
    while groups:
        group = groups.pop(0)
        some = slice(start, start + len(group.rows))
        rows[some], scores[some] = group.rows.cpu().numpy(), group.scores.cpu().numpy()
        start = some.stop
    return rows, scores


def _exact_where(
    is_open: Tensor, queries: Tensor, chunk: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact scores of the candidates that may be among the best, minus infinity for the others.

    Also returns whether all exact scores are finite, `() bool`.
    """
    scores = torch.full(positions.shape, -torch.inf, device=queries.device)
    lines, columns = is_open.nonzero().unbind(1)
    exact = _pair_scores(queries, chunk, lines, positions[lines, columns])
    scores[lines, columns] = exact
    return scores, exact.isfinite().all()


def _pairs_above(
    queries: Tensor, chunk: Tensor, floors: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs whose rounded score reaches their query's floor.

    The best of each block of passages is looked at first, because most blocks have none.

    Args:
        queries: `(n_queries, dim) float32`.
        chunk: `(n, dim) float32`.
        floors: of each query, `(n_queries,) float32`; NaN for no pairs.
        most: queries with more pairs are left out.

    Returns:
        The query of each pair, ascending, and the passage's position in the chunk, `(n,) int64`;
        the queries that were left out, ascending, `(n_left_out,) int64`; and whether all scores
        are finite, `() bool`.
    """
    device = queries.device.type
    height = max(1, SCORES_PER_BLOCK[device] // PASSAGES_PER_PRODUCT[device])
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(queries), height):
        some = slice(start, start + height)
        rows, *others = _pairs_of_few(queries[some], chunk, floors[some], most)
        found.append((start + rows, *others))
    query_rows, positions, counts, are_finite = (
        torch.cat(parts) for parts in zip(*found, strict=True)
    )
    are_many = counts > most
    kept = (~are_many)[query_rows].nonzero().flatten()
    left_out = are_many.nonzero().flatten()
    return query_rows[kept], positions[kept], left_out, are_finite.all()


def _pairs_of_few(
    queries: Tensor, chunk: Tensor, floors: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `_pairs_above`; for as many queries as have their products computed at a time.

    Returns:
        The query of each pair, ascending, and the passage's position, at most `most` times the
        queries; the number of pairs of each query, `(n_queries,) int64`; and whether all its
        scores are finite, `(n_queries,) bool`.
    """
    lowest = floors[:, None].clone()
    counts = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    are_finite = torch.ones_like(counts, dtype=torch.bool)
    found: list[tuple[Tensor, Tensor]] = []
    start = 0
    for part in chunk.split(PASSAGES_PER_PRODUCT[queries.device.type]):
        scores = dot_products(queries, part)
        if missing := -len(part) % PASSAGES_PER_BLOCK:
            scores = functional.pad(scores, (0, missing), value=-torch.inf)
        blocks = scores.view(len(queries), -1, PASSAGES_PER_BLOCK)
        peaks = blocks.amax(dim=2)
        are_finite &= peaks.isfinite().all(dim=1)
        rows, numbers = (peaks >= lowest).nonzero().unbind(1)
        hits, columns = (blocks[rows, numbers] >= lowest[rows]).nonzero().unbind(1)
        rows = rows[hits]
        found.append((rows, start + numbers[hits] * PASSAGES_PER_BLOCK + columns))
        counts.index_add_(0, rows, torch.ones_like(rows))
        lowest[counts > most] = torch.nan  # no score reaches it
        start += len(part)
    query_rows, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(query_rows) > most * len(queries):  # only to save memory: it waits for a GPU
        kept = (counts <= most)[query_rows].nonzero().flatten()
        query_rows, positions = query_rows[kept], positions[kept]
    query_rows, order = query_rows.sort(stable=True)
    return query_rows, positions[order], counts, are_finite


def _side_by_side(queries: Tensor, scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of query and passage, in one line for each query.

    Args:
        queries: ascending, `(n_pairs,) int64`.
        scores: `(n_pairs,) float32`.
        rows: of the passages, `(n_pairs,) int64`.

    Returns:
        The queries that have pairs `(n,) int64`, their scores `(n, longest) float32`, filled up
        with minus infinity, and their rows `(n, longest) int64`.
    """
    present, lines, counts = queries.unique_consecutive(return_inverse=True, return_counts=True)
    if not len(present):
        return present, scores[None][:0], rows[None][:0]
    shape = len(present), int(counts.max())
    columns = torch.arange(len(lines), device=lines.device) - (counts.cumsum(0) - counts)[lines]
    side_by_side, of_rows = scores.new_full(shape, -torch.inf), rows.new_zeros(shape)
    side_by_side[lines, columns], of_rows[lines, columns] = scores, rows
    return present, side_by_side, of_rows


def exact_scores(
    queries: Tensor, passages: Tensor, query_rows: Tensor, passage_rows: Tensor
) -> Tensor:
    """Dot products of pairs; the same bits in whatever company a pair is computed.

    Products of fp32 numbers are exact in fp64, and their sum is rounded to fp32 once.

    Args:
        queries: `(n_queries, dim) float32`.
        passages: `(n_passages, dim) float32`.
        query_rows: the query of each pair, `(n,) int64`.
        passage_rows: the passage of each pair, `(n,) int64`.

    Returns:
        `(n,) float32`.

    Raises:
        CheckpointError: a product overflows fp32.
    """
    scores = _pair_scores(queries, passages, query_rows, passage_rows)
    if not bool(scores.isfinite().all()):
        raise CheckpointError(OVERFLOW)
    return scores


def _pair_scores(
    queries: Tensor, passages: Tensor, query_rows: Tensor, passage_rows: Tensor
) -> Tensor:
    """As `exact_scores`; those that overflow are infinite or NaN."""
    scores = torch.empty(len(query_rows), device=queries.device)
    size = max(1, NUMBERS_PER_BLOCK[queries.device.type] // queries.shape[1])
    for start in range(0, len(scores), size):
        pairs = slice(start, start + size)
        # twice as fast as indexing
        left = queries.index_select(0, query_rows[pairs]).double()
        right = passages.index_select(0, passage_rows[pairs]).double()
        if queries.device.type == "cpu":  # several times as fast as PyTorch's sum
            sums = np.einsum("ij,ij->i", left.numpy(), right.numpy())
            scores[pairs] = torch.from_numpy(sums).float()
        else:
            scores[pairs] = (left * right).sum(dim=1).float()
    return scores


@SEARCH_BACKENDS.register("torch")
def search_torch(queries: Tensor, chunk: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of a chunk by matrix product and top-k, on whichever device the vectors are."""
    block = max(1, SCORES_PER_BLOCK[queries.device.type] // max(1, len(chunk)))
    parts = [dot_products(part, chunk).topk(k, dim=1) for part in queries.split(block)]
    scores, positions = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(positions)


@SEARCH_BACKENDS.register("faiss")
def search_faiss(queries: Tensor, chunk: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of a chunk by FAISS' brute-force search on the processor.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    faiss = load_faiss()
    metric = faiss.METRIC_INNER_PRODUCT
    scores, positions = faiss.knn(queries.numpy(), chunk.numpy(), k, metric=metric)
    return torch.from_numpy(scores), torch.from_numpy(positions)


def dot_products(queries: Tensor, passages: Tensor) -> Tensor:
    """All dot products, rounded as fp32 does, whatever was set; TF32 would exceed the error bound.

    Args:
        queries: `(n_queries, dim) float32`.
        passages: `(n_passages, dim) float32`.

    Returns:
        `(n_queries, n_passages) float32`.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if is_onednn_faster(queries.device):
            return compat.onednn_product(queries, passages)
        return queries @ passages.T
    finally:
        torch.set_float32_matmul_precision(before)


def _best_first(scores: Tensor, ranks: Tensor) -> Tensor:
    """Columns of each line by descending score, then ascending rank, as one sort of integers.

    Args:
        scores: `(n, n_columns) float32` without NaN.
        ranks: `(n, n_columns) int64`, below 2^32.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # the sum has no -0.0
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).bitwise_left_shift_(32)
    keys = torch.sub(ranks, keys, out=keys)
    if keys.device.type == "cpu":  # several times as fast as PyTorch's sort
        return torch.from_numpy(keys.numpy().argsort(axis=1))
    return keys.argsort(dim=1)


def load_faiss() -> Any:
    """The library, which either of two packages brings.

    Raises:
        MissingExtraError: neither is installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError(
            'FAISS is not installed: pip install "mlflow_dr[cpu]" (or "mlflow_dr[gpu]"; never both)'
        ) from error
    return faiss
