"""One suite for every search: what comes out is what sorting all scores would give."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mlflow_dr.errors import CheckpointError, MissingExtraError, UsageError
from mlflow_dr.retrieval import search
from mlflow_dr.retrieval.search import (
    MOST_CANDIDATES,
    PASSAGES_PER_PRODUCT,
    SCORES_PER_BLOCK,
    SearchBackend,
    TopK,
    dot_products,
    find_backend,
    passages_per_chunk,
    queries_per_merge,
    search_faiss,
    search_torch,
)
from tests.counted_waits import CountedWaits


class Backend(NamedTuple):
    """A search back end and where its vectors are."""

    search: SearchBackend
    device: str


@pytest.fixture(
    params=[
        pytest.param(Backend(search_faiss, "cpu"), id="faiss"),
        pytest.param(Backend(search_torch, "cpu"), id="torch"),
        pytest.param(Backend(search_torch, "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    if chosen.search is search_faiss:
        pytest.importorskip("faiss")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return chosen


def brute_force(
    queries: np.ndarray, corpus: np.ndarray, k: int, ranks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All scores in fp64, sorted by descending score and ascending rank."""
    scores = queries.astype(np.float64) @ corpus.astype(np.float64).T
    order = np.stack([np.lexsort((ranks, -line)) for line in scores])[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def found(
    backend: Backend,
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int,
    ranks: np.ndarray,
    chunks: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The same by a stream of chunks, each an array of rows."""
    put = torch.from_numpy(queries).to(backend.device)
    top = TopK(len(queries), k, ranks, backend.device)
    for rows in chunks if chunks is not None else [np.arange(len(corpus))]:
        vectors = torch.from_numpy(corpus[rows]).to(backend.device)
        top.update(put, vectors, torch.from_numpy(rows).to(backend.device), backend.search)
    return top.scores.cpu().numpy(), top.rows.cpu().numpy()


def split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def real_vectors(n_queries: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n_queries * 1000 + n)
    queries, corpus = rng.standard_normal((n_queries, 16)), rng.standard_normal((n, 16))
    return queries.astype(np.float32), corpus.astype(np.float32), rng.permutation(n)


def tied_vectors(n_queries: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole numbers, so that sums are exact, and few of them: hundreds of equal scores."""
    rng = np.random.default_rng(n_queries * 1000 + n)
    queries, corpus = rng.integers(-1, 2, (n_queries, 4)), rng.integers(-1, 2, (n, 4))
    return queries.astype(np.float32), corpus.astype(np.float32), rng.permutation(n)


# FAISS searches by matrix products from 20 queries on, by single products below
N_QUERIES = [1, 3, 19, 20, 25]


@pytest.mark.parametrize("n_queries", N_QUERIES)
def test_the_best_of_real_scores(backend: Backend, n_queries: int) -> None:
    queries, corpus, ranks = real_vectors(n_queries, 700)
    scores, rows = found(backend, queries, corpus, 50, ranks, split(np.arange(700), 128))
    expected_scores, expected_rows = brute_force(queries, corpus, 50, ranks)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4, atol=1e-5)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("n_queries", N_QUERIES)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_equal_scores_are_ordered_by_rank_also_at_the_cut(
    backend: Backend, n_queries: int, k: int
) -> None:
    queries, corpus, ranks = tied_vectors(n_queries, 700)
    scores, rows = found(backend, queries, corpus, k, ranks)
    expected_scores, expected_rows = brute_force(queries, corpus, k, ranks)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


@pytest.mark.parametrize("size", [1, 7, 64, 699, 700, 10_000])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_result_does_not_depend_on_chunks_or_their_order(
    backend: Backend, size: int, shuffled: bool
) -> None:
    queries, corpus, ranks = tied_vectors(25, 700)
    rows = np.random.default_rng(size).permutation(700) if shuffled else np.arange(700)
    scores, best = found(backend, queries, corpus, 20, ranks, split(rows, size))
    expected_scores, expected_rows = brute_force(queries, corpus, 20, ranks)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(best, expected_rows)


@pytest.mark.parametrize("n_queries", [1, 25])
@pytest.mark.parametrize(("k", "size"), [(30, 8), (50, 50), (51, 50), (100, 50), (100, 7)])
def test_k_larger_than_a_chunk_or_than_the_corpus(
    backend: Backend, n_queries: int, k: int, size: int
) -> None:
    queries, corpus, ranks = tied_vectors(n_queries, 50)
    scores, rows = found(backend, queries, corpus, k, ranks, split(np.arange(50), size))
    expected_scores, expected_rows = brute_force(queries, corpus, k, ranks)
    assert rows.shape == (n_queries, min(k, 50))
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("n_queries", [1, 25])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_more_duplicates_than_k(backend: Backend, n_queries: int, k: int) -> None:
    """The same passage hundreds of times: the best ranks win, wherever they stand."""
    rng = np.random.default_rng(k)
    queries = rng.integers(-2, 3, (n_queries, 4)).astype(np.float32)
    corpus = np.repeat([[1.0, 2.0, 0.0, 1.0]], 500, axis=0).astype(np.float32)
    corpus[::50] = 0
    ranks = rng.permutation(500)
    for chunks in (split(np.arange(500), 500), split(rng.permutation(500), 90)):
        _, rows = found(backend, queries, corpus, k, ranks, chunks)
        np.testing.assert_array_equal(rows, brute_force(queries, corpus, k, ranks)[1])


@pytest.mark.parametrize("n_queries", [1, 25])
def test_scores_have_the_same_bits_in_any_chunks(backend: Backend, n_queries: int) -> None:
    """Matrix products round differently for each shape, so copies of a passage might not tie."""
    rng = np.random.default_rng(n_queries)
    queries = rng.standard_normal((n_queries, 384)).astype(np.float32)
    corpus = rng.standard_normal((2000, 384)).astype(np.float32)
    corpus[1600:] = corpus[:400]  # a fifth are copies
    ranks = rng.permutation(2000)
    expected = brute_force(queries, corpus, 401, ranks)
    for chunks in (
        split(np.arange(2000), 2000),
        split(np.arange(2000), 37),
        split(rng.permutation(2000), 501),
    ):
        scores, rows = found(backend, queries, corpus, 401, ranks, chunks)
        np.testing.assert_array_equal(rows, expected[1])
        np.testing.assert_array_equal(scores, expected[0].astype(np.float32))


def test_all_scores_equal(backend: Backend) -> None:
    queries, corpus = np.ones((25, 4), np.float32), np.ones((300, 4), np.float32)
    ranks = np.random.default_rng(0).permutation(300)
    _, rows = found(backend, queries, corpus, 7, ranks, split(np.arange(300), 100))
    assert rows.tolist() == [np.argsort(ranks)[:7].tolist()] * 25


@pytest.mark.parametrize("n_queries", [1, 25])
def test_negative_scores_are_scores(backend: Backend, n_queries: int) -> None:
    queries = np.ones((n_queries, 4), np.float32)
    corpus = -np.arange(1, 41, dtype=np.float32).reshape(10, 4)
    scores, rows = found(backend, queries, corpus, 20, np.arange(10), split(np.arange(10), 3))
    assert rows.tolist() == [list(range(10))] * n_queries
    np.testing.assert_array_equal(scores, queries @ corpus.T)


def test_queries_do_not_disturb_one_another(backend: Backend) -> None:
    queries, corpus, ranks = tied_vectors(25, 300)
    together = found(backend, queries, corpus, 10, ranks)
    for number in range(25):
        alone = found(backend, queries[number : number + 1], corpus, 10, ranks)
        np.testing.assert_array_equal(alone[1][0], together[1][number])


@pytest.mark.parametrize("n_queries", [1, 25])
@pytest.mark.parametrize("value", [-1e30, 1e30, math.nan])
def test_scores_that_overflow_never_become_a_passage(
    backend: Backend, n_queries: int, value: float
) -> None:
    """FAISS marks such a place with -1, which as a row would be the last passage."""
    queries = np.full((n_queries, 4), 1e30, np.float32)
    corpus = np.zeros((6, 4), np.float32)
    corpus[2] = value
    with pytest.raises(CheckpointError, match="overflow"):
        found(backend, queries, corpus, 6, np.arange(6))


def test_blocks_of_queries_are_put_together_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SCORES_PER_BLOCK, "cpu", 700)
    monkeypatch.setitem(PASSAGES_PER_PRODUCT, "cpu", 70)
    queries, corpus, ranks = tied_vectors(25, 300)
    for chunks in (None, split(np.arange(300), 70), split(np.arange(300), 150)):
        _, rows = found(Backend(search_torch, "cpu"), queries, corpus, 10, ranks, chunks)
        np.testing.assert_array_equal(rows, brute_force(queries, corpus, 10, ranks)[1])


