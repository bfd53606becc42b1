"""What a validator has done, and what it has not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """How many checkpoints were validated, and how many were not.

    Attributes:
        done: validated.
        validations: of these checkpoints, all together.
        nothing: why nothing could be done; empty where something was, or had been before.
        failed: noted as FAILED, because no encoder can be read from them.
        passed_over: FAILED before, or noted so by another validator.
        unavailable: left to other validators, because they cannot be fetched or read here.
    """

    done: int = 0
    validations: int = 0
    nothing: str = ""
    failed: int = 0
    passed_over: int = 0
    unavailable: int = 0

    @property
    def checkpoints(self) -> str:
        """What was validated, in words."""
        several = f" ({self.validations} validations)" if self.validations > self.done else ""
        return f"{self.done} checkpoints{several}"

    @property
    def are_good(self) -> bool:
        """Whether everything that was to be done is done."""
        return not (self.failed or self.passed_over or self.unavailable or self.nothing)

    def __str__(self) -> str:
        words = f"{self.failed} failed"
        if self.passed_over:
            words += f", {self.passed_over} passed over that had FAILED (--retry-failed)"
        if self.unavailable:
            words += f", {self.unavailable} left that cannot be read here"
        return words
