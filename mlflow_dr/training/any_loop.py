"""Publishing from somebody else's training loop."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import chosen_split
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import checkpoints_of, ready_steps
from mlflow_dr.tracking.client import connect, tracking_errors, tracking_uri
from mlflow_dr.tracking.current import current_run_id, name_collection
from mlflow_dr.tracking.runs import TrackedRun, find_run
from mlflow_dr.training.publishable import source_of, unwrapped
from mlflow_dr.training.publishing import Publisher, close_at_exit, publish_state

log = logging.getLogger(__name__)

UNPUBLISHED = "unpublished"


def publish_checkpoint(
    model: Any,
    step: int,
    *,
    run_id: str | None = None,
    tokenizer: Any = None,
    dataset: str | None = None,
    split: str | None = None,
    wait: bool = True,
    **settings: Any,
) -> str | None:
    """Publish a model as the checkpoint of a training step, for validators to pick up.

    Of several ranks only the first one publishes; the others may call it too. A step that the run
    has already is not published again.

        with mlflow.start_run():
            for step, batch in enumerate(batches, start=1):
                ...
                if step % 1000 == 0:
                    publish_checkpoint(model, step, dataset="msmarco", wait=False)
            flush_checkpoints()

    Args:
        model: an mlflow_dr Encoder, a SentenceTransformer, a Hugging Face PreTrainedModel, or the
            directory of one of these. With `wait=False` a directory must stay as it is until it is
            published.
        step: the training step, which the figures will be logged at.
        run_id: the MLflow run; MLflow's active run, else `$MLFLOW_RUN_ID`, when None.
        tokenizer: the tokenizer of a PreTrainedModel.
        dataset: what the run is to be validated on, as `mlflow-dr validate --dataset` takes it;
            noted on the run, so that `mlflow-dr validate --run-id RUN` needs nothing else.
        split: the queries; the development split when None.
        wait: return when the checkpoint is READY, after those of the run that are on their way. If
            not, only the copy of the weights into host memory is waited for (and, with two
            snapshots on their way, the older one); what fails later is in the log and on the run,
            the last of it is saved below `unpublished/` in the working directory, and where nothing
            can be published the next call raises. Call `flush_checkpoints` before the run ends.
        settings: fields of `EncoderConfig` for a PreTrainedModel, which does not say how its
            vectors are made: `pooling` and `normalize` are needed; prompts and lengths may be.

    Returns:
        The model id, for `models:/<id>`; None without waiting and on other ranks.

    Raises:
        UsageError: no run, a model that cannot be published, an unknown dataset or split.
        CheckpointError: a directory whose files are missing or damaged.
        TrackingError: the server did not take it; or, without waiting, not the first one.
    """
    step = _checked_step(step)
    if not is_first_rank():
        return None
    run_id = current_run_id(run_id)
    if not wait:
        _submit(model, step, run_id, tokenizer, dataset, split, settings)
        return None
    source = source_of(model, tokenizer, **settings)
    run = prepared_run(run_id, dataset, split)
    background = _background.get((tracking_uri(), run_id))
    if background is not None:
        background.publisher.wait()  # the step may be on its way
    if known := [one for one in checkpoints_of(run) if one.ready and one.step == step]:
        log.warning("step %d is models:/%s already; not published again", step, known[0].model_id)
        return known[0].model_id
    with tracking_errors(f"publishing step {step}"):
        model_id = publish_state(run, step, source, source.state())
    if background is not None:
        background.publisher.skip(step)
    return model_id


def flush_checkpoints() -> None:
    """Wait until everything that was submitted without waiting is published.

    Validators leave when a run has ended: call this before it does. It is called when Python ends.

    Raises:
        TrackingError: steps that were not published.
    """
    failed: list[int] = []
    why: TrackingError | None = None
    while _background:
        publisher = _background.popitem()[1].publisher
        publisher.close()
        failed += publisher.unpublished
        why = why or publisher.error()
    if failed:
        steps = ", ".join(map(str, failed))
        reason = why or "the log and the run's tags say why"
        raise TrackingError(f"not published: step {steps}; {reason}")


def prepared_run(run_id: str, dataset: str | None, split: str | None) -> TrackedRun:
    """The run, with dataset and split noted on it where they are given.

    Raises:
        UsageError: an unknown dataset or split, or a split without a dataset.
        TrackingError: there is no such run, or the server does not answer.
    """
    if split and not dataset:
        raise UsageError(f"split={split!r} of which dataset? give dataset= too")
    run = find_run(connect(), run_id)
    note = (tracking_uri(), run_id, dataset, split)
    if dataset and note not in _noted:
        collection = open_collection(dataset)
        name_collection(run, collection.name, chosen_split(collection, split))
        _noted.add(note)
    return run


def is_first_rank() -> bool:
    """Whether this process publishes: it is rank 0, or the only one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_rank() == 0


@dataclass
class _Background:
    """The publisher of one run, and what it publishes."""

    publisher: Publisher
    model: Any
    how: tuple[Any, ...]


_background: dict[tuple[str, str], _Background] = {}
_noted: set[tuple[str | None, ...]] = set()


def _submit(
    model: Any,
    step: int,
    run_id: str,
    tokenizer: Any,
    dataset: str | None,
    split: str | None,
    settings: dict[str, Any],
) -> None:
    """Hand the model to its run's publisher; one for another model waits for the one before."""
    key = (tracking_uri(), run_id)
    model = Path(model) if isinstance(model, str) else unwrapped(model)
    how = (id(tokenizer), dataset, split, *sorted(settings.items()))
    known = _background.get(key)
    # the weights of a bare backbone's directory, which needs settings, are read with its source
    is_read = isinstance(model, Path) and bool(settings)
    if known is None or known.how != how or is_read or not _is_same(known.model, model):
        source = source_of(model, tokenizer, **settings)
        run = prepared_run(run_id, dataset, split)
        if known is not None:
            known.publisher.close()
        publisher = Publisher(run, source, ready_steps(run), keep_in=Path(UNPUBLISHED, run_id))
        close_at_exit(publisher)
        if known is not None:
            publisher.unpublished += known.publisher.unpublished
        _background[key] = known = _Background(publisher, model, how)
    if known.publisher.refused and (error := known.publisher.error()) is not None:
        raise error
    if not known.publisher.submit(step):
        log.warning("step %d is published already; not published again", step)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Path) and one == other)


def _checked_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"step is {step!r}; expected the number of the training step, from 0 on")
    return number