def test_few_scores_are_computed_again_even_if_each_chunk_is_better_than_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with an encoder whose vectors depend on the length of texts, which orders batches."""
    monkeypatch.setitem(PASSAGES_PER_PRODUCT, "cpu", 256)
    queries, corpus, ranks = real_vectors(25, 4096)
    k, size = 10, 1024
    queries[5:] += 8  # the first five have few candidates
    corpus[:, :] += np.linspace(0, 4, len(corpus), dtype=np.float32)[:, None]
    exact, computed = search._pair_scores, []

    def counted(*pairs: torch.Tensor) -> torch.Tensor:
        computed.append(len(pairs[2]))
        return exact(*pairs)

    monkeypatch.setattr(search, "_pair_scores", counted)
    chunks = split(np.arange(len(corpus)), size)
    _, rows = found(Backend(search_torch, "cpu"), queries, corpus, k, ranks, chunks)
    np.testing.assert_array_equal(rows, brute_force(queries, corpus, k, ranks)[1])
    assert sum(computed) < len(chunks) * len(queries) * (MOST_CANDIDATES * k)


def test_a_gpu_is_waited_for_a_few_times_in_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES_PER_BLOCK, "cpu", 10 * PASSAGES_PER_PRODUCT["cpu"])
    queries, corpus, ranks = real_vectors(25, 4096)  # three blocks of queries
    top = TopK(len(queries), 10, ranks)
    for rows in split(np.arange(len(corpus)), 2048):
        vectors = torch.from_numpy(queries), torch.from_numpy(corpus[rows])
        with CountedWaits() as counted:
            top.update(*vectors, torch.from_numpy(rows), search_torch)
    # for pairs: two for each block, and which are kept; to merge: queries and numbers of pairs
    assert counted.waits == (3 * 2 + 2) + 4 + 1  # and once for whether anything overflowed


@pytest.mark.parametrize("value", [3e38, float("nan")])
def test_an_overflow_in_a_later_chunk_is_refused(backend: Backend, value: float) -> None:
    queries, corpus, ranks = real_vectors(25, 300)
    corpus[200, :2] = value, -value
    queries[3, :2] = 3e38
    with pytest.raises(CheckpointError, match="overflow"):
        found(backend, queries, corpus, 5, ranks, split(np.arange(300), 100))


def test_an_overflow_is_refused_after_one_look(backend: Backend) -> None:
    """Else more and more passages would be asked for, up to the whole chunk."""
    queries, corpus, ranks = real_vectors(25, 300)
    asked: list[int] = []

    def search(
        queries: torch.Tensor, chunk: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(k)
        return backend.search(queries, chunk, k)

    corpus[:, :2] = 3e38, -3e38
    with pytest.raises(CheckpointError, match="overflow"):
        found(Backend(search, backend.device), queries, corpus, 5, ranks)
    assert len(asked) == 1


def test_no_memory_is_filled_with_pairs_that_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queries for which each passage is better than the one before, and of an overflow."""
    monkeypatch.setitem(PASSAGES_PER_PRODUCT, "cpu", 256)
    queries, chunk, _ = real_vectors(25, 4096)
    queries[5:], chunk[:, 0] = np.eye(16, dtype=np.float32)[0], np.linspace(0, 4, 4096)
    for factor in (1.0, 1e20):
        vectors = torch.from_numpy(queries) * factor, torch.from_numpy(chunk) * factor
        rows, _, left, is_finite = search._pairs_above(*vectors, torch.ones(25), 40)
        assert len(rows) <= 25 * 40
        assert bool(is_finite) == (factor == 1.0)
        assert left.tolist()[-20:] == list(range(5, 25))


