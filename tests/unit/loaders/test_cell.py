"""A cell of the study is measured in a process of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.loaders.cell import Cell, Workload, read_spec, write_spec


def test_cell_and_workload_are_read_as_they_were_written(tmp_path: Path) -> None:
    cell = Cell("memory", 2, threads=True, payload="text", prefetch=4)
    workload = Workload("store", "rows.npy", seconds=1, samples=300)
    write_spec(tmp_path / "spec.json", cell, workload)
    assert read_spec(tmp_path / "spec.json") == (cell, workload)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"payload": "vectors"}, "payload 'vectors': expected lookup, text, ids"),
        ({"start_method": "thread"}, "expected fork, spawn, forkserver"),
        ({"workers": -1}, "workers is -1; expected at least 0"),
        ({"workers": "2"}, "a value of type int"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": True}, "threads needs at least 1 worker"),
        ({"store": "tokens", "payload": "text"}, "no texts"),
        ({"ramdisk": True, "cache": "cold"}, "never cold"),
        ({"model": "tiny", "payload": "text"}, "payload ids"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(Cell(), **values)


def test_a_spec_with_an_unknown_key_or_without_a_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    for text in ("{", '{"cell": {}}', '{"cell": {"shop": "x"}, "workload": {}}'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"cannot be read|unknown key 'shop'"):
            read_spec(path)
    path.write_text('{"cell": {}, "workload": {}}')
    with pytest.raises(UsageError, match="missing"):
        read_spec(path)
