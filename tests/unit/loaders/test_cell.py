"""A cell of the study is measured in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.errors import ChildError, DataError, UsageError
from mlflow_dr.loaders.cell import (
    Cell,
    Workload,
    end_process,
    message_of,
    read_spec,
    write_spec,
)
from mlflow_dr.loaders.feed import Feed
from mlflow_dr.loaders.measuring import measured
from mlflow_dr.loaders.page_cache import RAM_DISK, ram_disk


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


PARTS = ("lookup", "tokenize", "collate", "transfer", "main", "sampler")
HOST_PARTS = ("next", "to_device", "forward", "backward", "optimizer", "other")
TICK = 0.01


def check_parts(figures: dict[str, Any], processes: int) -> None:
    parts = sum(figures[f"cpu_{part}_s"] for part in PARTS)
    assert parts == pytest.approx(figures["cpu_s"], rel=1e-6)
    ticks = 2 * TICK * processes  # of user and system time, which /proc rounds down
    assert parts == pytest.approx(figures["cpu_tree_s"], rel=0.03, abs=ticks)


@pytest.mark.parametrize(
    ("cell", "processes"),
    [
        (Cell("memory", payload="lookup"), 1),
        (Cell("lookup", 2, threads=True, payload="ids"), 1),
        (Cell("lookup", 2, payload="ids", prefetch=1), 3),
        (Cell("lookup", payload="text", ramdisk=True), 1),
        (Cell("lookup", payload="lookup", cache="cold"), 1),
    ],
    ids=lambda value: f"{value.store} {value.payload}" if isinstance(value, Cell) else "",
)
def test_cpu_time_of_the_parts_is_that_of_the_processes(
    cell: Cell, processes: int, workload: Workload
) -> None:
    figures = measured(cell, workload)
    made_ahead = cell.workers * cell.prefetch
    assert figures["batches"] == 50 - 1 - made_ahead
    assert figures["samples"] == 8 * figures["batches"]
    assert figures["samples_per_s"] == figures["samples"] / figures["wall_s"]
    check_parts(figures, processes)
    assert figures["cpu_lookup_s"] > 0
    assert (figures["cpu_tokenize_s"] > 0) == (cell.payload == "ids")
    assert (figures["cpu_transfer_s"] > 0) == (cell.workers > 0)
    assert figures["wait_p50_ms"] <= figures["wait_p99_ms"] <= figures["wait_p999_ms"]
    assert figures["epoch_stall_s"] > 0
    assert figures["private_peak_mb"] >= figures["private_start_mb"] > 0
    assert figures["memory_series"][0][0] == 8
    assert figures["memory_series"][-1][0] == 400
    assert not [name for name, value in figures.items() if value != value]


@pytest.mark.parametrize("ranker", ["bi", "cross"])
def test_times_of_the_host_s_parts_are_those_of_the_steps(ranker: str, workload: Workload) -> None:
    cell = Cell("lookup", 1, threads=True, model=workload.tokenizer, ranker=ranker)
    figures = measured(cell, workload)
    parts = [figures[f"host_{part}_s"] for part in HOST_PARTS]
    assert sum(parts) == pytest.approx(figures["host_wall_s"], rel=0.02)
    assert min(parts) >= 0
    assert figures["host_backward_s"] > figures["host_other_s"]
    assert figures["headroom"] == figures["samples_per_s"] / figures["model_samples_per_s"]
    assert "device_idle_fraction" not in figures


def test_figures_of_ranks_are_added(workload: Workload) -> None:
    cell = Cell("lookup", payload="lookup", ranks=2)
    figures = measured(cell, workload)
    assert figures["samples"] == 2 * 8 * (25 - 1)
    check_parts(figures, 2)
    assert figures["memory_series"][-1][0] == 400
    with pytest.raises(ChildError, match=r"rank [01]: .*no-rows.npy: cannot be read"):
        measured(cell, replace(workload, rows="no-rows.npy"))


@pytest.mark.parametrize(
    ("cell", "changes", "message"),
    [
        (Cell("lookup", 2), {"samples": 40}, "5 batches of 8 documents are too few"),
        (Cell("lookup"), {"directory": "nowhere"}, "nowhere: no directory of the document store"),
        (Cell("lookup"), {"rows": "nowhere"}, "nowhere: cannot be read"),
        (Cell("lookup"), {"tokenizer": "./nowhere"}, "not a directory"),
        (Cell("shop"), {}, "unknown document store 'shop'"),
    ],
)
def test_a_cell_that_cannot_be_measured_is_one_error(
    cell: Cell, changes: dict[str, Any], message: str, workload: Workload
) -> None:
    with pytest.raises((UsageError, DataError), match=message):
        measured(cell, replace(workload, **changes))


def test_the_process_of_a_cell_that_cannot_be_measured_writes_one_line(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    spec, result = tmp_path / "spec.json", tmp_path / "result.json"
    write_spec(spec, Cell("lookup"), Workload("nowhere", "rows.npy"))
    command = [sys.executable, "-m", "mlflow_dr.loaders.cell", spec, result]
    failed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == "Error: nowhere: no directory of the document store 'lookup'\n"
    assert not result.exists()


def test_a_process_that_is_ended_removes_its_ram_disk(lookup_directory: Path) -> None:
    before = set(RAM_DISK.iterdir())
    handler = signal.signal(signal.SIGTERM, end_process)
    try:
        with pytest.raises(SystemExit, match="143"), ram_disk(lookup_directory):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert set(RAM_DISK.iterdir()) == before


def test_a_killed_worker_is_named_as_such(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(feed: Feed, rows: Sequence[int], worker: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Feed, "batch", killed)  # in workers that are forked from this process
    with pytest.raises(ChildError, match=r"a worker process ended.*memory ran out"):
        measured(Cell("lookup", 1, payload="text"), workload)


def test_the_message_of_a_worker_process_is_that_of_its_error() -> None:
    trace = "Caught DataError in DataLoader worker process 0.\nTraceback\n  File\n"
    assert message_of(DataError(f"{trace}mlflow_dr.errors.DataError: row 3")) == "DataError: row 3"
    assert message_of(DataError("row\n3")) == "row 3"
    assert message_of(ValueError("row 3")) == "ValueError: row 3"
