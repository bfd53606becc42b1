"""Faults of processes, networks, machines and checkpoints, and their effect on validation.

    python -m benchmarks.faults                         all scenarios, shortened: 7 to 13 minutes
    python -m benchmarks.faults --only proxy --rate 0.2
    python -m benchmarks.faults --only kills --rounds 50 --steps 1500

`kills` kills a trainer, two validators and a server with SIGKILL (`benchmarks/faulting/kills.py`).
The others publish checkpoints of tiny encoders to a real MLflow server, and validators follow as
processes of their own (`benchmarks/faulting/scenarios.py`). At the end each sound checkpoint must
have one point for each metric, equal to an undisturbed validator's, and none may be FAILED.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.faulting import kills
from benchmarks.faulting.scenarios import SCENARIOS
from benchmarks.faulting.scene import COUNTS, Row, Scene
from benchmarks.machine import machine
from benchmarks.server import Server

KILLS = "kills"


def print_row(row: Row) -> None:
    """Print the result of a scenario."""
    verdict = "good" if row.is_good else "BAD"
    counts = ", ".join(f"{name} {getattr(row, name)}" for name in COUNTS)
    print(f"{row.scenario}: {verdict}\n    {counts}, {row.seconds:.0f} s")
    print(f"    exit codes: {'; '.join(row.codes)}")
    for note in row.notes:
        print(f"    {note}", flush=True)


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*SCENARIOS, KILLS]),
    help="Run only these scenarios.",
)
@click.option("--checkpoints", default=8, show_default=True, help="Sound checkpoints per scenario.")
@click.option(
    "--rate", default=0.05, show_default=True, help="Share of answers that are disturbed."
)
@click.option("--rounds", default=10, show_default=True, help="Number of processes to kill.")
@click.option(
    "--steps", default=200, show_default=True, help="Training steps of the kills scenario."
)
@click.option(
    "--validators", default=2, show_default=True, help="Validators of the kills scenario."
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--keep", type=click.Path(path_type=Path), help="Folder for logs and data; it is not deleted."
)
def main(
    only: tuple[str, ...],
    checkpoints: int,
    rate: float,
    rounds: int,
    steps: int,
    validators: int,
    seed: int,
    keep: Path | None,
) -> None:
    """Count the effects of faults; the exit code is 1 if a scenario is BAD."""
    print(machine())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        workdir = keep or Path(name)
        workdir.mkdir(parents=True, exist_ok=True)
        chosen = [key for key in SCENARIOS if not only or key in only]
        if chosen:
            with Server(workdir) as server:
                scene = Scene(server, workdir, checkpoints)
                for key in chosen:
                    rows.append(SCENARIOS[key](scene, rate, seed))
                    print_row(rows[-1])
    is_good = all(row.is_good for row in rows)
    if not only or KILLS in only:
        is_good &= kills.run(rounds, validators, steps, seed)
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
