"""Which of several subsets a validator has the time for, by its own speed and the trainer's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.binding import Bound
from mlflow_dr.validation.evaluate import Report
from mlflow_dr.validation.plan import Plan

log = logging.getLogger(__name__)

ENOUGH_CHECKPOINTS = 3
CHOSEN_PARAM = "mlflow_dr.keep_up"


class Speed(NamedTuple):
    """How fast this validator is.

    Attributes:
        passages_per_second: encoded and searched.
        overhead: seconds for each checkpoint beside: fetching, loading, writing.
    """

    passages_per_second: float
    overhead: float

    @staticmethod
    def of(report: Report, seconds: float) -> Speed:
        """By an evaluation, and the seconds that everything took."""
        rate = report.passages / max(report.seconds, 1e-9)
        return Speed(rate, max(0.0, seconds - report.seconds))

    def seconds(self, passages: int) -> float:
        """What a checkpoint takes, on so many passages."""
        return self.overhead + passages / self.passages_per_second


class Chosen(NamedTuple):
    """A subset, and why."""

    subset: str
    why: str


def publishing_interval(ready_ms: Sequence[int]) -> float | None:
    """Seconds from one checkpoint to the next, the median; None before there are enough.

    Args:
        ready_ms: when each was READY, in ms since 1970.
    """
    if len(ready_ms) < ENOUGH_CHECKPOINTS:
        return None
    times = sorted(ready_ms)
    return median(after - before for before, after in pairwise(times)) / 1000


def largest_that_keeps_up(
    sizes: Mapping[str, int], speed: Speed, interval: float, validators: int = 1
) -> Chosen:
    """The largest subset for which the validators need no longer than the trainer.

    Args:
        sizes: passages of each subset, by its name.
        speed: of one validator.
        interval: seconds from one checkpoint to the next.
        validators: how many share the work.

    Returns:
        That subset, or the smallest where none keeps up.
    """
    ascending = sorted(sizes, key=lambda name: sizes[name])
    in_time = [one for one in ascending if speed.seconds(sizes[one]) <= interval * validators]
    chosen = in_time[-1] if in_time else ascending[0]
    takes = f"{speed.seconds(sizes[chosen]):.1f} s a checkpoint for {sizes[chosen]} passages"
    among = f", {validators} validators" if validators > 1 else ""
    keeps = "keeps up with" if in_time else "is the smallest, and yet too slow for"
    return Chosen(chosen, f"{chosen} {keeps} a checkpoint every {interval:.1f} s: {takes}{among}")


def _nobody(largest: str) -> str:
    return f"the training has ended, so --keep-up takes the largest subset, {largest}"


class Pacer:
    """Decides for each run which of a plan's subsets is validated, once for all its validators.

    Until the speed and the interval are known, that is the smallest.

    Args:
        plan: its validations differ in their subsets.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._chosen: dict[str, str] = {}

    def has_chosen(self, run_id: str) -> bool:
        """Whether it is decided for this run."""
        return run_id in self._chosen

    def names(
        self,
        run: TrackedRun,
        bound: Sequence[Bound],
        checkpoints: Sequence[Checkpoint],
        speed: Speed | None,
        validators: int,
        over: bool | None = None,
    ) -> list[str]:
        """The validations that are done on a run, as far as is known.

        Args:
            run: which.
            bound: the plan's validations as they are on it.
            checkpoints: of the run.
            speed: of this validator, once it is known.
            validators: how many are at work on it.
            over: whether its training has ended, so that there is nobody to keep up with.

        Raises:
            TrackingError: the server does not answer.
        """
        sizes: dict[str, int] = {}
        for one in bound:
            if one.name in {cheap.name for cheap in self._plan.cheap}:
                subset = self._subset(one.name)
                sizes[subset] = sizes.get(subset, 0) + one.prepared.n_passages
        subset = self._chosen.get(run.id) or min(sizes, key=lambda name: sizes[name])
        chosen = None
        interval = publishing_interval([one.ready_ms for one in checkpoints if one.ready])
        if over and run.id not in self._chosen:
            chosen = Chosen(largest := max(sizes, key=lambda name: sizes[name]), _nobody(largest))
        elif run.id not in self._chosen and speed and interval is not None:
            chosen = largest_that_keeps_up(sizes, speed, interval, validators)
        if chosen is not None:
            subset = self._chosen[run.id] = run.set_param_once(CHOSEN_PARAM, chosen.subset)
            if subset == chosen.subset:
                log.info("run %s: %s", run.id, chosen.why)
            else:
                log.info("run %s: %s, as another validator has chosen", run.id, subset)
        done = {one.name for one in self._plan.cheap if one.subset.shown == subset}
        return [
            one.name
            for one in self._plan.validations
            if one.name in done or (one.refines and one.refines.name in done)
        ]

    def _subset(self, name: str) -> str:
        return next(one.subset.shown for one in self._plan.cheap if one.name == name)
