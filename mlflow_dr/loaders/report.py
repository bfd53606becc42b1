"""A loader study as a table, in words and in files."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_dr.files import atomic_write
from mlflow_dr.loaders.pictures import PICTURES
from mlflow_dr.loaders.results import CellFigures, LoaderStudy
from mlflow_dr.terminal import in_columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT, TABLE = "report.txt", "table.csv"
HEADS = (
    *("cell", "docs/s", "docs/CPU-s", "range", "open s", "1st batch s", "wait p99 ms"),
    *("private MB", "MB/100k", "read KB/doc"),
)
ENOUGH = 2.0  # times what the model takes, so that waiting is rare
GROWTH = 20.0  # MB over 300,000 documents that count as growing memory
ALIKE = 0.1
ENOUGH_SAMPLES = 50_000  # to say how memory grows


def study_text(study: LoaderStudy) -> str:
    """The table, what was not measured and why, and the findings in words."""
    repeats = max(len(measured.repeats) for measured in study.measured)
    what = {"ids": "token ids reach", "text": "texts reach", "lookup": "nothing reaches"}
    lines = [
        f"{len(study.measured)} ways to load documents, of {study.passages} passages of "
        f"{study.dataset}; {what[study.payload]} the training process",
        f"medians of {repeats} repeats on {platform.node()}, {os.cpu_count()} cores",
        "",
        in_columns([HEADS, *(_row(measured) for measured in study.measured)]),
        "",
    ]
    if study.build_seconds:
        times = (f"{store} {seconds:.1f} s" for store, seconds in study.build_seconds.items())
        lines += [f"building took: {', '.join(times)}", ""]
    if failed := [measured for measured in study.cells if not measured.repeats]:
        lines.append("not measured:")
        lines += [f"  {measured.cell.label}: {measured.problem}" for measured in failed]
        lines.append("")
    return "\n".join([*lines, *findings(study)])


def _row(measured: CellFigures) -> tuple[str, ...]:
    rates, loaded = measured.values("samples_per_cpu_s"), measured["samples"]
    return (
        measured.cell.label,
        _shown(measured["samples_per_s"], ".0f"),
        _shown(measured["samples_per_cpu_s"], ".0f"),
        f"{min(rates):.0f}-{max(rates):.0f}",
        _shown(measured["open_s"], ".2f"),
        _shown(measured["first_batch_s"], ".2f"),
        _shown(measured["wait_p99_ms"], ".1f"),
        f"{measured['private_start_mb']:.0f}-{measured['private_end_mb']:.0f}",
        # of few documents it would be noise
        _shown(measured["private_mb_per_100k"] if loaded >= ENOUGH_SAMPLES else math.nan, "+.1f"),
        _shown(measured["read_kb_per_sample"], ".1f"),
    )


def _shown(value: float, form: str) -> str:
    """A figure; a dash where this machine does not tell it."""
    return "-" if math.isnan(value) else format(value, form)


def findings(study: LoaderStudy) -> list[str]:
    """What the figures say, a sentence or two each."""
    said = [_best(study), _late_tokenizing(study), _stores(study), _memory(study), _growth(study)]
    return [text for text in [*said, advised_flags(study)] if text]


def appetite(study: LoaderStudy) -> float:
    """Documents a second that the model takes; NaN without a model."""
    rates = sorted(rate for cell in study.measured for rate in cell.values("model_samples_per_s"))
    return rates[len(rates) // 2] if rates else math.nan


def _best(study: LoaderStudy) -> str:
    best = max(_single(study), key=lambda cell: cell["samples_per_s"], default=None)
    if best is None:
        return ""
    text = f"{_named(best)} supplies the most: {best['samples_per_s']:.0f} documents a second"
    takes = appetite(study)
    if takes > 0:
        text += f", {_times(best['samples_per_s'] / takes)} what the model takes ({takes:.0f})"
    return f"{text}, with {_gigabytes(best)} of private memory."


def _late_tokenizing(study: LoaderStudy) -> str:
    """How tokenising at load time compares with a token table, and how many workers it needs."""
    late = [cell for cell in _single(study) if cell.cell.store != "tokens"]
    if study.payload != "ids" or not late:
        return ""
    rate = max(cell["samples_per_cpu_s"] for cell in late)
    takes = appetite(study)
    if takes > 0:
        need = math.ceil(takes / rate)
        workers = "one worker" if need == 1 else f"{need} workers"
        return (
            f"Tokenising at load time supplies {rate:.0f} documents a CPU second, so it takes "
            f"{workers} to keep up with the model."
        )
    tokens = [cell["samples_per_cpu_s"] for cell in _single(study) if cell.cell.store == "tokens"]
    if not tokens:
        return ""
    return (
        f"A token table supplies {_times(max(tokens) / rate)} what tokenising at load time does in "
        "a CPU second."
    )


def _stores(study: LoaderStudy) -> str:
    """Whether stores of text differ in speed, without workers."""
    plain = [
        cell
        for cell in _single(study)
        if cell.cell.store not in ("tokens", "null") and cell.cell.label == cell.cell.store
    ]
    if len({cell.cell.store for cell in plain}) < 2:
        return ""
    slowest, fastest = (
        choose(plain, key=lambda cell: cell["samples_per_cpu_s"]) for choose in (min, max)
    )
    spread = 1 - slowest["samples_per_cpu_s"] / fastest["samples_per_cpu_s"]
    if spread <= ALIKE:
        return (
            f"Without workers, stores of text are within {spread:.0%} of each other: the store "
            "decides memory, opening and reading from disk, not speed."
        )
    ratio = fastest["samples_per_cpu_s"] / slowest["samples_per_cpu_s"]
    return (
        f"Without workers, {fastest.cell.store} is {ratio:.1f} times as fast as "
        f"{slowest.cell.store} in a CPU second."
    )


def _memory(study: LoaderStudy) -> str:
    most, least = (
        choose(_single(study), key=lambda cell: cell["private_end_mb"], default=None)
        for choose in (max, min)
    )
    if most is None or least is None or most["private_end_mb"] < 1.5 * least["private_end_mb"]:
        return ""
    ratio = most["private_end_mb"] / least["private_end_mb"]
    return (
        f"{_named(most)} takes {_gigabytes(most)} of private memory, {_times(ratio)} as much as "
        f"{_named(least)}."
    )


def _growth(study: LoaderStudy) -> str:
    growing = [
        cell
        for cell in study.measured
        if 3 * cell["private_mb_per_100k"] > GROWTH
        and cell["private_end_mb"] - cell["private_start_mb"] > GROWTH
    ]
    if not growing:
        return ""
    names = ", ".join(cell.cell.label for cell in growing)
    return f"Private memory was still growing at the end of: {names}."


def advised_flags(study: LoaderStudy) -> str:
    """Flags of `mlflow-dr train`: the least memory that is fast enough, else the fastest."""
    possible = [
        cell
        for cell in _single(study)
        if not (cell.cell.threads or cell.cell.ramdisk)
        and cell.cell.store != "null"
        and cell.cell.start_method == "fork"
    ]
    if study.payload != "ids" or not possible:
        return ""
    takes = appetite(study)
    enough = [cell for cell in possible if cell["samples_per_s"] >= ENOUGH * takes]
    if enough:
        best = min(enough, key=lambda cell: (cell["private_end_mb"], cell.cell.workers))
    else:
        best = max(possible, key=lambda cell: cell["samples_per_s"])
    store = best.cell.store
    table = "true" if store == "tokens" else f"false --document_store {store}"
    return (
        f"Use `mlflow-dr train --token_table {table} --dataloader_num_workers {best.cell.workers}`."
    )


def _single(study: LoaderStudy) -> list[CellFigures]:
    return [cell for cell in study.measured if cell.cell.ranks == 1]


def _named(measured: CellFigures) -> str:
    cell = measured.cell
    if cell.workers:
        return cell.label
    return cell.label.replace(cell.store, f"{cell.store} without workers", 1)


def _gigabytes(measured: CellFigures) -> str:
    return f"{measured['private_end_mb'] / 1024:.2f} GB"


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def write_study(study: LoaderStudy, directory: Path) -> list[Path]:
    """Write the report, a table with every figure of every repeat, and the pictures.

    Returns:
        The files.
    """
    writers: dict[str, Callable[[Path], object]] = {
        REPORT: lambda path: path.write_text(study_text(study) + "\n", encoding="utf-8"),
        TABLE: lambda path: _write_table(study.measured, path),
        **{name: partial(_draw, study, draw) for name, draw in PICTURES.items()},
    }
    for name, write in writers.items():
        with atomic_write(directory / name) as unfinished:
            write(unfinished)
    return [directory / name for name in writers]


def _draw(study: LoaderStudy, draw: Callable[[LoaderStudy, float], Figure], path: Path) -> None:
    draw(study, appetite(study)).savefig(path, format="png")


def _write_table(measured: Sequence[CellFigures], path: Path) -> None:
    names = list(dict.fromkeys(name for cell in measured for name in cell.names))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["cell", "repeat", *names])
        for cell in measured:
            for number, repeat in enumerate(cell.repeats):
                rows.writerow([cell.cell.label, number, *(repeat.get(name, "") for name in names)])
