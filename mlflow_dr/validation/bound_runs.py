"""Which runs are followed, and a plan's validations as they are on each of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from mlflow_dr.errors import MlflowDrError, TrackingError
from mlflow_dr.tracking.following import Followed
from mlflow_dr.tracking.patience import Patience
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    SPLIT_PARAM,
    TrackedRun,
    check_alive,
    is_over,
)
from mlflow_dr.tracking.validations import MAIN_PARAM, tag_validation_steps
from mlflow_dr.validation.binding import Bound, Collections, is_early
from mlflow_dr.validation.plan import Plan
from mlflow_dr.validation.trying import is_tried

log = logging.getLogger(__name__)


class BoundRuns:
    """Binds a plan's validations to runs, each once.

    Args:
        followed: whose runs.
        plan: its validations.
        patiently: does what needs the server.
        sleep: waits; passed in by tests.
    """

    def __init__(
        self,
        followed: Followed,
        plan: Plan,
        patiently: Patience,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._followed = followed
        self._plan = plan
        self._patiently = patiently
        self._sleep = sleep
        self._collections = Collections()
        self._bound: dict[str, list[Bound]] = {}

    def __len__(self) -> int:
        return len(self._bound)

    def known(self, run_id: str) -> list[Bound] | None:
        """Those of a run; none where it is passed over, None where it is not bound yet."""
        return self._bound.get(run_id)

    def pass_over(self, run_id: str) -> None:
        """Nothing is done on this run any more."""
        self._bound[run_id] = []

    def bind_ahead(self, run: TrackedRun) -> None:
        """Open the collections before the first checkpoint is there, as soon as they are known.

        Raises:
            UsageError: the run says too little, or something else.
            TrackingError: it is gone.
        """
        said = False
        while not self._patiently(partial(self._can_bind, run)):
            if not self._plan.follow:
                break
            if not said:
                log.info("waiting until run %s has what its validations need", run.id)
                said = True
            self._sleep(self._plan.poll_seconds)
        self._patiently(partial(self.of, run, ahead=True))

    def is_early(self, run: TrackedRun) -> bool:
        """Whether a checkpoint that a subset is chosen by is still to come.

        Raises:
            TrackingError: the server does not answer.
        """
        return self._plan.follow and is_early(run, self._plan.validations)

    def of(self, run: TrackedRun, ahead: bool = False) -> list[Bound]:
        """The validations as they are on a run; none where the run says too little for them.

        Args:
            run: whose checkpoints are validated.
            ahead: whether there may be none yet to try the changes of encoders with.

        Raises:
            UsageError: the one run that is followed says too little, or something else.
            TrackingError: the server does not answer.
        """
        if run.id not in self._bound:
            changes = self._plan.encoder_changes
            names = [one.name for one in self._plan.validations]
            try:
                if not is_tried(run, names, changes) and ahead:
                    for one in self._plan.validations:
                        self._collections.prepare(run, one)
                    return []
                bound = [
                    self._collections.bind(run, one, changes) for one in self._plan.validations
                ]
                self._note(run)
                self._bound[run.id] = bound
            except TrackingError:
                raise
            except MlflowDrError as error:
                if self._followed.run is not None:
                    raise
                log.error("run %s is passed over: %s", run.id, error)
                self.pass_over(run.id)
        return self._bound[run.id]

    def _note(self, run: TrackedRun) -> None:
        """Say on a run which validation decides, and which checkpoints they are done of."""
        plan = self._plan
        if not plan.keep_up:
            run.set_param_once(MAIN_PARAM, plan.validations[0].name)
        chooses = plan.keep_up or plan.max_lag_seconds is not None
        tag_validation_steps(
            run,
            {one.name: 0 if chooses or one.refines else plan.every for one in plan.validations},
        )

    def _can_bind(self, run: TrackedRun) -> bool:
        """Whether dataset and split are known, or the run says no more: over, or publishing.

        And so are the checkpoints that subsets are chosen by.
        """
        state = run.fetch()
        check_alive(state)
        params = state.data.params
        known = all(
            (one.dataset or DATASET_PARAM in params) and (one.split or SPLIT_PARAM in params)
            for one in self._plan.validations
        )
        known = known or is_over(state) or bool(self._followed.look().checkpoints)
        return known and not self.is_early(run)
