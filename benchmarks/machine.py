"""The machine of a measurement, and how figures are repeated and printed."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mlflow_dr.files import usable_cores


def machine() -> str:
    """The processor, its cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if "model name" in line), name)
    cores = usable_cores()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{gpu}, torch {torch.__version__}"


def seconds_of(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each candidate, run in turn so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def print_table(seconds: Mapping[str, float], reference: str) -> None:
    """Seconds, and how many times faster than the reference."""
    for name, value in seconds.items():
        print(f"{name:44}{value:9.2f} s {seconds[reference] / value:7.2f} x")
