"""Writing the vectors of a shard: formats, killed processes, full disks, other encoders."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mlflow_dr.errors import CheckpointError, DataError, UsageError
from mlflow_dr.retrieval import vector_writer
from mlflow_dr.retrieval.vector_manifest import VectorManifest
from mlflow_dr.retrieval.vector_writer import write_shard
from mlflow_dr.retrieval.vectors import open_vectors

NUMBERS = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
IDS = pa.chunked_array([[f"p {n}" for n in range(15)], [f"p {n}" for n in range(15, 40)]])
BATCHES = [np.random.default_rng(1).permutation(40)[start::9] for start in range(9)]

SUFFIXES = {"parquet": [".parquet"], "npy": [".npy", ".ids"]}


def about(shard: int = 0, shards: int = 1, **others: Any) -> VectorManifest:
    values = {
        **{"kind": "passages", "dataset": "d", "split": None, "texts": 40, "texts_digest": "t"},
        **{"encoder": "e", "encoder_digest": "x", "settings": {}, "dimension": 6},
        **{"similarity": "dot", "dtype": "fp32", "vector_dtype": "fp32", "file_format": "parquet"},
        **{"tokens_per_batch": 1, "shard": shard, "shards": shards, **others},
    }
    return VectorManifest(**values)


def encode(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    for rows in batches:
        yield rows, torch.from_numpy(NUMBERS[rows])


def write(folder: Path, manifest: VectorManifest | None = None, **others: Any) -> VectorManifest:
    manifest = manifest or about()
    options = {"ids": IDS, "encode": encode, **others}
    batches = BATCHES[manifest.shard :: manifest.shards]
    return write_shard(folder, manifest, batches, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
@pytest.mark.parametrize("shards", [1, 2, 7, 12])
def test_shards_have_each_vector_once(tmp_path: Path, file_format: str, shards: int) -> None:
    for shard in range(shards):
        write(tmp_path, about(shard, shards, file_format=file_format))
    opened = open_vectors(tmp_path)
    assert sorted(opened.ids.to_pylist()) == sorted(IDS.to_pylist())
    rows = [int(name.split()[1]) for name in opened.ids.to_pylist()]
    np.testing.assert_array_equal(opened.read(), NUMBERS[rows])
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".json", *SUFFIXES[file_format]}


def test_a_shard_is_in_the_order_of_the_corpus_in_files_of_limited_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_writer, "BYTES_PER_FILE", 400)
    monkeypatch.setattr(vector_writer, "BYTES_PER_GROUP", 100)
    manifest = write(tmp_path)
    assert [file.rows for file in manifest.files] == [16, 16, 8]
    tables = [pq.read_table(tmp_path / file.name) for file in manifest.files]
    whole = pa.concat_tables(tables)
    assert whole["docid"].to_pylist() == IDS.to_pylist()
    assert whole.schema.field("docid").type == pa.string()
    assert whole.schema.field("vector").type == pa.list_(pa.float32(), 6)
    np.testing.assert_array_equal(np.stack(whole["vector"].to_numpy()), NUMBERS)


def test_a_numpy_file_can_be_mapped(tmp_path: Path) -> None:
    write(tmp_path, about(file_format="npy"))
    vectors = np.load(tmp_path / "passages.npy", mmap_mode="r")
    np.testing.assert_array_equal(vectors, NUMBERS)
    assert (tmp_path / "passages.ids").read_text().splitlines() == IDS.to_pylist()


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_half_precision(tmp_path: Path, file_format: str) -> None:
    write(tmp_path, about(file_format=file_format, vector_dtype="fp16"))
    expected = NUMBERS.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(open_vectors(tmp_path).read(), expected)


def test_tevatrons_pickles_are_written_and_not_read(tmp_path: Path) -> None:
    write(tmp_path, about(file_format="tevatron"))
    vectors, ids = pickle.loads((tmp_path / "passages.pkl").read_bytes())
    np.testing.assert_array_equal(vectors, NUMBERS)
    assert ids == IDS.to_pylist()
    with pytest.raises(UsageError, match="never read"):
        open_vectors(tmp_path)


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
@pytest.mark.parametrize("after", [0, 4, 8])
def test_a_stopped_process_goes_on_with_the_same_bytes(
    tmp_path: Path, file_format: str, after: int
) -> None:
    write(tmp_path / "whole", about(file_format=file_format))
    asked: list[int] = []

    def stopping(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for number, part in enumerate(encode(batches)):
            if number == after:
                raise KeyboardInterrupt
            yield part

    def counting(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        asked.append(len(batches))
        return encode(batches)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part", about(file_format=file_format), encode=stopping)
    assert list((tmp_path / "part").glob("*.json")) == []
    write(tmp_path / "part", about(file_format=file_format), encode=counting)
    assert asked == [9 - after]
    assert files(tmp_path / "part") == files(tmp_path / "whole")


def test_a_file_that_is_cut_changed_or_gone_is_written_again_and_others_are_kept(
    tmp_path: Path,
) -> None:
    for shard in (0, 1):
        write(tmp_path, about(shard, 2))
    before = files(tmp_path)

    def refused(batches: Sequence[np.ndarray]) -> Any:
        pytest.fail("a complete shard was encoded again")

    for name in before:
        if name.endswith(".parquet"):
            whole = before[name]
            for damaged in (whole[:-1], whole[:4], b"", whole[:100] + b"X" + whole[101:], None):
                (tmp_path / name).unlink()
                if damaged is not None:
                    (tmp_path / name).write_bytes(damaged)
                shard = int(name.split("-")[1])
                write(tmp_path, about(1 - shard, 2), encode=refused)
                write(tmp_path, about(shard, 2))
                assert files(tmp_path) == before


def test_a_working_file_that_is_cut_starts_again(tmp_path: Path) -> None:
    write(tmp_path / "whole")

    def stopping(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        yield from encode(batches[:5])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part", encode=stopping)
    with (tmp_path / "part" / ".encode" / "vectors.npy").open("rb+") as file:
        file.truncate(300)
    write(tmp_path / "part")
    assert files(tmp_path / "part") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"encoder_digest": "y"}, "another encoder (e)"),
        ({"texts_digest": "u"}, "other texts (d)"),
        ({"dtype": "bf16"}, "another number format: fp32, not bf16"),
        ({"tokens_per_batch": 2}, "another number of tokens per batch"),
        ({"shards": 2}, "another number of shards: 1, not 2"),
        ({"kind": "queries", "split": "dev"}, "another kind of text"),
    ],
)
def test_vectors_of_something_else_are_not_mixed(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    write(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match=re.escape(what) + r".*--force"):
        write(tmp_path, about(**change))
    assert files(tmp_path) == before
    write(tmp_path, about(**change), replace=True)
    assert len(list(tmp_path.glob("manifest*"))) == 1


def test_unfinished_vectors_of_another_encoder_are_not_continued(tmp_path: Path) -> None:
    def stopping(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        yield from encode(batches[:5])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, encode=stopping)
    with pytest.raises(UsageError, match="unfinished vectors of another encoder"):
        write(tmp_path, about(encoder_digest="y"))
    write(tmp_path, about(encoder_digest="y"), replace=True)
    np.testing.assert_array_equal(open_vectors(tmp_path).read(), NUMBERS)


def test_nan_is_named_by_its_id(tmp_path: Path) -> None:
    def broken(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for rows, vectors in encode(batches):
            vectors[rows == 17] = torch.nan
            yield rows, vectors

    with pytest.raises(CheckpointError, match="NaN or infinity for 'p 17'"):
        write(tmp_path, encode=broken)
    assert list(tmp_path.glob("*.json")) == []


def test_a_full_disk_is_known_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, encode=lambda batches: pytest.fail("encoded"))
    monkeypatch.undo()
    write(tmp_path)


def test_two_processes_at_once_encode_a_shard_once(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        asked.append(len(batches))
        return encode(batches)

    threads = [Thread(target=write, args=(tmp_path,), kwargs={"encode": counting}) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [9]
    assert sorted(files(tmp_path)) == ["manifest.json", "passages-00000.parquet"]


def test_ids_with_any_character(tmp_path: Path) -> None:
    names = [f"{n}\t'\"\n\r 字\u2028" for n in range(39)] + ["x" * 10_000_000]
    ids = pa.chunked_array([names])
    write(tmp_path / "parquet", ids=ids)
    assert open_vectors(tmp_path / "parquet").ids.to_pylist() == names
    with pytest.raises(DataError, match=r"has a line break.*--format parquet"):
        write(tmp_path / "npy", about(file_format="npy"), ids=ids)
    names = [name.replace("\n", "") for name in names]
    write(tmp_path / "npy", about(file_format="npy"), ids=pa.chunked_array([names]))
    assert open_vectors(tmp_path / "npy").ids.to_pylist() == names


def lying(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = msgspec.json.decode(path.read_bytes())
    change(manifest)
    path.write_bytes(msgspec.json.encode(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(rows=41), "contradicts itself"),
        (lambda m: m["files"][0].update(rows=41), "contradicts itself"),
        (lambda m: m["files"][0].update(bytes=41), "bytes, not 41"),
        (lambda m: m["files"][0].update(name="other.npy"), "other.npy is missing"),
        (lambda m: m["files"][0].update(name="../other.npy"), "not a manifest of vectors"),
        (lambda m: m.update(texts=41), "40 vectors of 41 texts"),
        (lambda m: (m.update(rows=39), m["files"][0].update(rows=39)), "vectors"),
        (lambda m: m.update(dimension=5), "dimensions"),
    ],
)
def test_a_manifest_that_lies(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write(tmp_path)
    lying(change, tmp_path)
    with pytest.raises(DataError, match=message):
        open_vectors(tmp_path).read()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    for shard in (0, 2, 3):
        write(tmp_path, about(shard, 5))
    with pytest.raises(UsageError, match=r"of 5 shards 2 are missing \(1, 4\).*--shard 1/5"):
        open_vectors(tmp_path)


EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def killed_at(event: int, act: Callable[[], object]) -> bool:
    """Whether a child process that does this is killed, at its n-th operation on a file."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    left = itertools.count(event, -1)

    def hook(name: str, _: object) -> None:
        if name in EVENTS and next(left) == 0:
            os._exit(9)

    sys.addaudithook(hook)
    try:
        act()
    finally:
        os._exit(0)


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_a_process_killed_at_any_operation_on_a_file_leaves_nothing_behind(
    tmp_path: Path, file_format: str
) -> None:
    manifest = about(file_format=file_format)
    write(tmp_path / "whole", manifest)
    expected = files(tmp_path / "whole")
    for event in itertools.count():
        folder = tmp_path / str(event)
        if not killed_at(event, lambda folder=folder: write(folder, manifest)):  # type: ignore[misc]
            break
        if (folder / "manifest.json").exists():  # then all is there
            assert {name: (folder / name).read_bytes() for name in expected} == expected
        write(folder, manifest)
        assert files(folder) == expected, event
    assert event > 10
