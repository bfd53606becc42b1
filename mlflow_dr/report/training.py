"""A training that has ended, as a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlflow_dr import pages
from mlflow_dr.report.contents import training_losses
from mlflow_dr.report.figures import loss_figure
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TrainedRun:
    """A training that has ended.

    Attributes:
        id: of the MLflow run.
        name: of the run.
        losses: step and training loss.
        steps: of the checkpoints that were published.
    """

    id: str
    name: str
    losses: Sequence[tuple[int, float]]
    steps: Sequence[int]

    def frame(self) -> pd.DataFrame:
        """A row for each step that has a loss."""
        import pandas as pd

        return pd.DataFrame(self.losses, columns=["step", "loss"])

    def __repr__(self) -> str:
        steps = ", ".join(map(str, self.steps))
        return f"run {self.name} ({self.id}); checkpoints of steps {steps}"

    def _repr_html_(self) -> str:
        shown = [pages.paragraph(repr(self))]
        if self.losses:
            shown.append(pages.picture(loss_figure(self.losses)))
        return "\n".join(shown)


def trained_run(run: TrackedRun) -> TrainedRun:
    """What there is to say of a training.

    Raises:
        TrackingError: the server does not answer.
    """
    steps = [checkpoint.step for checkpoint in run_checkpoints(run) if checkpoint.ready]
    return TrainedRun(run.id, run.name, training_losses(run), steps)
