"""The token table: ids by row, padding, and the table in the cache."""

import mmap
import multiprocessing as mp
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import mlflow_dr.encoder.token_table as token_table_module
from mlflow_dr.encoder.token_table import cached_token_table
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.errors import DataError
from mlflow_dr.stores.token_table import TokenTable, map_table, token_table

ROWS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]


def lengths_as_ids(group: Sequence[str]) -> list[list[int]]:
    return [[len(word) for word in text.split()] for text in group]


def cached(key: str = "key", vocabulary_size: int = 100, texts: object = None) -> TokenTable:
    groups = [["a bb ccc", "dddd"], ["ee f"], ["g hh iii jjjj"]] if texts is None else texts
    return cached_token_table(key, groups, lengths_as_ids, vocabulary_size, total=4)


def rows_of(table: TokenTable) -> list[list[int]]:
    return [table[row].tolist() for row in range(len(table))]


def test_rows_come_back_as_they_were() -> None:
    table = token_table(ROWS)
    assert len(table) == 4
    assert rows_of(table) == ROWS
    assert table.lengths.tolist() == [3, 1, 2, 4]


def padded(table: TokenTable, rows: np.ndarray, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts side by side, and which places are their tokens."""
    ids, lengths = table.packed(rows)
    texts = PackedTexts.of(lengths.tolist(), torch.device("cpu"))
    side_by_side, is_token = texts.side_by_side(torch.from_numpy(ids))
    return side_by_side.where(is_token, pad_id), is_token


def test_rows_are_padded_at_the_right_in_the_order_asked_for() -> None:
    ids, mask = padded(token_table(ROWS), np.array([2, 0, 2]), pad_id=99)
    assert ids.tolist() == [[9, 10, 99], [5, 6, 7], [9, 10, 99]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert ids.dtype == torch.int64


def test_padding_stays_inside_the_table_at_its_end() -> None:
    ids, mask = padded(token_table([[1, 2, 3], [4]]), np.array([1, 0]), pad_id=0)
    assert ids.tolist() == [[4, 0, 0], [1, 2, 3]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_the_cached_table_equals_one_in_memory() -> None:
    table = cached()
    assert rows_of(table) == [[1, 2, 3], [4], [2, 1], [1, 2, 3, 4]]
    assert table.lengths.tolist() == [3, 1, 2, 4]
    ids, _ = padded(table, np.array([1, 2]), pad_id=0)
    assert ids.tolist() == [[4, 0], [2, 1]]


def test_a_cached_table_is_opened_by_its_reference_in_another_process() -> None:
    table = cached()
    reference = pickle.loads(pickle.dumps(table.reference))
    opened = reference.open()
    assert opened is not None
    assert rows_of(opened) == rows_of(table)
    assert token_table(ROWS).reference is None


def test_a_spread_table_is_opened_by_its_reference() -> None:
    table = cached().spread(np.array([1, 3, 5, 7]), 9)
    assert table.reference is not None
    opened = table.reference.open()
    assert opened is not None
    assert rows_of(opened) == rows_of(table)


def test_a_reference_to_a_missing_or_damaged_table_opens_nothing(own_cache: Path) -> None:
    reference = cached().reference
    assert reference is not None
    (ids,) = own_cache.rglob("ids.bin")
    ids.write_bytes(b"x" * 20)
    assert reference.open() is None
    assert reference._replace(entry="0" * 64).open() is None


@pytest.mark.parametrize("vocabulary_size", [100, 1 << 17])
def test_a_part_has_the_tokens_of_its_rows_and_no_file(vocabulary_size: int) -> None:
    table = cached(vocabulary_size=vocabulary_size).spread(np.array([1, 3, 5, 7]), 9)
    part = pickle.loads(pickle.dumps(table.part(np.array([7, 1, 5]))))
    rows = np.array([5, 7, 1])
    for array, other in zip(part.packed(rows), table.packed(rows), strict=True):
        np.testing.assert_array_equal(array, other)
    assert part.reference is None
    assert part.directory is None


def test_texts_are_tokenised_once_for_each_key() -> None:
    first = cached("one")
    again = cached("one", texts=(pytest.fail("read again") for _ in range(1)))
    assert rows_of(first) == rows_of(again)
    assert rows_of(cached("two", texts=[["zz"]])) == [[2]]


def test_a_cached_table_is_sent_as_its_path() -> None:
    """Also one that has more rows than its files."""
    table = cached_token_table("key", [["t"]], lambda _: [range(9999)], 1 << 15, total=1)
    assert len(table[0].tobytes()) > 1000
    for sent in (table, table.spread(np.array([2]), 4)):
        copy = pickle.dumps(sent)
        assert len(copy) < 1000
        assert rows_of(pickle.loads(copy)) == rows_of(sent)


def test_a_table_in_memory_is_sent_with_its_tokens() -> None:
    assert rows_of(pickle.loads(pickle.dumps(token_table(ROWS)))) == ROWS


def test_many_rows_are_read_at_once() -> None:
    for table in (
        token_table(ROWS),
        cached(texts=[["a", "b c", "d"]]).spread(np.array([3, 1, 0]), 5),
    ):
        rows = [3, 0, 3, 1]
        assert [ids.tolist() for ids in table.get_many(rows)] == [rows_of(table)[r] for r in rows]
        assert table.get_many([]) == []


@pytest.mark.parametrize("file", ["ids.bin", "offsets.npy"])
def test_a_file_that_was_cut_off_is_an_error(own_cache: Path, file: str) -> None:
    directory = cached().directory
    assert directory is not None
    content = (directory / file).read_bytes()
    (directory / file).write_bytes(content[:-3])
    with pytest.raises(DataError, match="not the undamaged files of a token table"):
        map_table(directory)


def test_ids_are_mapped_not_read() -> None:
    """As a plain array, because slices of `np.memmap` are slow."""
    ids = cached()._ids
    assert type(ids) is np.ndarray
    assert isinstance(ids.base, memoryview) and isinstance(ids.base.obj, mmap.mmap)


@pytest.mark.parametrize(("vocabulary_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_where_that_is_enough(vocabulary_size: int, dtype: str) -> None:
    largest = vocabulary_size - 1
    table = cached_token_table("key", [["t"]], lambda _: [[0, largest]], vocabulary_size, total=1)
    assert table[0].dtype == dtype
    assert table[0].tolist() == [0, largest]


def test_interrupted_tokenising_leaves_no_files(own_cache: Path) -> None:
    def breaks_off():  # type: ignore[no-untyped-def]
        yield ["a bb"]
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cached(texts=breaks_off())
    assert [path.suffix for path in (own_cache / "tokens").iterdir()] == [".lock"]
    assert len(cached()) == 4


GROUPS = [[b"ab", b"c"], [b"def"], [b"g", b"hi"], [b"jkl", b""], [b"m"], [b"no"]]
"""Bytes are their own ids; a process of its own can import `list`."""


def with_processes(key: str, processes: int) -> tuple[TokenTable, int]:
    """A table, and the number of processes when the last group was read."""
    workers = []

    def groups() -> Iterator[list[bytes]]:
        for group in GROUPS:
            yield group
            workers.append(len(mp.active_children()))

    table = cached_token_table(key, groups(), list, 256, total=9, processes=processes)
    return table, workers[-1]


def test_processes_tokenise_in_the_order_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table_module, "TEXTS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(token_table_module, "usable_cores", lambda: 2)
    table, workers = with_processes("many", 12)
    assert workers == 2
    assert rows_of(table) == [list(text) for group in GROUPS for text in group]


@pytest.mark.parametrize(("processes", "cores", "worth"), [(1, 2, 1), (12, 1, 1), (12, 2, 5)])
def test_no_process_is_started_for_little_text(
    monkeypatch: pytest.MonkeyPatch, processes: int, cores: int, worth: int
) -> None:
    """One requested process, one core, or too few texts for two processes."""
    monkeypatch.setattr(token_table_module, "TEXTS_WORTH_A_PROCESS", worth)
    monkeypatch.setattr(token_table_module, "usable_cores", lambda: cores)
    table, workers = with_processes("few", processes)
    assert workers == 0
    assert rows_of(table) == [list(text) for group in GROUPS for text in group]


SCRIPT = """
print("here", flush=True)
import mlflow_dr.encoder.token_table as module
module.TEXTS_WORTH_A_PROCESS = 1
module.usable_cores = lambda: 2
texts = [[b"ab", b"c"], [b"def"]]
print(len(module.cached_token_table("script", texts, list, 256, total=3, processes=2)))
"""


def test_processes_do_not_run_the_script_that_asks_for_a_table(tmp_path: Path) -> None:
    """The script has no `if __name__ == "__main__"`, and it holds the lock of the table."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.stdout, done.stderr) == ("here\n3\n", "")


def test_a_process_that_may_not_start_others_tokenises_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_table_module, "TEXTS_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(token_table_module, "usable_cores", lambda: 2)
    monkeypatch.setitem(mp.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    table, _ = with_processes("daemon", 2)
    assert len(table) == 9
