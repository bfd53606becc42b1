"""What to keep: which checkpoints' files go, and why each of the others stays."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.orphans import RunState
from mlflow_dr.tracking.pruning import is_whole, needed
from mlflow_dr.tracking.results import State, state_of
from mlflow_dr.tracking.validations import Metric, value_of

EXAMPLE = "best:3,last:2,every:10000"


@dataclass(frozen=True)
class Policy:
    """Which checkpoints of a run are kept; 0 is no rule.

    Attributes:
        best: so many, by a metric.
        last: so many, by step.
        every: those whose step this divides.
    """

    best: int = 0
    last: int = 0
    every: int = 0

    def __str__(self) -> str:
        rules = {one.name: getattr(self, one.name) for one in fields(self)}
        return ",".join(f"{name}:{number}" for name, number in rules.items() if number)


@dataclass(frozen=True)
class Own:
    """What a validator does of a run's checkpoints, as far as it is known to it.

    Attributes:
        deciding: its validations -> what decides whether a checkpoint is worth each of them: the
            cheap one that it refines, or itself.
        waiting: model ids of checkpoints that something remains to be done for, be it by others.
    """

    deciding: Mapping[str, str]
    waiting: Collection[str]

    def is_judged(self, checkpoint: Checkpoint, metric: Metric | None) -> bool:
        """Whether nothing is left, and what decides has been done: by a metric, or at all.

        What was passed over (other steps, those that were READY for too long) may be another's.
        """
        if checkpoint.model_id in self.waiting:
            return False
        decides = metric and self.deciding.get(metric.validation)
        names = [decides] if decides else self.deciding.values()
        return any(_is_settled(checkpoint, name) for name in names)


class Verdict(NamedTuple):
    """Whether a checkpoint's files go, and why, or why not; what its run is."""

    checkpoint: Checkpoint
    goes: bool
    reason: str
    run: RunState = RunState.ACTIVE


def parse_policy(text: str) -> Policy:
    """A policy from words such as `best:3,last:2,every:10000`.

    Raises:
        UsageError: an unknown rule, one without a number, or one that is given twice.
    """
    rules: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.partition(":")
        if name not in {one.name for one in fields(Policy)}:
            near = did_you_mean(name, (one.name for one in fields(Policy)))
            raise UsageError(f"no rule {quoted(word)} of what to keep; rules are {EXAMPLE}{near}")
        if not re.fullmatch(r"0*[1-9][0-9]{0,17}", number):
            raise UsageError(f"{quoted(word)}: expected {name}:N with a number from 1 on")
        if name in rules:
            raise UsageError(f"two rules {name!r} of what to keep in {text!r}")
        rules[name] = int(number)
    if not rules:
        raise UsageError(f"nothing says what to keep; rules are {EXAMPLE}")
    return Policy(**rules)


def select(
    checkpoints: Collection[Checkpoint],
    policy: Policy,
    metric: Metric | None,
    validations: Collection[str],
    reasons: Mapping[str, str],
    unvalidated: bool = False,
    own: Own | None = None,
    taken: Mapping[str, int] | None = None,
) -> list[Verdict]:
    """What becomes of each checkpoint of a run that has files, by step.

    Kept whatever the policy says: those that are being published or validated, called the best, or
    registered; those that a subset is chosen by, or a trainer writes into a directory; and, unless
    `unvalidated`, those that a validation is still to be done of. What an interrupted call has
    begun to remove goes.

    Args:
        checkpoints: all of the run, as they were seen last.
        policy: what is kept.
        metric: what the best are best by, higher being better; None where no rule needs it.
        validations: names of those that are to be done of each checkpoint.
        reasons: model id -> why it is kept: registered, or what a subset is chosen by.
        unvalidated: whether checkpoints may go that a validation is still to be done of.
        own: of these validations, those that are done by who asks, which does not do all of them of
            each checkpoint.
        taken: validation -> the steps that it is done of, as `steps_taken` gives them.
    """
    kept = _kept_by(policy, metric, [one for one in checkpoints if is_whole(one)])
    verdicts: list[Verdict] = []
    for one in sorted(checkpoints, key=lambda one: (one.step, one.created_ms)):
        if one.is_gone:
            continue
        reason = needed(one) or reasons.get(one.model_id, "")
        if not reason and is_whole(one):
            if not unvalidated:
                reason = _why_unvalidated(one, validations, metric, own, taken or {})
            reason = reason or ", ".join(kept.get(one.model_id, []))
        verdicts.append(Verdict(one, not reason, reason or _why_it_goes(one, policy)))
    return verdicts


def _kept_by(
    policy: Policy, metric: Metric | None, whole: Collection[Checkpoint]
) -> dict[str, list[str]]:
    """Model id -> the rules that keep it."""
    kept: dict[str, list[str]] = {one.model_id: [] for one in whole}
    if policy.best and metric is not None:
        values = [(one, value_of(one, metric)) for one in whole]
        numbers = [(one, v) for one, v in values if v is not None and not math.isnan(v)]
        numbers.sort(key=lambda one: (-one[1], one[0].step))
        for rank, (one, _) in enumerate(numbers[: policy.best], start=1):
            kept[one.model_id].append(f"best {rank} of {metric}")
    by_step = sorted(whole, key=lambda one: (one.step, one.created_ms))
    for one in by_step[-policy.last :] if policy.last else ():
        kept[one.model_id].append("last")
    for one in by_step if policy.every else ():
        if one.step % policy.every == 0:
            kept[one.model_id].append(f"every {policy.every}")
    return kept


def _why_unvalidated(
    checkpoint: Checkpoint,
    validations: Collection[str],
    metric: Metric | None,
    own: Own | None,
    taken: Mapping[str, int],
) -> str:
    """Which validations are still to be done of a checkpoint; empty where none is."""
    others = [one for one in validations if own is None or one not in own.deciding]
    left = [
        name
        for name in others
        if not _is_settled(checkpoint, name) and _takes(taken.get(name, 1), checkpoint.step)
    ]
    if own is not None and not own.is_judged(checkpoint, metric):
        left += [name for name in own.deciding if not _is_settled(checkpoint, name)]
        return f"not validated yet{_by(left)}"
    return f"not validated yet{_by(left)}" if left or not validations else ""


def _takes(every: int, step: int) -> bool:
    """Whether a validation is done of a step; one that chooses by itself is not waited for."""
    return bool(every) and step % every == 0


def _by(names: Collection[str]) -> str:
    return f" by {', '.join(sorted(names))}" if names else ""


def _is_settled(checkpoint: Checkpoint, name: str) -> bool:
    return state_of(checkpoint, name) in (State.DONE, State.FAILED)


def _why_it_goes(checkpoint: Checkpoint, policy: Policy) -> str:
    if checkpoint.is_pruned:
        return "begun before"
    return f"none of {policy}" if checkpoint.ready else "never published whole"
