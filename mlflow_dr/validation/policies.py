"""What a validator does with the curve: mark the best, stop, delete files, choose the subset."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from mlflow_dr.decisions.best import find_best, mark_best
from mlflow_dr.decisions.pruning import ValidatorScope, delete_unneeded, parse_keep_rules
from mlflow_dr.decisions.stop import stop_if_plateau
from mlflow_dr.errors import ForbiddenError, TrackingError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.client import server_responds
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.status import progress_summary
from mlflow_dr.tracking.validations import Metric, chosen_metric, metric_points
from mlflow_dr.validation.config import FollowConfig, ValidateConfig
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.resolve import RetrievalValidation

log = logging.getLogger(__name__)

ENOUGH_CHECKPOINTS = 3
CHOSEN_PARAM = "mlflow_dr.keep_up"


class RunSummaries:
    """How far the validations of each run have come, as it was shown on the run last."""

    def __init__(self) -> None:
        self._shown: dict[str, dict[str, str]] = {}
        self._seen: dict[str, Sequence[Checkpoint]] = {}

    def changed(
        self, run_id: str, checkpoints: Sequence[Checkpoint], names: Sequence[str]
    ) -> dict[str, str]:
        """The summaries of these validations that are not shown yet."""
        if not names or self._seen.get(run_id) == checkpoints:
            return {}
        shown = self._shown.get(run_id, {})
        summaries = {name: progress_summary(checkpoints, name) for name in names}
        changed = {name: text for name, text in summaries.items() if shown.get(name) != text}
        if not changed:
            self._seen[run_id] = checkpoints
        return changed

    def note(
        self, run_id: str, checkpoints: Sequence[Checkpoint], summaries: Mapping[str, str]
    ) -> None:
        """Remember that these summaries are shown."""
        self._shown.setdefault(run_id, {}).update(summaries)
        self._seen[run_id] = checkpoints


class Policies:
    """Marks the best checkpoint, asks for a stop and deletes files, on each run that is followed.

    Args:
        config: the policies, and the validations.
    """

    def __init__(self, config: FollowConfig) -> None:
        self._config = config
        self._keep = parse_keep_rules(config.keep) if config.keep else None
        # validation -> the metric whose best checkpoints it is done for
        self._refined = {
            validation.name: validation.refines
            and Metric(validation.refines.name, validation.refines.measure.metric)
            for validation in config.all_validations
        }
        self._metrics: dict[str, Metric] = {}
        self._marked: dict[str, tuple[int, float]] = {}
        self._cannot_delete = False
        self._gone: set[str] = set()

    def act(
        self,
        run: TrackedRun,
        checkpoints: Collection[Checkpoint],
        waiting: Collection[Checkpoint],
    ) -> None:
        """Apply the policies; to be called when there are new figures.

        Args:
            run: which.
            checkpoints: of the run, as they were seen last.
            waiting: those that some validator will still do.

        Raises:
            UsageError: the run has no such metric.
            TrackingError: the server does not answer.
        """
        config = self._config
        if run.id not in self._metrics:
            self._metrics[run.id] = chosen_metric(run, config.metric)
        metric = self._metrics[run.id]
        points = metric_points(checkpoints, metric)
        top = max(points, key=lambda point: (metric.sign * point[1], -point[0]), default=None)
        if top is not None and self._marked.get(run.id) != top:
            # other validators mark, too, so the run is read again
            mark_best(run, find_best(run, metric))
            self._marked[run.id] = top
        if config.patience is not None:
            # an expensive validation has too few points; the cheap one that it refines has all
            refined = None if config.metric else self._refined.get(metric.validation)
            plateau = refined or metric
            stop_if_plateau(run, checkpoints, plateau, config.patience, config.min_delta, waiting)
        if self._keep is not None and not self._cannot_delete:
            try:
                scope = self._scope(waiting)
                delete_unneeded(run, checkpoints, self._keep, config.metric, scope, self._gone)
            except ForbiddenError as error:
                self._cannot_delete = True  # a user who may validate may not be allowed to delete
                log.warning("files are not deleted from now on: %s", error)
            except TrackingError as error:
                if not server_responds(run.client):
                    raise
                log.warning("files are not deleted now: %s", error)

    def _scope(self, waiting: Collection[Checkpoint]) -> ValidatorScope:
        deciding = {
            name: metric.validation if metric else name for name, metric in self._refined.items()
        }
        return ValidatorScope(deciding, {checkpoint.model_id for checkpoint in waiting})


class Speed(NamedTuple):
    """How fast this validator is.

    Attributes:
        passages_per_second: encoded and searched.
        overhead: further seconds per checkpoint: fetching, loading, writing.
    """

    passages_per_second: float
    overhead: float

    def seconds(self, passages: int) -> float:
        """The seconds of a checkpoint with this many passages."""
        return self.overhead + passages / self.passages_per_second


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
) -> tuple[str, str]:
    """The largest subset for which the validators need no longer than the trainer.

    Args:
        sizes: passages of each subset, by its name.
        speed: of one validator.
        interval: seconds from one checkpoint to the next.
        validators: how many share the work.

    Returns:
        That subset, or the smallest if none keeps up, and the reason.
    """
    ascending = sorted(sizes, key=lambda name: sizes[name])
    in_time = [name for name in ascending if speed.seconds(sizes[name]) <= interval * validators]
    subset = in_time[-1] if in_time else ascending[0]
    takes = f"{speed.seconds(sizes[subset]):.1f} s a checkpoint for {sizes[subset]} passages"
    among = f", {validators} validators" if validators > 1 else ""
    keeps = "keeps up with" if in_time else "is the smallest, but is too slow for"
    return (subset, f"{subset} {keeps} a checkpoint every {interval:.1f} s: {takes}{among}")


class AutoSubset:
    """Chooses for each run which subset is validated, once for all its validators (`--keep-up`).

    Until the speed and the interval are known, that is the smallest.

    Args:
        config: its validations differ in their subsets.
    """

    def __init__(self, config: ValidateConfig) -> None:
        self._validations = config.all_validations
        self._subsets = {cheap.name: cheap.subset.shown for cheap in config.cheap}
        self._speed: Speed | None = None
        self._chosen: dict[str, str] = {}

    def note_speed(self, report: Report, seconds: float) -> None:
        """Learn from an evaluation, and the seconds that everything took with it."""
        rate = report.passages / max(report.seconds, 1e-9)
        self._speed = Speed(rate, max(0.0, seconds - report.seconds))

    def has_chosen(self, run_id: str) -> bool:
        """Whether a subset is chosen for this run."""
        return run_id in self._chosen

    def names(
        self,
        run: TrackedRun,
        validations: Sequence[RetrievalValidation],
        checkpoints: Sequence[Checkpoint],
        validators: int,
        is_over: bool | None = None,
    ) -> list[str]:
        """The validations that are done on a run, as chosen so far.

        Args:
            run: which.
            validations: all, as they are on it.
            checkpoints: of the run.
            validators: how many are at work on it.
            is_over: whether its training has ended, so that there is no trainer to keep up with.

        Raises:
            TrackingError: the server does not answer.
        """
        sizes: dict[str, int] = defaultdict(int)
        for validation in validations:
            if validation.name in self._subsets:
                sizes[self._subsets[validation.name]] += validation.data.n_passages
        subset = self._chosen.get(run.id) or min(sizes, key=lambda name: sizes[name])
        if run.id not in self._chosen:
            choice = self._choose(sizes, checkpoints, validators, bool(is_over))
            if choice is not None:
                wanted, reason = choice
                subset = self._chosen[run.id] = run.set_param_once(CHOSEN_PARAM, wanted)
                if subset != wanted:
                    reason = f"{subset}, as another validator has chosen"
                log.info("run %s: %s", run.id, reason)
        done = {name for name, of_cheap in self._subsets.items() if of_cheap == subset}
        return [
            validation.name
            for validation in self._validations
            if (validation.refines.name if validation.refines else validation.name) in done
        ]

    def _choose(
        self,
        sizes: Mapping[str, int],
        checkpoints: Sequence[Checkpoint],
        validators: int,
        is_over: bool,
    ) -> tuple[str, str] | None:
        """A subset and the reason, once enough is known."""
        if is_over:
            largest = max(sizes, key=lambda name: sizes[name])
            reason = f"the training has ended, so --keep-up takes the largest subset, {largest}"
            return largest, reason
        ready_ms = [checkpoint.ready_ms for checkpoint in checkpoints if checkpoint.ready]
        interval = publishing_interval(ready_ms)
        if self._speed is None or interval is None:
            return None
        return largest_that_keeps_up(sizes, self._speed, interval, validators)
