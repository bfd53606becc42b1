"""FAISS indexes of vectors on disk, in pyserini's layout, and what their approximation costs.

An index is a folder with the files `index` (FAISS's) and `docid` (the id of each passage, on a
line), which pyserini's `FaissSearcher` reads, and `manifest.json`. Each build is compared with
exact search, on queries that it was not trained on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mlflow_dr.errors import DataError, UsageError, quoted
from mlflow_dr.files import atomic_write, file_sha256, is_full
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.search import TopK, load_faiss, search_faiss
from mlflow_dr.retrieval.vectors import Vectors

INDEX, IDS, MANIFEST = "index", "docid", "manifest.json"
PRESETS = {
    "exact": "Flat",
    "fast": "IVF{n},PQ{m}x4fs,Refine(SQfp16)",
    "small": "IVF{n},PQ{m}x4fs,Refine(SQ8)",
}
"""FAISS's factory strings by our names, for `{n}` clusters and `{m}` parts of a vector.

Of 4 bits for each part, FAISS scans many vectors at a time; the best are scored again in fp16.
"""
FEWEST_CLUSTERED = 10_000  # with fewer passages, a flat index is as fast
CUT_OFFS = (10, 100)
MOST_QUERIES = 1000
TIES = 100  # passages beyond the cut that are looked at for scores equal to the last one
PASSAGES_PER_CHUNK = 16384
FEWEST_TRAINED = 1 << 16
TRAINED_PER_CLUSTER = 64
CLUSTERS_PER_ROOT = 2  # of the number of passages
MOST_CLUSTERS = 1 << 16
REFINED = (4, 8, 16, 32)  # times as many candidates as wanted that are scored again
PLATEAU = 0.001  # of recall, from twice the effort
WORTHWHILE = 0.75  # of the clusters, for twice as many candidates that are scored again
FAISS_ERROR = re.compile(
    r"Error in .*? at \S+:\d+: (?:Error: )?(?:'.*?' failed: (?=\S))?(.*)", re.S
)
NOT_A_LINE = r"[\r\n]|[^!-~]\z|^\z"


class HeldOutQueries:
    """Queries with their exact results, against which an index is compared.

    Args:
        vectors: of the queries, `(n_queries, dim) float32`.
        own_rows: the row of each query, where queries are passages themselves, else -1,
            `(n_queries,) int64`. A query's own row does not count as a result.
        n_passages: in the collection.
    """

    def __init__(self, vectors: np.ndarray, own_rows: np.ndarray, n_passages: int) -> None:
        self.vectors = vectors
        self._own_rows = own_rows
        depth = min(n_passages, max(CUT_OFFS) + 1 + TIES)
        self._best = TopK(len(vectors), depth, np.arange(n_passages))
        self._seconds = 0.0

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def exact_seconds(self) -> float:
        """Seconds of FAISS' exact search for each query, all queries at once."""
        return self._seconds / len(self)

    def update(self, chunk: np.ndarray, start: int) -> None:
        """Search a chunk of the collection exactly.

        Args:
            chunk: `(n, dim) float32`.
            start: its first row.
        """
        if not len(self):
            return
        rows = torch.arange(start, start + len(chunk))
        queries, passages = torch.from_numpy(self.vectors), torch.from_numpy(chunk)
        self._best.update(queries, passages, rows, search_faiss)
        begun = time.perf_counter()
        search_faiss(queries, passages, min(max(CUT_OFFS), len(chunk)))
        self._seconds += time.perf_counter() - begun

    def recall(self, found: np.ndarray, k: int) -> float:
        """The share of the best k passages that were found.

        A passage that scores as much as the k-th counts like it.

        Args:
            found: rows of each query, the best first, `(n_queries, > k) int64`; -1 for none.
            k: the cut-off.
        """
        own = self._own_rows[:, None]
        rows, scores = self._best.rows.numpy(), self._best.scores.numpy()
        others, mine = rows != own, (found >= 0) & (found != own)
        counts = np.minimum(others.sum(axis=1), k)
        if not counts.sum():
            return math.nan
        is_last = others & (np.cumsum(others, axis=1) == counts[:, None])
        last = np.where(is_last, scores, np.inf).min(axis=1, keepdims=True)
        right = np.where(others & (scores >= last), rows, -1)
        mine &= np.cumsum(mine, axis=1) <= counts[:, None]
        hits = (found[:, :, None] == right[:, None, :]).any(axis=2) & mine
        return float(hits.sum() / counts.sum())


