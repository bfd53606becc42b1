"""Malformed inputs: each must be read correctly or refused in one line.

    python -m benchmarks.fuzz
    python -m benchmarks.fuzz --kind beir --cases 500 --show
    python -m benchmarks.fuzz --case beir/17

A case is an input of some kind (a collection's files, an encoder's directory, an entry of the
cache, a command line ...) with seeded damage. The outcome of a case is one of

- equal: mlflow_dr gives the value that an independent reader gives for the same input;
- refused: an error of `mlflow_dr/errors.py`, one line under 500 characters without control
  characters, that names the file or key;
- finding: a traceback, a hang, a crash, a different value, or an unclear refusal.

Cases run in a separate process, which is killed if a case takes too long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import click

from benchmarks.fuzzing.case import EQUAL, FINDING, REFUSED, Kind, Verdict, judged
from mlflow_dr.files import CACHE_VARIABLE

SECONDS_TO_START = 300.0
SECONDS_TO_END = 2.0
MEMORY = 12 << 30
OUTCOMES = (REFUSED, EQUAL, FINDING)


def kinds_by_name() -> dict[str, Kind]:
    from benchmarks.fuzzing import all_kinds

    return {kind.name: kind for kind in all_kinds()}


def run_case(kind: Kind, seed: int, number: int) -> Verdict:
    """One case, in an empty folder and with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        workdir = Path(name, "case")
        workdir.mkdir()
        os.environ[CACHE_VARIABLE] = str(Path(name, "cache"))
        chance = Random(f"{seed}/{kind.name}/{number}")
        with contextlib.chdir(workdir):
            return judged(kind.make(chance, workdir))