@pytest.mark.parametrize("is_onednn", [True, False])
def test_products_are_fp32_whatever_was_set(
    is_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "is_onednn_faster", lambda device: is_onednn)
    queries, corpus = (torch.from_numpy(vectors) for vectors in real_vectors(25, 300)[:2])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = dot_products(queries, corpus)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    exact = queries.double() @ corpus.double().T
    sizes = queries.double().norm(dim=1)[:, None] * corpus.double().norm(dim=1)
    assert bool(((found - exact).abs() <= queries.shape[1] * 2.0**-24 * sizes).all())


def test_deep_rankings_have_large_chunks_and_small_groups() -> None:
    depths = (0, 10, 100, 1000, 9999)
    for device, fewest in (("cpu", 16384), ("cuda", 65536)):
        sizes = [passages_per_chunk(k, torch.device(device)) for k in depths]
        assert sizes == [fewest, fewest, fewest, 128_000, 131_072]
    assert all(k * queries_per_merge(k) <= 1 << 21 for k in (10, 1000, 10_000))
    assert queries_per_merge(10**6) == 64


def test_the_search_of_each_device() -> None:
    assert find_backend("auto", torch.device("cpu")) is search_torch
    assert find_backend("auto", torch.device("cuda:0")) is search_torch
    assert find_backend("torch", torch.device("cpu")) is search_torch
    with pytest.raises(UsageError, match="'faiss' needs --device cpu"):
        find_backend("faiss", torch.device("cuda"))
    with pytest.raises(UsageError, match="unknown search back end 'fais'; did you mean 'faiss'"):
        find_backend("fais", torch.device("cpu"))


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    queries, corpus, ranks = tied_vectors(1, 10)
    with pytest.raises(MissingExtraError, match=r"mlflow_dr\[cpu\]"):
        found(Backend(search_faiss, "cpu"), queries, corpus, 1, ranks)
