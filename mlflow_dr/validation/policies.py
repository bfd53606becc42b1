"""What a validator does by the curve as it grows: mark the best, ask for a stop, make room."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mlflow_dr.decisions.best import find_best, mark_best
from mlflow_dr.decisions.pruning import KeepRules, ValidatorScope, delete_unneeded
from mlflow_dr.decisions.stop import check_patience, stop_if_plateau
from mlflow_dr.errors import ForbiddenError, TrackingError
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.client import server_responds
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import Metric, chosen_metric, metric_points

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wishes:
    """What is to follow from the curve.

    Attributes:
        metric: by which; `chosen_metric` says what None means. A training is then stopped by what
            every checkpoint has: the cheap validation, where that one refines it.
        patience: ask the training to end after so many checkpoints without a rise; never when None.
        min_delta: a rise by this or less is none.
        keep: remove the files of the others; of none when None.
    """

    metric: str | None = None
    patience: int | None = None
    min_delta: float = 0.0
    keep: KeepRules | None = None

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_patience(self.patience, self.min_delta)


class Policies:
    """Acts on the runs that a validator follows.

    Args:
        wishes: what is asked for.
        deciding: the validator's validations -> the metric that decides which checkpoints are worth
            each of them; None for those that are done of every one.
    """

    def __init__(self, wishes: Wishes, deciding: Mapping[str, Metric | None]) -> None:
        self._wishes = wishes
        self._deciding = deciding
        self._metrics: dict[str, Metric] = {}
        self._marked: dict[str, tuple[int, float]] = {}
        self._cannot_remove = False
        self._gone: set[str] = set()

    def act(
        self,
        run: TrackedRun,
        checkpoints: Collection[Checkpoint],
        waiting: Collection[Checkpoint],
    ) -> None:
        """To be called when there are new figures.

        Args:
            run: which.
            checkpoints: of the run, as they were seen last.
            waiting: those that some validator will still do.

        Raises:
            UsageError: the run has no such metric.
            TrackingError: the server does not answer.
        """
        wishes = self._wishes
        if run.id not in self._metrics:
            self._metrics[run.id] = chosen_metric(run, wishes.metric)
        metric = self._metrics[run.id]
        top = max(
            metric_points(checkpoints, metric), key=lambda one: (one[1], -one[0]), default=None
        )
        if top is not None and self._marked.get(run.id) != top:
            # looked at anew: other validators mark, too
            mark_best(run, find_best(run, str(metric)))
            self._marked[run.id] = top
        if wishes.patience is not None:
            rising = metric
            if wishes.metric is None:  # what only the best get has no plateau
                rising = self._deciding.get(metric.validation) or metric
            stop_if_plateau(run, checkpoints, rising, wishes.patience, wishes.min_delta, waiting)
        if wishes.keep is not None and not self._cannot_remove:
            try:
                own = self._own(waiting)
                delete_unneeded(run, checkpoints, wishes.keep, wishes.metric, own, self._gone)
            except ForbiddenError as error:
                # who may validate need not be allowed to remove
                self._cannot_remove = True
                log.warning("files are not removed from now on: %s", error)
            except TrackingError as error:
                if not server_responds(run.client):
                    raise
                log.warning("files are not removed now: %s", error)

    def _own(self, waiting: Collection[Checkpoint]) -> ValidatorScope:
        deciding = {name: by.validation if by else name for name, by in self._deciding.items()}
        return ValidatorScope(deciding, {one.model_id for one in waiting})
