"""Several training processes of one cell, and their figures as those of one."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlflow_dr.errors import ChildError
from mlflow_dr.loaders.cell import (
    Cell,
    Figures,
    Workload,
    end_processes,
    process_failure,
    write_spec,
)

RANK, WORLD_SIZE, MEETING = "RANK", "WORLD_SIZE", "MLFLOW_DR_MEETING"
PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
POLL_SECONDS = 0.05
SECONDS_TO_STOP = 5.0

ADDED = {
    *("samples", "batches", "cpu_s", "model_samples_per_s", "read_mb", "open_read_mb"),
    *("private_start_mb", "private_end_mb", "private_peak_mb", "file_mb", "shmem_mb"),
    *("locked_mb", "pinned_mb"),
}
MEANS = {"read_kb_per_sample", "private_mb_per_100k", "device_idle_fraction"}


class Rank(NamedTuple):
    """One of the training processes: its number, how many there are, and the file they meet by."""

    number: int = 0
    world_size: int = 1
    meeting: str = ""

    @classmethod
    def of_this_process(cls) -> Rank:
        """The rank that `measured_by_ranks` gave this process; the only one if it did not."""
        meeting = os.environ.get(MEETING, "")
        if not meeting:
            return cls()
        return cls(int(os.environ[RANK]), int(os.environ[WORLD_SIZE]), meeting)

    def end_with_parent(self) -> None:
        """Have this process ended when the one that started it ends, even if that one is killed."""
        if self.world_size > 1:
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)

    def meet(self, backend: str) -> None:
        """Wait for the other ranks, so that all begin at the same time."""
        if self.world_size == 1:
            return
        import torch
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group(
                "gloo" if backend == "gloo" else f"cpu:gloo,cuda:{backend}",
                init_method=f"file://{self.meeting}",
                rank=self.number,
                world_size=self.world_size,
            )
        distributed.all_reduce(torch.zeros(1))

    def leave(self) -> None:
        """Leave the group of ranks."""
        if self.world_size > 1:
            from torch import distributed

            distributed.destroy_process_group()


def measured_by_ranks(cell: Cell, workload: Workload) -> Figures:
    """Measure a cell by several training processes, each of which gets every n-th row.

    Args:
        cell: the cell, with more than one rank.
        workload: what is loaded.

    Raises:
        ChildError: a rank failed; the others are ended.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = folder / "spec.json"
        write_spec(spec, cell, workload)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(cell.ranks):
                processes.append(_started(rank, cell.ranks, spec, folder))
            _wait(processes, folder)
        finally:
            end_processes(processes, SECONDS_TO_STOP)
        files = [_result(folder, rank) for rank in range(cell.ranks)]
        return added([json.loads(path.read_text(encoding="utf-8")) for path in files])


def _started(rank: int, world_size: int, spec: Path, folder: Path) -> subprocess.Popen[bytes]:
    group = {RANK: rank, "LOCAL_RANK": rank, WORLD_SIZE: world_size, MEETING: folder / "meeting"}
    variables = os.environ | {name: str(value) for name, value in group.items()}
    files = (str(spec), str(_result(folder, rank)))
    command = [sys.executable, "-m", "mlflow_dr.loaders.cell", *files]
    with _messages(folder, rank).open("wb") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=file, env=variables)


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait until all ranks have ended, or one has failed."""
    while True:
        statuses = [process.poll() for process in processes]
        for rank, status in enumerate(statuses):
            if status:
                messages = _messages(folder, rank).read_text(encoding="utf-8", errors="replace")
                raise ChildError(f"rank {rank}: {process_failure(status, messages)}")
        if None not in statuses:
            return
        time.sleep(POLL_SECONDS)


def _result(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _messages(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.stderr"


def added(ranks: Sequence[Figures]) -> Figures:
    """The figures of all ranks as those of one process.

    Documents, CPU time and memory are added, the host's times and figures per document are means,
    and of times that all wait for, such as the wall time, the largest stands.
    """
    figures: Figures = {}
    for name in ranks[0]:
        values = [rank[name] for rank in ranks if name in rank]
        if name in ADDED or name.startswith("cpu_"):
            figures[name] = sum(values)
        elif name in MEANS or name.startswith("host_"):
            figures[name] = sum(values) / len(values)
        elif name != "memory_series":
            figures[name] = max(values)
    first_and_last = np.array([[rank["memory_series"][i] for i in (0, -1)] for rank in ranks])
    figures["memory_series"] = first_and_last.sum(axis=0).tolist()
    figures["samples_per_s"] = figures["samples"] / figures["wall_s"]
    figures["samples_per_cpu_s"] = figures["samples"] / figures["cpu_s"]
    if "headroom" in figures:
        figures["headroom"] = figures["samples_per_s"] / figures["model_samples_per_s"]
    return figures