def build_index(
    vectors: Vectors,
    output: Path,
    factory: str,
    queries: np.ndarray | None = None,
    recall: float = 0.99,
    seed: int = 0,
) -> dict[str, Any]:
    """Build an index of all vectors into a new folder, which is complete or absent.

    The vectors are read twice, chunk by chunk; the index itself is in memory.

    Args:
        vectors: of the passages.
        output: the folder, which does not exist yet.
        factory: a name in `PRESETS`, or FAISS's factory string. Similarity is the inner product.
        queries: vectors of queries to measure on, `(n, dim) float32`. When None, passages that are
            kept out of training.
        recall: recall@10 and @100 up to which more clusters, or neighbours, are searched.
        seed: of the passages that are trained and measured on.

    Returns:
        The manifest.

    Raises:
        UsageError: the folder exists, or FAISS refuses the factory string.
        DataError: there are no passages, an id that a line cannot hold, or vectors with NaN or
            infinity.
    """
    if os.path.lexists(output):
        raise UsageError(f"{output}: exists already; remove it, or choose another --output")
    if not len(vectors):
        raise DataError("there are no vectors to index")
    check_docids(vectors.ids)
    drawn = draw_rows(len(vectors), seed) if queries is None else np.empty(0, np.int64)
    if queries is not None and len(queries) > MOST_QUERIES:
        queries = np.random.default_rng(seed).permutation(queries)[:MOST_QUERIES]
    chosen, index = new_index(factory, vectors.dimension, len(vectors))
    with atomic_write(output) as folder, refusals(chosen), disk_errors(folder.parent):
        folder.mkdir()
        test, n_trained = fill(index, vectors, drawn, queries, seed)
        manifest = {
            "factory": chosen,
            "similarity": "dot",
            "dimension": vectors.dimension,
            "passages": len(vectors),
            "faiss": load_faiss().__version__,
            "settings": tune(index, test, recall) if len(test) else {},
            "trained_on": n_trained,
            "seed": seed,
            "queries": len(test),
            "queries_are": "passages" if queries is None else "given",
            **measure(index, test),
            "vectors": {
                "digest": vectors.digest,
                "manifest": msgspec.to_builtins(vectors.manifest),
            },
        }
        load_faiss().write_index(index, str(folder / INDEX))
        write_docids(vectors.ids, folder / IDS)
        manifest["files"] = {
            name: {"size": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            for name in (INDEX, IDS)
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def fill(
    index: Any, vectors: Vectors, drawn: np.ndarray, queries: np.ndarray | None, seed: int
) -> tuple[HeldOutQueries, int]:
    """Train an index, add all vectors, and search them exactly.

    Args:
        index: an empty one.
        vectors: of the passages.
        drawn: rows of passages that stand for queries, `(n,) int64`; they are not trained on.
        queries: vectors of queries instead, `(n, dim) float32`.
        seed: of the sample that is trained on.

    Returns:
        The queries with their exact results, and the number of passages that were trained on.
    """
    sample = training_rows(index, len(vectors), drawn, seed)
    known = rows_of(vectors, np.concatenate([drawn, sample]))
    if len(sample):
        index.train(known[len(drawn) :])
    if queries is None:
        test = HeldOutQueries(known[: len(drawn)].copy(), drawn, len(vectors))
    else:
        test = HeldOutQueries(queries, np.full(len(queries), -1), len(vectors))
    del known
    for start, chunk in all_chunks(vectors, "adding vectors"):
        index.add(chunk)
        test.update(chunk, start)
    return test, len(sample)


def new_index(factory: str, dimension: int, n_passages: int) -> tuple[str, Any]:
    """An empty index, and the FAISS factory string that made it.

    Args:
        factory: a name in `PRESETS`, or a factory string.
        dimension: of the vectors.
        n_passages: how many there are.
    """
    faiss = load_faiss()
    preset = PRESETS.get(factory, factory)
    if factory in PRESETS and n_passages < FEWEST_CLUSTERED:
        preset = PRESETS["exact"]
    clusters = min(CLUSTERS_PER_ROOT * math.isqrt(n_passages), MOST_CLUSTERS)
    parts = max(size for size in range(1, dimension // 2 + 2) if dimension % size == 0)
    chosen = preset.replace("{n}", str(clusters)).replace("{m}", str(parts))
    with refusals(factory):
        return chosen, faiss.index_factory(dimension, chosen, faiss.METRIC_INNER_PRODUCT)


def draw_rows(n_passages: int, seed: int) -> np.ndarray:
    """Rows of the passages that stand for queries, `(n,) int64`: at most a tenth of all."""
    count = min(MOST_QUERIES, max(1, n_passages // 10)) if n_passages > 1 else 0
    return np.random.default_rng(seed).choice(n_passages, count, replace=False)


def training_rows(index: Any, n_passages: int, excluded: np.ndarray, seed: int) -> np.ndarray:
    """Rows that an index is trained on, `(n,) int64`; none if it needs no training."""
    if index.is_trained:
        return np.empty(0, np.int64)
    ivf = load_faiss().try_extract_index_ivf(index)
    wanted = max(FEWEST_TRAINED, TRAINED_PER_CLUSTER * ivf.nlist if ivf else 0)
    count = min(n_passages, wanted + len(excluded))
    rows = np.random.default_rng([seed, 1]).choice(n_passages, count, replace=False)
    return rows[~np.isin(rows, excluded)][:wanted]


def rows_of(vectors: Vectors, rows: np.ndarray) -> np.ndarray:
    """Some vectors in the order of `rows`, `(len(rows), dim) float32`, read in one pass."""
    order = np.argsort(rows)
    ascending = rows[order]
    gathered = np.empty((len(rows), vectors.dimension), np.float32)
    if not len(rows):
        return gathered
    for start, chunk in all_chunks(vectors, "reading a sample"):
        first, last = np.searchsorted(ascending, (start, start + len(chunk)))
        gathered[order[first:last]] = chunk[ascending[first:last] - start]
    return gathered


def all_chunks(vectors: Vectors, description: str) -> Iterator[tuple[int, np.ndarray]]:
    """The first row and the vectors of each chunk, `(n, dim) float32`, with a progress bar."""
    with progress_bar(len(vectors), description, "vectors") as bar:
        for start, chunk in vectors.chunks(0, len(vectors), PASSAGES_PER_CHUNK):
            yield start, np.array(chunk)  # those of Arrow are read-only
            bar.update(len(chunk))


def tune(index: Any, test: HeldOutQueries, target: float) -> dict[str, int]:
    """Set how much of an index is searched, so that a recall is reached at the least cost.

    FAISS stores the settings with the index, so that pyserini searches with them.

    Args:
        index: with all vectors.
        test: the queries.
        target: recall at each cut-off.

    Returns:
        The settings by FAISS's names: `nprobe` clusters or `efSearch` neighbours are searched, and
        `k_factor_rf` times as many passages as wanted are scored again by finer vectors.
    """
    faiss = load_faiss()
    space = faiss.ParameterSpace()
    space.initialize(index)
    ranges = space.parameter_ranges
    names = {ranges.at(position).name for position in range(ranges.size())}
    ivf = faiss.try_extract_index_ivf(index)
    limits = {"nprobe": (1, ivf.nlist if ivf else 1), "efSearch": (max(CUT_OFFS), index.ntotal)}
    settings: dict[str, int] = {}

    def recall_with(name: str, value: int) -> float:
        space.set_index_parameter(index, name, value)
        settings[name] = value
        return min(recalls(index, test))

    efforts = sorted(names & limits.keys())
    best: dict[str, int] = {}
    for factor in REFINED if "k_factor_rf" in names else (0,):
        reached = recall_with("k_factor_rf", factor) if factor else 0.0
        for name in efforts:
            reached = least_effort(partial(recall_with, name), *limits[name], target)
        if best and any(settings[name] > WORTHWHILE * best[name] for name in efforts):
            break
        if reached >= target:
            best = dict(settings)
            if not efforts:
                break
    for name, value in best.items():
        recall_with(name, value)
    return settings


def least_effort(recall_at: Callable[[int], float], first: int, limit: int, target: float) -> float:
    """Find the least value that reaches a recall, or beyond which recall no longer grows.

    Args:
        recall_at: sets a value and gives the recall, which does not fall as the value grows.
        first: the least value.
        limit: the largest value.
        target: the recall.

    Returns:
        The recall with the value that was set last.
    """
    low, high, before = first - 1, first, -1.0
    reached = recall_at(high)
    while reached < target and high < limit and reached - before > PLATEAU:
        low, high, before = high, min(2 * high, limit), reached
        reached = recall_at(high)
    if reached < target:
        return reached
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        if (got := recall_at(middle)) >= target:
            high, reached = middle, got
        else:
            low = middle
    return recall_at(high)


def measure(index: Any, test: HeldOutQueries) -> dict[str, Any]:
    """Recall at each cut-off, and seconds for a query at depth 100, all queries at once.

    The values are None if there are no queries.
    """
    names = [f"recall_at_{k}" for k in CUT_OFFS]
    if not len(test):
        return dict.fromkeys([*names, "seconds", "exact_seconds"])
    values = recalls(index, test)
    begun = time.perf_counter()
    index.search(test.vectors, max(CUT_OFFS))
    return {
        **dict(zip(names, values, strict=True)),
        "seconds": (time.perf_counter() - begun) / len(test),
        "exact_seconds": test.exact_seconds,
        "threads": load_faiss().omp_get_max_threads(),
    }


def recalls(index: Any, test: HeldOutQueries) -> list[float]:
    """Recall at each cut-off, of a search to that depth: refinement depends on the depth."""
    values = []
    for k in CUT_OFFS:
        _, found = index.search(test.vectors, k + 1)
        values.append(test.recall(found, k))
    return values


def check_docids(ids: pa.Array | pa.ChunkedArray) -> None:
    """Refuse ids that are not a line of pyserini's `docid` file, which it strips at the end.

    Raises:
        DataError: an id is empty, has a line break, or ends in white space.
    """
    for name in pc.unique(ids.filter(pc.match_substring_regex(ids, NOT_A_LINE))).to_pylist():
        if not name or name != name.rstrip() or re.search(r"[\r\n]", name):
            raise DataError(
                f"passage id {quoted(name)}: an index keeps each id on a line, as pyserini reads "
                "it, so an id cannot be empty, have a line break, or end in white space; rename it"
            )


def write_docids(ids: pa.Array | pa.ChunkedArray, path: Path) -> None:
    """Write each id on a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for start in range(0, len(ids), PASSAGES_PER_CHUNK):
            names = ids.slice(start, PASSAGES_PER_CHUNK).to_pylist()
            file.write("".join(f"{name}\n" for name in names))


@contextmanager
def refusals(factory: str) -> Iterator[None]:
    """FAISS's errors as ours, in its own words."""
    try:
        yield
    except RuntimeError as error:
        found = FAISS_ERROR.search(str(error))
        if not found:
            raise
        words = " ".join(found[1].split())
        raise UsageError(f"--factory {quoted(factory)}: FAISS says: {words}") from error


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """FAISS's error about a full disk as Python's."""
    try:
        yield
    except RuntimeError as error:
        if not is_full(error, directory):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from error
