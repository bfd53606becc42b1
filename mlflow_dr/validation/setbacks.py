"""What a validator cannot do on its machine: when it tries again, and when it gives up."""

from __future__ import annotations

from collections import Counter

from mlflow_dr.errors import UnavailableError
from mlflow_dr.tracking.checkpoints import Checkpoint

TRIES = 5  # of one checkpoint
IN_A_ROW = 12  # of any
LONGEST_WAIT = 60.0


class Setbacks:
    """Counts the tries to fetch and read checkpoints that have failed, with growing waits.

    A missing module, credentials or a store that does not answer are this validator's trouble.
    The claim is given back, and other checkpoints come first. After five tries it leaves a
    checkpoint to other validators; after twelve in a row, of any checkpoints, it ends.

    Args:
        seconds: to wait after the first failure; twice as long after each of the next.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tries: Counter[str] = Counter()
        self._in_a_row = 0

    def note(self, checkpoint: Checkpoint, error: UnavailableError) -> float:
        """A checkpoint could not be had; returns how many seconds to wait.

        Raises:
            UnavailableError: that is too often in a row.
        """
        weight = TRIES if error.lasting else 1
        self._tries[checkpoint.model_id] += weight
        self._in_a_row += weight
        if self._in_a_row >= IN_A_ROW:
            raise UnavailableError(
                f"this validator cannot read checkpoints, last step {checkpoint.step}: {error}; "
                "mend that and start it again, others go on with what is left"
            ) from error
        if error.lasting:
            return 0.0
        return min(self._seconds * 2.0 ** (self._in_a_row - 1), LONGEST_WAIT)

    def note_success(self) -> None:
        """A checkpoint could be had."""
        self._in_a_row = 0

    @property
    def is_in_one(self) -> bool:
        """Whether the last checkpoint could not be had."""
        return self._in_a_row > 0

    def tries(self, checkpoint: Checkpoint) -> int:
        """How often a checkpoint could not be had."""
        return self._tries[checkpoint.model_id]

    def has_given_up(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is left to other validators."""
        return self._tries[checkpoint.model_id] >= TRIES
