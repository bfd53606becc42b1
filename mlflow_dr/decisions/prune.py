"""Pruning: deciding what goes of a run, or of deleted runs, and doing it or only looking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from mlflow_dr.decisions.keep import Own, Policy, Verdict, select
from mlflow_dr.errors import ForbiddenError, TrackingError
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoints_of
from mlflow_dr.tracking.client import Client, answers
from mlflow_dr.tracking.orphans import RunState, orphans
from mlflow_dr.tracking.pruning import (
    Stored,
    in_use,
    is_whole,
    needed,
    not_in_mlflow,
    prune,
    registered,
    remove_entity,
    stored,
)
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import (
    chosen_metric,
    steps_searched_with,
    steps_taken,
    validations_of,
)

log = logging.getLogger(__name__)

MEGABYTE = 1_000_000
WHY_KEPT: Mapping[RunState, Callable[[Checkpoint], str]] = {
    RunState.ACTIVE: needed,
    RunState.DELETED: in_use,
    RunState.GONE: not_in_mlflow,
}


class Outcome(NamedTuple):
    """What has become of a checkpoint, and the files that are there, or were."""

    verdict: Verdict
    stored: Stored

    def __str__(self) -> str:
        one = self.verdict.checkpoint
        size = f"{self.stored.bytes / MEGABYTE:.1f} MB in {self.stored.files} files"
        word = "goes" if self.verdict.goes else "stays"
        return f"step {one.step}  models:/{one.model_id}  {size}  {word}: {self.verdict.reason}"


def review(
    run: TrackedRun, policy: Policy, asked: str | None = None, unvalidated: bool = False
) -> list[Verdict]:
    """What is to become of each checkpoint of a run that has files.

    Args:
        run: whose.
        policy: what is kept.
        asked: the metric that the best are best by, as `chosen_metric` takes it.
        unvalidated: whether checkpoints may go that a validation is still to be done of.

    Raises:
        UsageError: the best are to be kept, and the run has no such metric.
        TrackingError: the server does not answer.
    """
    return _reviewed(run, checkpoints_of(run), policy, asked, unvalidated)


def review_orphans(client: Client, experiment: str | None = None) -> list[Verdict]:
    """What is to become of the checkpoints of deleted runs: most of them go.

    Kept are registered ones, and those that are being published or validated, as long as their run
    could be restored.

    Args:
        client: where.
        experiment: of this experiment only, by name.

    Raises:
        TrackingError: no such experiment, or the server does not answer.
    """
    found = orphans(client, experiment)
    versions = registered(client, [one.checkpoint for one in found])
    verdicts: list[Verdict] = []
    for checkpoint, state in found:
        reason = WHY_KEPT[state](checkpoint) or versions.get(checkpoint.model_id, "")
        why = f"run {checkpoint.run_id} is {state.value}"
        if state is RunState.GONE or not checkpoint.is_gone:
            verdicts.append(Verdict(checkpoint, not reason, reason or why, state))
    return verdicts


def outcomes(
    client: Client, verdicts: Iterable[Verdict], dry_run: bool = False
) -> Iterator[Outcome]:
    """Remove the files of what goes, one after another; of runs that are gone, the entity too.

    One that has come into use since it was looked at stays; of one whose files somebody else has
    removed since, nothing is said.

    Args:
        client: where.
        verdicts: what was decided.
        dry_run: only look.

    Raises:
        TrackingError: the server does not answer, or the artifact store refuses.
    """
    for verdict in verdicts:
        if dry_run or not verdict.goes:
            yield Outcome(verdict, stored(client, verdict.checkpoint))
            continue
        removal = prune(client, verdict.checkpoint, WHY_KEPT[verdict.run])
        if removal.kept:
            kept = verdict._replace(goes=False, reason=removal.kept)
            yield Outcome(kept, stored(client, verdict.checkpoint))
            continue
        if verdict.run is RunState.GONE:
            remove_entity(client, verdict.checkpoint)
        elif removal.was_gone:
            continue
        yield Outcome(verdict, removal.stored)


def keep_only(
    run: TrackedRun,
    checkpoints: Collection[Checkpoint],
    policy: Policy,
    asked: str | None = None,
    own: Own | None = None,
    gone: set[str] | None = None,
) -> list[Outcome]:
    """Remove what a policy does not keep of a run, as a validator does after each checkpoint.

    A checkpoint whose files cannot be removed is told in the log, and stays for the next call.

    Args:
        run: whose checkpoints.
        checkpoints: all of the run, as they were seen last.
        policy: what is kept.
        asked: the metric that the best are best by, as `chosen_metric` takes it.
        own: what the validator does; None of one that does everything.
        gone: model ids of checkpoints that are known to have no files, and are passed over; those
            that have none now are added.

    Returns:
        What was removed.

    Raises:
        UsageError: the best are to be kept, and the run has no such metric.
        ForbiddenError: this user may not remove files.
        TrackingError: the server does not answer.
    """
    gone = set() if gone is None else gone
    left = [one for one in checkpoints if one.model_id not in gone]
    removed: list[Outcome] = []
    for verdict in _reviewed(run, left, policy, asked, own=own):
        if not verdict.goes:
            continue
        try:
            found = list(outcomes(run.client, [verdict]))
        except ForbiddenError:
            raise
        except TrackingError as error:
            if not answers(run.client):
                raise
            log.warning("%s; this is tried again", error)
            continue
        if any(not one.verdict.goes for one in found):
            continue
        gone.add(verdict.checkpoint.model_id)
        removed += found
        for one in found:
            log.info("removed the files of %s", one)
    return removed


def summary(done: Collection[Outcome], dry_run: bool = False) -> str:
    """How many checkpoints went, and how much room they had taken, in a line."""
    gone = [one for one in done if one.verdict.goes]
    size = sum(one.stored.bytes for one in gone) / MEGABYTE
    words = "would be removed" if dry_run else "removed"
    return f"{len(gone)} of {len(done)} checkpoints {words}: {size:.1f} MB"


def _reviewed(
    run: TrackedRun,
    checkpoints: Collection[Checkpoint],
    policy: Policy,
    asked: str | None,
    unvalidated: bool = False,
    own: Own | None = None,
) -> list[Verdict]:
    metric = chosen_metric(run, asked) if policy.best or asked else None
    names = validations_of(run)
    taken = steps_taken(run)
    steps = steps_searched_with(names)
    reasons = {
        one.model_id: f"chooses the subset of {steps[one.step]}"
        for one in checkpoints
        if one.step in steps and is_whole(one)
    }
    verdicts = select(checkpoints, policy, metric, names, reasons, unvalidated, own, taken)
    if going := [one.checkpoint for one in verdicts if one.goes]:
        reasons |= registered(run.client, going)
        verdicts = select(checkpoints, policy, metric, names, reasons, unvalidated, own, taken)
    return verdicts