def work(pipe: Connection, names: list[str], seed: int, seconds: float, log: str) -> None:
    """Run the cases that are requested through the pipe; runs in a separate process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    kinds = {name: kind for name, kind in kinds_by_name().items() if name in names}
    for kind in kinds.values():
        kind.prepare()
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        name, number = asked
        os.ftruncate(descriptor, 0)
        faulthandler.dump_traceback_later(seconds * 0.9, file=descriptor)
        try:
            verdict = run_case(kinds[name], seed, number)
        except Exception as error:  # noqa: BLE001 - an error in the fuzzer itself
            import traceback

            verdict = Verdict(
                FINDING, "the fuzzer itself", "".join(traceback.format_exception(error))[-1500:]
            )
        faulthandler.cancel_dump_traceback_later()
        pipe.send(verdict)


class Worker:
    """The process that runs cases; it is restarted after it was killed."""

    def __init__(self, names: list[str], seed: int, seconds: float) -> None:
        self._names, self._seed, self._seconds = names, seed, seconds
        self._workdir = Path(tempfile.mkdtemp(prefix="fuzz-worker-"))
        self._process: Any = None
        self._pipe: Any = None

    def verdict(self, kind: str, number: int) -> Verdict:
        """The outcome of a case; a hang or a crash is a finding."""
        if self._process is None:
            self._start()
        self._pipe.send((kind, number))
        try:
            if self._pipe.poll(self._seconds):
                verdict: Verdict = self._pipe.recv()
                return verdict
        except (EOFError, ConnectionError):
            self.close()
            code = self._exitcode
            return Verdict(FINDING, f"crash: exit code {code}", self._log_tail())
        self.close()
        return Verdict(FINDING, f"hang: {self._last_frame()}", self._log_tail())

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(SECONDS_TO_END)
            self._process.kill()
            self._process.join()
            self._exitcode = self._process.exitcode
            self._process = None

    def remove(self) -> None:
        """End the process, and remove its files."""
        self.close()
        shutil.rmtree(self._workdir, ignore_errors=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        log = str(self._workdir / "log")
        self._process = context.Process(
            target=work,
            args=(theirs, self._names, self._seed, self._seconds, log),
            daemon=True,
        )
        os.environ["TMPDIR"] = str(self._workdir)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(SECONDS_TO_START):
            raise SystemExit("the process that runs cases did not start")
        self._pipe.recv()

    def _log_tail(self) -> str:
        return (self._workdir / "log").read_text(errors="replace")[-3000:]

    def _last_frame(self) -> str:
        lines = self._log_tail().splitlines()
        own = (line.split("/mlflow_dr/")[-1] for line in lines if "/mlflow_dr/" in line)
        return next(own, "outside mlflow_dr")


def planned(kinds: dict[str, Kind], cases: int) -> Iterator[tuple[str, int]]:
    """The given number of cases, divided by the shares of the kinds; the kinds take turns."""
    whole = sum(kind.share for kind in kinds.values())
    wanted = {name: kind.share * cases // whole for name, kind in kinds.items()}
    for name in list(kinds)[: cases - sum(wanted.values())]:
        wanted[name] += 1
    for number in range(max(wanted.values())):
        yield from ((name, number) for name in kinds if number < wanted[name])


@click.command()
@click.option("--cases", default=10_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--kind", "names", multiple=True, help="Run only these kinds.")
@click.option(
    "--case", "case_name", help="Run only this case, such as beir/17, and print its outcome."
)
@click.option(
    "--seconds-per-case",
    default=30.0,
    show_default=True,
    help="A case that takes longer is a hang.",
)
@click.option("--show", is_flag=True, help="Print every finding, not only one for each cause.")
def main(
    cases: int,
    seed: int,
    names: tuple[str, ...],
    case_name: str | None,
    seconds_per_case: float,
    show: bool,
) -> None:
    """Count the outcomes of malformed inputs; the exit code is 1 if there are findings."""
    kinds = {name: kind for name, kind in kinds_by_name().items() if not names or name in names}
    if case_name:
        name, _, number = case_name.partition("/")
        plan = [(name, int(number))]
    else:
        plan = list(planned(kinds, cases))
    worker = Worker(sorted({name for name, _ in plan}), seed, seconds_per_case)
    counts: Counter[tuple[str, str]] = Counter()
    causes: dict[tuple[str, str], list[tuple[int, Verdict]]] = {}
    seconds: Counter[str] = Counter()
    start = time.monotonic()
    try:
        for n_cases, (name, number) in enumerate(plan, start=1):
            before = time.monotonic()
            verdict = worker.verdict(name, number)
            seconds[name] += time.monotonic() - before
            counts[name, verdict.outcome] += 1
            if verdict.outcome == FINDING:
                causes.setdefault((name, verdict.cause), []).append((number, verdict))
            if case_name:
                print(*map(visible, verdict), sep="\n")
            elif n_cases % 500 == 0:
                found = sum(map(len, causes.values()))
                print(
                    f"{n_cases} cases, {found} findings, {time.monotonic() - start:.0f} s",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("stopped; so far:")
    finally:
        worker.remove()
    report(counts, causes, seconds, seed, show)
    sys.exit(1 if causes else 0)


def report(
    counts: Counter[tuple[str, str]],
    causes: dict[tuple[str, str], list[tuple[int, Verdict]]],
    seconds: Counter[str],
    seed: int,
    show: bool,
) -> None:
    """Print the findings by cause, and the counts by kind."""
    for (name, cause), found in sorted(causes.items()):
        print(f"\n{name}: {visible(cause):.200} ({len(found)})")
        for number, verdict in found if show else found[:1]:
            print(f"    {visible(verdict.what):.200}")
            for line in verdict.text.splitlines()[-6:]:
                print(f"    | {visible(line):.300}")
            print(f"    python -m benchmarks.fuzz --seed {seed} --case {name}/{number}")
    print(f"\n{'kind':16}{'cases':>8}{'refused':>9}{'equal':>8}{'findings':>10}{'s':>8}")
    for name in seconds:
        of_kind = [counts[name, outcome] for outcome in OUTCOMES]
        print_row(name, of_kind, seconds[name])
    whole = [sum(n for (_, what), n in counts.items() if what == outcome) for outcome in OUTCOMES]
    print_row("all", whole, seconds.total())


def print_row(name: str, numbers: list[int], spent: float) -> None:
    refused, equal, findings = numbers
    print(f"{name:16}{sum(numbers):8}{refused:9}{equal:8}{findings:10}{spent:8.0f}")


def visible(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()
