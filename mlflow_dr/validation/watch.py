"""Follow a run and validate each of its checkpoints once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.interface import chosen_split
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.engines.devices import AUTO, resolve_device, resolve_dtype
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.retrieval.measures import check_depth
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoints_of, fetched
from mlflow_dr.tracking.results import (
    State,
    claim_name,
    known_config,
    mark_failed,
    record_result,
    state_of,
    write_recorded,
)
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    SPLIT_PARAM,
    TrackedRun,
    check_alive,
    is_over,
)
from mlflow_dr.validation.evaluate import Prepared, Report, Settings, evaluate

log = logging.getLogger(__name__)

DEFAULT_NAME = "val"


@dataclass(frozen=True)
class Validation:
    """What is measured on every checkpoint of a run.

    Attributes:
        settings: measures, depth, device, dtype.
        name: prefixes the metrics.
        dataset: the collection; the run's own when None.
        split: the split; the run's own, or the collection's development split, when None.
    """

    settings: Settings
    name: str = DEFAULT_NAME
    dataset: str | None = None
    split: str | None = None


@dataclass
class Counts:
    """How many checkpoints were validated, and how many could not be."""

    done: int = 0
    failed: int = 0


def watch(
    run: TrackedRun,
    validation: Validation,
    follow: bool = True,
    poll_seconds: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Counts:
    """Validate the checkpoints of a run, oldest first, each once, and write figures to the run.

    Args:
        run: the run to follow.
        validation: what to measure.
        follow: wait for checkpoints until the run has ended; else do what is there and return.
        poll_seconds: time between two looks at the server, which cost two requests each.
        sleep: waits; passed in by tests.

    Raises:
        UsageError: the name stands for another configuration on this run, or an unknown dataset.
        TrackingError: the server or the run is gone.
    """
    if follow and not _can_prepare(run, validation):
        log.info("waiting until the trainer of run %s has said what it trains on", run.id)
        while not _can_prepare(run, validation):
            sleep(poll_seconds)
    prepared, settings = _prepare(run, validation)
    dataset = (prepared.collection.name, prepared.corpus.digest)
    counts = Counts()
    while True:
        # the end is read before the checkpoints, so that none published in between is missed
        state = run.fetch()
        check_alive(state)
        over = is_over(state)
        waiting = [one for one in checkpoints_of(run) if one.ready and _needed(one, validation)]
        if waiting:
            _validate(run, waiting[0], validation.name, settings, prepared, dataset, counts)
        elif over or not follow:
            break
        else:
            sleep(poll_seconds)
    log.info("validated %d checkpoints of run %s; %d failed", counts.done, run.id, counts.failed)
    return counts


def _needed(checkpoint: Checkpoint, validation: Validation) -> bool:
    return state_of(checkpoint, validation.name) in (State.OPEN, State.RECORDED)


def _can_prepare(run: TrackedRun, validation: Validation) -> bool:
    """Whether dataset and split are known, or the run says no more: it is over, or publishes."""
    state = run.fetch()
    check_alive(state)
    params = state.data.params
    dataset = validation.dataset or DATASET_PARAM in params
    known = dataset and (validation.split or SPLIT_PARAM in params)
    return bool(known) or is_over(state) or bool(checkpoints_of(run))


def _prepare(run: TrackedRun, validation: Validation) -> tuple[Prepared, Settings]:
    data = run.fetch().data
    name = validation.dataset or data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM)
    if not name:
        raise UsageError(f"run {run.id} names no dataset (param {DATASET_PARAM!r}); give --dataset")
    collection = open_collection(name)
    split = chosen_split(collection, validation.split or data.params.get(SPLIT_PARAM))
    prepared = Prepared(collection, split)

    settings = validation.settings
    device = resolve_device(settings.device)
    known = known_config(run, validation.name) or {}
    dtype = str(known.get("dtype", AUTO)) if settings.dtype == AUTO else settings.dtype
    settings = replace(settings, dtype=resolve_dtype(dtype, device))
    claim_name(run, validation.name, _config(prepared, settings))
    queries, passages = len(prepared.topics.queries), len(prepared.corpus)
    log.info(
        "validation %r of run %s: %s/%s, %d queries, %d passages, %s on %s",
        *(validation.name, run.id, name, split, queries, passages, settings.dtype, device),
    )
    run.log_collection(
        name,
        prepared.corpus.digest,
        collection.source,
        {"passages": passages, "queries": queries, "split": split},
        context=f"validation {validation.name}",
    )
    return prepared, settings


def _config(prepared: Prepared, settings: Settings) -> dict[str, Any]:
    """What a validation's figures depend on, beside the checkpoint."""
    return {
        "corpus": prepared.corpus.digest,
        "topics": prepared.topics.digest,
        "split": prepared.split,
        "subset": "full",
        "measures": " ".join(map(str, settings.measures)),
        "depth": check_depth(settings.measures, settings.depth),
        "dtype": settings.dtype,
        "keep_own_id": settings.keep_own_id,
    }


def _validate(
    run: TrackedRun,
    checkpoint: Checkpoint,
    name: str,
    settings: Settings,
    prepared: Prepared,
    dataset: tuple[str, str],
    counts: Counts,
) -> None:
    if state_of(checkpoint, name) is State.RECORDED:
        figures = write_recorded(run, checkpoint, name, dataset)
    else:
        try:
            with fetched(checkpoint) as directory:
                encoder = load_encoder(directory, safetensors_only=True)
            report = evaluate(encoder, prepared, settings)
        except CheckpointError as error:
            log.error("step %d cannot be validated: %s", checkpoint.step, error)
            mark_failed(run, checkpoint, name, str(error))
            counts.failed += 1
            return
        figures = record_result(run, checkpoint, name, _figures(report), dataset)
    counts.done += 1
    log.info("step %d: %s", checkpoint.step, "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def _figures(report: Report) -> dict[str, float]:
    """A report as metrics, named as MLflow allows."""
    measured = {key.replace("@", "_at_"): value for key, value in report.measures.items()}
    return {
        **measured,
        "seconds": report.seconds,
        "passages_per_second": report.passages / report.seconds,
    }
