"""What has become of a run's checkpoints: which validations are done, by whom, and what failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from mlflow_dr.terminal import in_columns
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoints_of
from mlflow_dr.tracking.claims import standing
from mlflow_dr.tracking.results import PREFIX, State, failure_of, state_of
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import figures_of, validations_of

CLAIMED = "claimed"
PRUNED = "pruned"
LONGEST_NOTE = 60
HEADS = ("step", "validation", "state", "owner", "age", "lag", "note")


class Line(NamedTuple):
    """One validation of one checkpoint.

    Attributes:
        step: of the checkpoint.
        validation: its name.
        state: `pending` (being published), `lost` (never to be), `open`, `claimed`, `recorded`,
            `done`, `failed` or `pruned` (its files were removed before it was done).
        owner: the validator that has claimed it last, as host:pid.
        age: seconds since it was READY.
        lag: seconds from READY to the figures.
        note: why it failed, how often it was taken over, whether its files were removed.
    """

    step: int
    validation: str
    state: str
    owner: str
    age: float
    lag: float | None
    note: str


def status_of(run: TrackedRun, now_ms: int | None = None) -> list[Line]:
    """Each validation of each checkpoint of a run, by step.

    Args:
        run: which.
        now_ms: the server's time, in ms since 1970; this machine's when None.

    Raises:
        TrackingError: the server does not answer.
    """
    now_ms = now_ms or time.time_ns() // 1_000_000
    names = list(validations_of(run)) or [""]
    return [_line(checkpoint, name, now_ms) for checkpoint in checkpoints_of(run) for name in names]


def summary_of(checkpoints: Iterable[Checkpoint], name: str) -> str:
    """How far a validation has come, in a few words.

    Args:
        checkpoints: of one run.
        name: the validation's.
    """
    there = [one for one in checkpoints if one.ready]
    ready = [one for one in there if not (one.is_pruned and state_of(one, name) is State.OPEN)]
    states = [state_of(one, name) for one in ready]
    done = [one.step for one, state in zip(ready, states, strict=True) if state is State.DONE]
    words = f"{len(done)} of {len(ready)} checkpoints done"
    if failed := states.count(State.FAILED):
        words += f", {failed} failed"
    return f"{words}, the last at step {max(done)}" if done else words


def note_summary(run: TrackedRun, name: str, summary: str) -> None:
    """Show on the run how far a validation has come.

    Raises:
        TrackingError: the server does not answer.
    """
    run.set_tags({f"{PREFIX}{name}.status": summary})


def table(lines: Sequence[Line]) -> str:
    """The lines under their heads, in columns."""
    rows = [
        HEADS,
        *(
            (
                str(one.step),
                one.validation or "-",
                one.state,
                one.owner or "-",
                _span(one.age),
                "-" if one.lag is None else _span(one.lag),
                one.note,
            )
            for one in lines
        ),
    ]
    return in_columns(rows)


def _line(checkpoint: Checkpoint, name: str, now_ms: int) -> Line:
    there = standing(checkpoint, name)
    state = state_of(checkpoint, name)
    lag = figures_of(checkpoint, name).get("lag_seconds")
    notes = [PRUNED] if checkpoint.is_pruned else []
    if state is State.FAILED:
        notes.append(failure_of(checkpoint, name)[:LONGEST_NOTE])
    elif there is not None and there.attempt > 1:
        notes.append(f"attempt {there.attempt}")
    shown = state.value
    if not checkpoint.ready:
        shown = "pending" if checkpoint.pending else "lost"
    elif state is State.OPEN and checkpoint.is_pruned:
        shown, notes = PRUNED, []
    elif state is State.OPEN and there is not None and not there.given_back:
        shown = CLAIMED
    owner = str(there.owner) if there is not None and there.owner is not None else ""
    since = checkpoint.ready_ms if checkpoint.ready else checkpoint.created_ms
    age = max(0, now_ms - since) / 1000
    return Line(checkpoint.step, name, shown, owner, age, lag, "; ".join(notes))


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
