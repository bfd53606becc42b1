"""Indexes: what pyserini reads, what is measured, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.faiss_index import (
    PRESETS,
    HeldOutQueries,
    build_index,
    check_docids,
    draw_rows,
    least_effort,
    new_index,
)
from mlflow_dr.retrieval.vectors import Vectors, open_vectors

faiss = pytest.importorskip("faiss")
MakeVectors = Callable[..., Vectors]


@pytest.fixture
def make_vectors(tmp_path: Path) -> MakeVectors:
    """A function from vectors to a folder of them, opened."""

    def make(array: np.ndarray, ids: list[str] | None = None) -> Vectors:
        folder = tmp_path / "vectors"
        folder.mkdir()
        flat = pa.array(array.astype(np.float32).ravel(), pa.float32())
        columns = {
            "docid": pa.array(ids or [f"d{row}" for row in range(len(array))], pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(flat, array.shape[1]),
        }
        pq.write_table(pa.table(columns), folder / "vectors.parquet", row_group_size=700)
        return open_vectors(folder)

    return make


def clustered(n: int, dimension: int = 16, seed: int = 0) -> np.ndarray:
    """Vectors of length 1 around 40 centres, `(n, dimension) float32`."""
    centres = np.random.default_rng(40).standard_normal((40, dimension))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(40, size=n)] + 0.5 * rng.standard_normal((n, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def read_as_pyserini(directory: Path) -> tuple[faiss.Index, list[str]]:
    """An index as pyserini's `FaissSearcher.load_index` reads it."""
    index = faiss.read_index(str(directory / "index"))
    with (directory / "docid").open() as file:
        ids = [line.rstrip() for line in file.readlines()]
    assert index.ntotal == len(ids)
    return index, ids


@pytest.mark.parametrize("factory", ["exact", "fast", "small", "HNSW16", "IVF8,SQ8,RFlat"])
def test_pyserini_finds_the_nearest_passages_in_an_index(
    factory: str, make_vectors: MakeVectors, tmp_path: Path
) -> None:
    array = clustered(10_000 if factory in PRESETS else 3000, 64)
    ids = [f"id {row}" for row in range(len(array))]
    manifest = build_index(make_vectors(array, ids), tmp_path / "index", factory)

    index, read_ids = read_as_pyserini(tmp_path / "index")
    assert read_ids == ids
    queries = clustered(50, 64, seed=1)
    _, found = index.search(queries, 10)
    best = np.argsort(-queries @ array.T, axis=1)[:, :10]
    recall = np.mean([np.isin(mine, right) for mine, right in zip(found, best, strict=True)])
    assert recall >= 0.9
    assert manifest["recall_at_10"] >= 0.9
    assert manifest == json.loads((tmp_path / "index" / "manifest.json").read_text())


def test_the_exact_index_finds_everything_and_reads_in_one_pass_what_it_measures(
    make_vectors: MakeVectors, tmp_path: Path
) -> None:
    manifest = build_index(make_vectors(clustered(500)), tmp_path / "index", "exact")

    assert (manifest["factory"], manifest["trained_on"], manifest["queries"]) == ("Flat", 0, 50)
    assert manifest["recall_at_10"] == manifest["recall_at_100"] == 1
    assert manifest["seconds"] > 0
    assert manifest["exact_seconds"] > 0


def test_settings_that_reach_the_recall_are_stored_in_the_index(
    make_vectors: MakeVectors, tmp_path: Path
) -> None:
    vectors = make_vectors(clustered(4000))
    thorough = build_index(vectors, tmp_path / "thorough", "IVF64,Flat", recall=0.999)
    quick = build_index(vectors, tmp_path / "quick", "IVF64,Flat", recall=0.5)

    assert quick["settings"]["nprobe"] < thorough["settings"]["nprobe"]
    assert min(thorough["recall_at_10"], thorough["recall_at_100"]) >= 0.999
    assert 0.999 > min(quick["recall_at_10"], quick["recall_at_100"]) >= 0.5
    index, _ = read_as_pyserini(tmp_path / "quick")
    assert faiss.extract_index_ivf(index).nprobe == quick["settings"]["nprobe"]


