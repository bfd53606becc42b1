"""Reading vectors: ours and other programs', and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.vectors import open_vectors

NUMBERS = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
IDS = [f"p{number}" for number in range(50)]


def table(vectors: Any = None, ids: Any = None, **names: str) -> pa.Table:
    vectors = pa.array(list(NUMBERS), pa.list_(pa.float32(), 8)) if vectors is None else vectors
    ids = pa.array(IDS) if ids is None else ids
    return pa.table({names.get("id", "docid"): ids, names.get("vector", "vector"): vectors})


def read(path: Path, start: int = 0, stop: int = 50, size: int = 7) -> np.ndarray:
    chunks = list(open_vectors(path).chunks(start, stop, size))
    rows = [first for first, _ in chunks]
    assert rows == sorted(rows) and rows[:1] == [start][: len(rows)]
    assert all(len(chunk) <= size for _, chunk in chunks)
    return np.concatenate([chunk for _, chunk in chunks])


@pytest.mark.parametrize(
    ("vectors", "names"),
    [
        (None, {}),
        (pa.array(NUMBERS.tolist(), pa.list_(pa.float64())), {"id": "_id", "vector": "embedding"}),
        (pa.array(NUMBERS.tolist(), pa.large_list(pa.float32())), {"id": "any", "vector": "thing"}),
    ],
)
def test_parquet_of_other_programs(tmp_path: Path, vectors: Any, names: dict[str, str]) -> None:
    whole = table(vectors, **names)
    pq.write_table(whole.slice(0, 20), tmp_path / "a.parquet", row_group_size=6)
    pq.write_table(whole.slice(20), tmp_path / "b.parquet", row_group_size=6)
    opened = open_vectors(tmp_path)
    assert (len(opened), opened.dimension, opened.manifest) == (50, 8, None)
    assert opened.ids.to_pylist() == IDS
    np.testing.assert_array_equal(read(tmp_path), NUMBERS)
    np.testing.assert_array_equal(opened.read(), NUMBERS)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 6), (5, 7), (13, 41), (19, 21), (49, 50)])
def test_only_some_rows(tmp_path: Path, start: int, stop: int) -> None:
    pq.write_table(table().slice(0, 20), tmp_path / "a.parquet", row_group_size=6)
    pq.write_table(table().slice(20), tmp_path / "b.parquet", row_group_size=6)
    np.testing.assert_array_equal(read(tmp_path, start, stop), NUMBERS[start:stop])


def test_whole_numbers_are_ids(tmp_path: Path) -> None:
    pq.write_table(table(ids=pa.array(range(50))), tmp_path / "a.parquet")
    assert open_vectors(tmp_path / "a.parquet").ids.to_pylist() == [str(n) for n in range(50)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    numbers = NUMBERS.copy()
    numbers[33, 2] = value
    vectors = pa.array(list(numbers), pa.list_(pa.float32(), 8))
    pq.write_table(table(vectors), tmp_path / "a.parquet", row_group_size=6)
    with pytest.raises(DataError, match="vector of 'p33' is not finite"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", *IDS[1:48], "a", "z"], "id 'a' is used twice"),
        (["", *IDS[1:]], "a vector has no id"),
        ([None, *IDS[1:]], "a vector has no id"),
    ],
)
def test_ids_that_cannot_be_told_apart(tmp_path: Path, ids: list[str], message: str) -> None:
    pq.write_table(table(ids=pa.array(ids)), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_vectors(tmp_path)


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array([*NUMBERS[:49].tolist(), [1.0]]),
        pa.array([*NUMBERS[:49].tolist(), None]),
        pa.array([[]] * 50, pa.list_(pa.float32())),
    ],
)
def test_vectors_of_different_lengths(tmp_path: Path, vectors: pa.Array) -> None:
    pq.write_table(table(vectors), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"vectors of (different lengths|1 dimensions)"):
        read(tmp_path)


def test_files_of_different_dimensions(tmp_path: Path) -> None:
    pq.write_table(table().slice(0, 20), tmp_path / "a.parquet")
    shorter = pa.array([[1.0, 2.0]] * 30)
    pq.write_table(table(shorter, pa.array(IDS[20:])), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="of 2 dimensions; the other files have 8"):
        read(tmp_path)


def test_columns_that_cannot_be_chosen(tmp_path: Path) -> None:
    texts = {"a": pa.array(IDS), "b": pa.array(IDS), "vector": table()["vector"]}
    pq.write_table(pa.table(texts), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"one id column, called docid; it has several \(a, b\)"):
        open_vectors(tmp_path)
    pq.write_table(pa.table({"docid": pa.array(IDS)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="one vector column, called vector; it has none"):
        open_vectors(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.pkl", b"", "pickles are never read"),
        ("manifest.json", b"{}", "not a manifest of vectors"),
        ("manifest.json", b"[1", "not a manifest of vectors"),
        ("readme.txt", b"", "no vectors here"),
    ],
)
def test_folders_without_vectors(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, UsageError), match=message):
        open_vectors(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        open_vectors(tmp_path / "elsewhere")


def test_a_truncated_file(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=6)
    whole = (tmp_path / "a.parquet").read_bytes()
    middle = len(whole) // 3
    (tmp_path / "a.parquet").write_bytes(whole[:middle] + bytes(200) + whole[middle + 200 :])
    with pytest.raises(DataError, match=r"a\.parquet|cannot be read"):
        read(tmp_path)
    (tmp_path / "a.parquet").write_bytes(whole[:middle])
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_a_manifest_with_the_name_of_another_shard(tmp_path: Path) -> None:
    about = {
        **{"kind": "passages", "dataset": "d", "split": None, "texts": 1, "texts_digest": "t"},
        **{"encoder": "e", "encoder_digest": "x", "settings": {}, "dimension": 8, "rows": 0},
        **{"similarity": "dot", "dtype": "fp32", "vector_dtype": "fp32", "file_format": "npy"},
        **{"tokens_per_batch": 1, "shard": 1, "shards": 2},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="is of shard 1 of 2"):
        open_vectors(tmp_path)
