"""What the loop of a validator asks of a kind of checkpoints: encoders, or readers."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any, Protocol

from mlflow_dr.time_limit import TimeLimit
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.prefetch import CheckpointFiles
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.report import Report


class ResolvedValidation(Protocol):
    """A validation on one run."""

    @property
    def name(self) -> str:
        """Prefixes the metrics."""

    @property
    def group(self) -> Hashable:
        """Equal for validations that are evaluated together."""

    @property
    def shown_dataset(self) -> tuple[str, str]:
        """Name and digest of the dataset, as MLflow shows them."""

    @property
    def query_texts(self) -> Mapping[str, str]:
        """The texts of the queries, by id, where they are known."""


class CheckpointKind(Protocol):
    """How checkpoints of a kind are read and evaluated."""

    @property
    def model_type(self) -> str:
        """What MLflow shows as the type of such models."""

    @property
    def awaited_steps(self) -> Collection[int]:
        """The steps of checkpoints that are needed before a run can be resolved."""

    @property
    def keeps_model(self) -> bool:
        """Whether a checkpoint's model is evaluated several times in a row."""

    def start(self) -> None:
        """Refuse what cannot work on this machine."""

    def has_data(self, params: Mapping[str, str]) -> bool:
        """Whether the params of a run name the data of all validations."""

    def resolve(self, run: TrackedRun, is_ahead: bool) -> Sequence[ResolvedValidation] | None:
        """The validations on a run; their names stand for their configurations from now on.

        Args:
            run: whose checkpoints are validated.
            is_ahead: whether there may be no checkpoint yet. If a checkpoint is needed to resolve
                them, only the data is opened then, and None is returned.

        Raises:
            MlflowDrError: the validations do not fit the run.
            TrackingError: the server does not answer.
        """

    def load(self, checkpoint: Checkpoint, files: CheckpointFiles) -> Any:
        """Fetch and read a checkpoint; a thread may do this while another one is evaluated.

        Args:
            checkpoint: which one.
            files: fetches it.

        Raises:
            UnavailableError: it cannot be fetched or read on this machine.
            CheckpointError: it cannot be read anywhere.
        """

    def evaluate(
        self,
        model: Any,
        checkpoint: Checkpoint,
        validations: Sequence[Any],
        limit: TimeLimit,
    ) -> Sequence[Report]:
        """A report of each of some validations of one group.

        Args:
            model: what `load` gave.
            checkpoint: which one it is, for messages.
            validations: as `resolve` gave them.
            limit: of the time that counts.

        Raises:
            TimeIsUp: it takes too long.
            UnavailableError: something breaks that may be this machine's fault as well.
            CheckpointError: the checkpoint cannot be evaluated anywhere.
            OSError: the disk is full.
        """

    def close(self) -> None:
        """Give back what is held."""
