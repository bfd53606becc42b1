"""Pruning: which checkpoints' files are deleted, why each of the others stays, and doing it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from mlflow_dr.errors import ForbiddenError, TrackingError, UsageError, did_you_mean, quoted
from mlflow_dr.tracking.checkpoints import Checkpoint, run_checkpoints
from mlflow_dr.tracking.client import Client, server_responds
from mlflow_dr.tracking.pruning import (
    RunState,
    Stored,
    delete_entity,
    delete_files,
    keep_reason,
    orphans,
    registered_versions,
    stored_files,
)
from mlflow_dr.tracking.results import is_finished
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import (
    Metric,
    chosen_metric,
    metric_value,
    run_validations,
    subset_encoder_steps,
    validation_steps,
)

log = logging.getLogger(__name__)

EXAMPLE = "best:3,last:2,every:10000"
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class KeepRules:
    """Which checkpoints of a run are kept; 0 switches a rule off.

    Attributes:
        best: so many, by a metric.
        last: so many, by step.
        every: those whose step is a multiple of this.
    """

    best: int = 0
    last: int = 0
    every: int = 0

    def __str__(self) -> str:
        rules = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}:{number}" for name, number in rules.items() if number)


@dataclass(frozen=True)
class ValidatorScope:
    """Which validations of a run a validator does itself.

    Attributes:
        deciding: name of each of its validations -> the validation that decides whether a
            checkpoint is worth it: the cheap one that it refines, or itself.
        waiting: model ids of checkpoints that some validator will still do.
    """

    deciding: Mapping[str, str]
    waiting: Collection[str]

    def is_judged(self, checkpoint: Checkpoint, metric: Metric | None) -> bool:
        """Whether no validator will do more, and the validation that decides is finished.

        Without a metric one finished validation is enough: those that this validator skipped may
        be another validator's.
        """
        if checkpoint.model_id in self.waiting:
            return False
        decides = metric and self.deciding.get(metric.validation)
        names = [decides] if decides else self.deciding.values()
        return any(is_finished(checkpoint, name) for name in names)


class Verdict(NamedTuple):
    """What happens to the files of a checkpoint.

    Attributes:
        checkpoint: whose files.
        deletes: whether they are deleted.
        reason: why, or why not.
        run: the state of the checkpoint's run.
        stored: the files that are there, or were; None until they are counted.
    """

    checkpoint: Checkpoint
    deletes: bool
    reason: str
    run: RunState = RunState.ACTIVE
    stored: Stored | None = None

    def __str__(self) -> str:
        files, size = self.stored or Stored(0, 0)
        return (
            f"step {self.checkpoint.step}  {self.checkpoint.uri}  {size / MEGABYTE:.1f} MB in "
            f"{files} files  {'delete' if self.deletes else 'keep'}: {self.reason}"
        )


def parse_keep_rules(text: str) -> KeepRules:
    """Rules from a text such as `best:3,last:2,every:10000`.

    Raises:
        UsageError: an unknown rule, one without a number, or one that is given twice.
    """
    names = [field.name for field in fields(KeepRules)]
    rules: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        name, _, number = word.partition(":")
        if name not in names:
            near = did_you_mean(name, names)
            raise UsageError(f"unknown rule {quoted(word)}; write rules such as {EXAMPLE}{near}")
        if not re.fullmatch(r"0*[1-9][0-9]{0,17}", number):
            raise UsageError(f"{quoted(word)}: expected {name}:N with a number N from 1 on")
        if name in rules:
            raise UsageError(f"rule {name!r} is given twice in {text!r}")
        rules[name] = int(number)
    if not rules:
        raise UsageError(f"no rule says what to keep; write rules such as {EXAMPLE}")
    return KeepRules(**rules)


def select(
    checkpoints: Collection[Checkpoint],
    rules: KeepRules,
    metric: Metric | None,
    validations: Mapping[str, int],
    reasons: Mapping[str, str] | None = None,
    unvalidated: bool = False,
    scope: ValidatorScope | None = None,
) -> list[Verdict]:
    """Decide about each checkpoint of a run that has files, by step.

    Some stay whatever the rules say: those with a `keep_reason`, those in `reasons`, and, unless
    `unvalidated`, those with an unfinished validation. An interrupted deletion is finished.

    Args:
        checkpoints: all of the run, as they were seen last.
        rules: what is kept.
        metric: orders the best; None where no rule needs it.
        validations: name of each validation of the run -> it takes the steps that are multiples of
            this number; 0 where it chooses them itself.
        reasons: model id -> another reason to keep it.
        unvalidated: also delete checkpoints with an unfinished validation.
        scope: what the calling validator does itself; None if the caller does not validate.
    """
    complete = [checkpoint for checkpoint in checkpoints if checkpoint.has_all_files]
    kept = _kept_by_rules(rules, metric, complete)
    verdicts: list[Verdict] = []
    for checkpoint in sorted(
        checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.created_ms)
    ):
        if checkpoint.is_fully_pruned:
            continue
        reason = keep_reason(checkpoint) or (reasons or {}).get(checkpoint.model_id, "")
        if not reason and checkpoint.has_all_files:
            if not unvalidated:
                reason = _unfinished(checkpoint, validations, metric, scope)
            reason = reason or ", ".join(kept.get(checkpoint.model_id, []))
        verdicts.append(Verdict(checkpoint, not reason, reason or _why_deleted(checkpoint, rules)))
    return verdicts


def _kept_by_rules(
    rules: KeepRules, metric: Metric | None, checkpoints: Collection[Checkpoint]
) -> dict[str, list[str]]:
    """Model id -> the rules that keep it."""
    kept: dict[str, list[str]] = {checkpoint.model_id: [] for checkpoint in checkpoints}
    by_step = sorted(checkpoints, key=lambda checkpoint: (checkpoint.step, checkpoint.created_ms))
    if rules.best and metric is not None:
        scored = [
            (value, checkpoint.model_id)
            for checkpoint in by_step
            if (value := metric_value(checkpoint, metric)) is not None and not math.isnan(value)
        ]
        scored.sort(
            key=lambda pair: -metric.sign * pair[0]
        )  # of equal values the earlier step is better
        for rank, (_, model_id) in enumerate(scored[: rules.best], start=1):
            kept[model_id].append(f"best {rank} of {metric}")
    for checkpoint in by_step[-rules.last :] if rules.last else ():
        kept[checkpoint.model_id].append("last")
    for checkpoint in by_step if rules.every else ():
        if checkpoint.step % rules.every == 0:
            kept[checkpoint.model_id].append(f"every {rules.every}")
    return kept


def _unfinished(
    checkpoint: Checkpoint,
    validations: Mapping[str, int],
    metric: Metric | None,
    scope: ValidatorScope | None,
) -> str:
    """The validations that must finish before a checkpoint is deleted; empty for none."""
    own = scope.deciding if scope else {}
    waits_for_own = scope is not None and not scope.is_judged(checkpoint, metric)
    names = [*own] if waits_for_own else []
    names += [
        name
        for name, every in validations.items()
        if name not in own and every and checkpoint.step % every == 0
    ]
    left = sorted(name for name in names if not is_finished(checkpoint, name))
    if left:
        return f"not validated yet by {', '.join(left)}"
    return "not validated yet" if waits_for_own or not validations else ""


def _why_deleted(checkpoint: Checkpoint, rules: KeepRules) -> str:
    if checkpoint.is_pruned:
        return "its deletion was interrupted"
    return f"no rule of {rules} keeps it" if checkpoint.ready else "its upload was never completed"


def review(
    run: TrackedRun,
    rules: KeepRules,
    metric: str | None = None,
    unvalidated: bool = False,
    scope: ValidatorScope | None = None,
    checkpoints: Collection[Checkpoint] | None = None,
) -> list[Verdict]:
    """Decide about each checkpoint of a run that has files.

    Args:
        run: whose checkpoints.
        rules: what is kept.
        metric: orders the best, as `chosen_metric` takes it.
        unvalidated: also delete checkpoints with an unfinished validation.
        scope: what the calling validator does itself; None if the caller does not validate.
        checkpoints: of the run, as they were seen last; asked for when None.

    Raises:
        UsageError: the best are to be kept, and the run has no such metric.
        TrackingError: the server does not answer.
    """
    chosen = chosen_metric(run, metric) if rules.best or metric else None
    configs, steps = run_validations(run), validation_steps(run)
    validations = {name: steps.get(name, 1) for name in configs}
    subsets = subset_encoder_steps(configs)
    checkpoints = run_checkpoints(run) if checkpoints is None else checkpoints
    reasons = {
        checkpoint.model_id: f"chooses the subset of {subsets[checkpoint.step]}"
        for checkpoint in checkpoints
        if checkpoint.step in subsets and checkpoint.has_all_files
    }
    verdicts = select(checkpoints, rules, chosen, validations, reasons, unvalidated, scope)
    return _keep_registered(run.client, verdicts)


def review_orphans(client: Client, experiment: str | None = None) -> list[Verdict]:
    """Decide about the checkpoints of deleted runs: most of them are deleted.

    Registered ones stay. As long as their run can be restored, so do those that are being
    published or validated.

    Args:
        client: of the tracking server.
        experiment: of this experiment only, by name.

    Raises:
        TrackingError: no such experiment, or the server does not answer.
    """
    verdicts: list[Verdict] = []
    for checkpoint, state in orphans(client, experiment):
        if state is RunState.GONE or not checkpoint.is_fully_pruned:
            reason = keep_reason(checkpoint, state)
            why = f"run {checkpoint.run_id} is {state.value}"
            verdicts.append(Verdict(checkpoint, not reason, reason or why, state))
    return _keep_registered(client, verdicts)


def _keep_registered(client: Client, verdicts: Collection[Verdict]) -> list[Verdict]:
    deleted = [verdict.checkpoint for verdict in verdicts if verdict.deletes]
    reasons = registered_versions(client, deleted) if deleted else {}
    return [
        verdict._replace(deletes=False, reason=reasons[verdict.checkpoint.model_id])
        if verdict.deletes and verdict.checkpoint.model_id in reasons
        else verdict
        for verdict in verdicts
    ]


def carry_out(
    client: Client, verdicts: Iterable[Verdict], dry_run: bool = False
) -> Iterator[Verdict]:
    """Delete files as decided, and of runs that are gone the LoggedModel, too.

    Yields each verdict with its files, when it was carried out. A checkpoint that has been claimed
    or tagged in the meantime is kept. A checkpoint that another process has deleted in the meantime
    is left out.

    Raises:
        TrackingError: the server does not answer, or the artifact store refuses.
    """
    for verdict in verdicts:
        checkpoint = verdict.checkpoint
        if dry_run or not verdict.deletes:
            yield verdict._replace(stored=stored_files(client, checkpoint))
            continue
        deletion = delete_files(client, checkpoint, verdict.run)
        if deletion.kept:
            stored = stored_files(client, checkpoint)
            yield verdict._replace(deletes=False, reason=deletion.kept, stored=stored)
            continue
        if verdict.run is RunState.GONE:
            delete_entity(client, checkpoint)
        elif deletion.was_gone:
            continue
        yield verdict._replace(stored=deletion.stored)


def delete_unneeded(
    run: TrackedRun,
    checkpoints: Collection[Checkpoint],
    rules: KeepRules,
    metric: str | None = None,
    scope: ValidatorScope | None = None,
    deleted: set[str] | None = None,
) -> list[Verdict]:
    """Delete the checkpoints that no rule keeps, as a validator does after each checkpoint.

    Files that cannot be deleted are logged, and left for the next call.

    Args:
        run: whose checkpoints.
        checkpoints: all of the run, as they were seen last.
        rules: what is kept.
        metric: orders the best, as `chosen_metric` takes it.
        scope: what the calling validator does itself.
        deleted: model ids of checkpoints that are known to have no files, which are skipped. This
            call adds what it deletes.

    Returns:
        What was deleted.

    Raises:
        UsageError: the best are to be kept, and the run has no such metric.
        ForbiddenError: this user may not delete files.
        TrackingError: the server does not answer.
    """
    deleted = set() if deleted is None else deleted
    left = [checkpoint for checkpoint in checkpoints if checkpoint.model_id not in deleted]
    done: list[Verdict] = []
    for verdict in review(run, rules, metric, scope=scope, checkpoints=left):
        if not verdict.deletes:
            continue
        try:
            results = list(carry_out(run.client, [verdict]))
        except ForbiddenError:
            raise
        except TrackingError as error:
            if not server_responds(run.client):
                raise
            log.warning("%s; this is tried again", error)
            continue
        if all(result.deletes for result in results):
            deleted.add(verdict.checkpoint.model_id)
            done += results
            for result in results:
                log.info("deleted the files of %s", result)
    return done


def pruning_summary(verdicts: Collection[Verdict], dry_run: bool = False) -> str:
    """How many checkpoints were deleted, and their size, in a line."""
    deleted = [verdict.stored for verdict in verdicts if verdict.deletes and verdict.stored]
    size = sum(stored.bytes for stored in deleted) / MEGABYTE
    verb = "would be deleted" if dry_run else "deleted"
    return f"{len(deleted)} of {len(verdicts)} checkpoints {verb}: {size:.1f} MB"