def test_the_same_seed_gives_the_same_bytes(make_vectors: MakeVectors, tmp_path: Path) -> None:
    vectors = make_vectors(clustered(2000))
    for name in ("first", "second"):
        build_index(vectors, tmp_path / name, "IVF20,PQ8x4fs,RFlat", seed=3)

    for file in ("index", "docid"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_given_queries_are_measured_on(make_vectors: MakeVectors, tmp_path: Path) -> None:
    queries = clustered(70, seed=5)
    manifest = build_index(make_vectors(clustered(1000)), tmp_path / "index", "fast", queries)

    assert (manifest["queries"], manifest["queries_are"]) == (70, "given")
    assert manifest["factory"] == "Flat"  # of all presets, where there are few passages
    assert manifest["recall_at_100"] == 1


@pytest.mark.parametrize(("dimension", "parts"), [(384, 192), (7, 1), (9, 3), (1, 1), (10, 5)])
def test_presets_fit_any_dimension(dimension: int, parts: int) -> None:
    factory, index = new_index("fast", dimension, 1_000_000)
    assert factory == f"IVF2000,PQ{parts}x4fs,Refine(SQfp16)"
    assert index.d == dimension


def test_held_out_passages_are_not_trained_on() -> None:
    drawn = draw_rows(30_000, seed=0)
    assert len(set(drawn.tolist())) == len(drawn) == 1000
    assert len(draw_rows(300, seed=0)) == 30


@pytest.mark.parametrize("factory", ["exact", "fast", "small"])
@pytest.mark.parametrize("count", [1, 2, 5, 60])
def test_a_few_passages_are_enough(
    count: int, factory: str, make_vectors: MakeVectors, tmp_path: Path
) -> None:
    manifest = build_index(make_vectors(clustered(count)), tmp_path / "index", factory)

    _, ids = read_as_pyserini(tmp_path / "index")
    assert len(ids) == manifest["passages"] == count
    assert manifest["recall_at_100"] == (None if count == 1 else 1.0)


def test_a_passage_that_scores_as_much_as_the_last_counts_like_it() -> None:
    passages = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    test = HeldOutQueries(passages[:1], np.array([0]), len(passages))
    test.update(passages, 0)

    assert test.recall(np.array([[0, 3, 4]]), 2) == 1  # rows 1 to 4 are the same
    assert test.recall(np.array([[0, 3, -1]]), 2) == 0.5
    assert test.recall(np.array([[0, 7, 9]]), 2) == 0


def test_the_least_effort_that_reaches_a_recall_is_found() -> None:
    tried: list[int] = []

    def recall_at(value: int) -> float:
        tried.append(value)
        return min(1.0, value / 11)

    assert least_effort(recall_at, 1, 1000, 0.99) == 1
    assert tried[-1] == 11
    assert least_effort(recall_at, 1, 8, 0.99) == 8 / 11
    assert least_effort(lambda value: 0.7, 1, 1 << 40, 0.99) == 0.7


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nonsense", "FAISS says: could not parse index string nonsense"),
        ("PQ7", "dimension of the vector .d. should be a multiple"),
        ("IVF500,Flat", "training points .* at least as large as number of clusters .500."),
        ("LSH", "METRIC_L2"),
        ("IDMap,Flat", "add_with_ids"),
    ],
)
def test_what_faiss_refuses_is_said_in_its_words(
    factory: str, message: str, make_vectors: MakeVectors, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"--factory '{factory}': .*{message}"):
        build_index(make_vectors(clustered(100)), tmp_path / "out" / "index", factory)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["", "a\nb", "a\rb", "a ", "a\u3000", "a\t", "é\x85"])
def test_an_id_that_is_no_line_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="on a line"):
        check_docids(pa.chunked_array([["fine", name]], pa.string()))


def test_other_ids_are_read_back_as_they_are(make_vectors: MakeVectors, tmp_path: Path) -> None:
    ids = ["a b", " x", "a\tb", "é", "\u3000x", "a\u2028b", "x" * 100_000, "1", "文"]
    build_index(make_vectors(clustered(len(ids)), ids), tmp_path / "index", "exact")

    assert read_as_pyserini(tmp_path / "index")[1] == ids


def test_nan_is_refused_by_id_and_leaves_nothing(make_vectors: MakeVectors, tmp_path: Path) -> None:
    array = clustered(1500)
    array[1200, 3] = np.nan
    vectors = make_vectors(array)
    with pytest.raises(DataError, match="'d1200'"):
        build_index(vectors, tmp_path / "out" / "index", "fast")
    assert not list((tmp_path / "out").glob("*"))


def test_a_folder_that_exists_is_kept(make_vectors: MakeVectors, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        build_index(make_vectors(clustered(10)), tmp_path / "index", "fast")


def test_a_full_disk_is_an_error_of_the_disk(
    make_vectors: MakeVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = make_vectors(clustered(100))
    write = faiss.write_index
    monkeypatch.setattr(faiss, "write_index", lambda index, path: write(index, "/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        build_index(vectors, tmp_path / "out" / "index", "exact")
    assert not list((tmp_path / "out").glob("*"))
