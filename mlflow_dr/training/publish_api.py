"""Publishing from somebody else's training loop."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import chosen_split
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import fail_pending_checkpoints, ready_steps, run_checkpoints
from mlflow_dr.tracking.client import connect, tracking_errors, tracking_uri
from mlflow_dr.tracking.runs import TrackedRun, active_run_id, find_run, name_collection
from mlflow_dr.training.checkpoint_source import CheckpointSource, source_of, unwrapped
from mlflow_dr.training.publishing import Publisher, PublishSchedule, close_at_exit, publish_state

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
    run_id = active_run_id(run_id)
    if not wait:
        _submit(model, step, run_id, tokenizer, dataset, split, settings)
        return None
    source = source_of(model, tokenizer, **settings)
    run = prepared_run(run_id, dataset, split)
    background = _background.get((tracking_uri(), run_id))
    if background is not None:
        background.publisher.wait()  # the step may be on its way
    if known := [one for one in run_checkpoints(run) if one.ready and one.step == step]:
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


SUMMARY_KEY = "train_runtime"
"""In what Trainer logs once, after the last step and before the run is ended by its callbacks."""


class CheckpointPublisher(Protocol):
    """What is told of the steps to publish: a publisher, or one who only takes part in it."""

    last_step: int | None

    def submit(self, step: int) -> bool:
        """Take note of a step; whether it will be published from here."""


class ShardGatherer:
    """Takes part in gathering weights that processes share out, which the first one publishes."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source = source
        self.last_step: int | None = None

    def submit(self, step: int) -> bool:
        """Give our share of the weights."""
        self._source.state()
        self.last_step = step
        return False


class PublishCallback(TrainerCallback):
    """Publishes checkpoints from Hugging Face's Trainer, or sentence-transformers'.

    The trainer waits for the copy of the weights into host memory; a thread does the rest. The
    first rank alone publishes. Training that was resumed publishes no step a second time.

    Training stops when the first checkpoint is refused for good (no permission, a module that is
    missing). When training has ended and its last checkpoint could not be published, `train` raises
    a TrackingError; that checkpoint is saved in the trainer's `output_dir`.

        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset, loss=loss,
            callbacks=[PublishCallback(every=1000, dataset="msmarco")],
        )

    Args:
        every: steps between two checkpoints, or a function that says whether one is due after a
            step; when None, there is one whenever the trainer saves; when 0, there are the first
            and the last one.
        initial: whether the model is published before the first step, too.
        final: whether it is after the last one.
        run_id: the MLflow run; that of the trainer's own MLflow callback, MLflow's active run or
            `$MLFLOW_RUN_ID` when None. Who began the run ends it.
        tokenizer: a Hugging Face model's; the trainer's `processing_class` when None.
        dataset: what the run is to be validated on; see `publish_checkpoint`.
        split: the queries; the development split when None.
        part: which part of the trainer's model is published, such as `lambda model: model.encoder`.
        publisher: publishes to this one, in whatever process, and the caller closes it; nothing of
            the above but `every`, `initial` and `final` is used then.
        settings: fields of `EncoderConfig`, for a Hugging Face model; see `publish_checkpoint`.

    Raises:
        UsageError: `every` is less than 0. When training begins: no run, or a model, dataset or
            split that is none.
        TrackingError: when training begins: the server does not answer. When it ends: the last
            checkpoint was not published.
    """

    def __init__(
        self,
        every: int | Callable[[int], bool] | None = None,
        *,
        initial: bool = True,
        final: bool = True,
        run_id: str | None = None,
        tokenizer: Any = None,
        dataset: str | None = None,
        split: str | None = None,
        part: Callable[[Any], Any] | None = None,
        publisher: CheckpointPublisher | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(every, int) and every < 0:
            raise UsageError(f"every is {every}; expected a number of steps, or None for each save")
        self._every = PublishSchedule(every) if isinstance(every, int) else every
        self._initial = initial
        self._final = final
        self._run_id = run_id
        self._tokenizer = tokenizer
        self._named = (dataset, split)
        self._part = part
        self._settings = settings
        self._is_mine = publisher is None
        self._publisher: CheckpointPublisher | None = publisher
        self._error: TrackingError | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Find the run, and publish the model as it is before training."""
        if not self._takes_part(state):
            return
        if self._is_mine:
            self._close()
            self._error = None
            resumed = state.global_step > 0
            keep_in = Path(args.output_dir or ".")
            self._publisher = self._opened(model, processing_class, resumed, keep_in)
        if self._initial and state.global_step == 0:
            self._submit(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish when it is time."""
        if self._every is not None and self._every(state.global_step):
            self._submit(state)
        if self._is_mine and isinstance(self._publisher, Publisher) and self._publisher.refused:
            self._stop(args, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Publish with the trainer's own checkpoint."""
        if self._every is None:
            self._submit(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Publish the last step, and wait: validators leave when the run has ended."""
        if SUMMARY_KEY in (logs or {}):
            self._end(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The same, for a trainer that logs no summary; raises what went wrong."""
        self._end(state)
        if self._error is not None:
            raise self._error

    def _stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        """End the training, whose checkpoints nobody would take."""
        if args.world_size > 1:  # the other processes would wait for us in their next step
            self._close()
            if self._error is not None:
                raise self._error
        control.should_training_stop = True

    def _opened(self, model: Any, processing_class: Any, resumed: bool, keep_in: Path) -> Publisher:
        model = unwrapped(model)
        model = self._part(model) if self._part else model
        tokenizer = self._tokenizer
        if tokenizer is None and self._settings:  # a model that says nothing, so it needs one
            tokenizer = processing_class
        source = source_of(model, tokenizer, **self._settings)
        run = prepared_run(active_run_id(self._run_id), *self._named)
        if resumed:
            fail_pending_checkpoints(run)
        publisher = Publisher(run, source, ready_steps(run) if resumed else (), keep_in=keep_in)
        close_at_exit(publisher)
        return publisher

    def _takes_part(self, state: TrainerState) -> bool:
        return state.is_world_process_zero or not self._is_mine

    def _submit(self, state: TrainerState) -> None:
        if self._publisher is not None and self._takes_part(state):
            self._publisher.submit(state.global_step)

    def _end(self, state: TrainerState) -> None:
        if self._publisher is None:
            return
        if self._final and self._publisher.last_step != state.global_step:
            self._submit(state)
        if self._is_mine:
            self._close()

    def _close(self) -> None:
        if isinstance(self._publisher, Publisher):
            self._publisher.close()
            self._error = self._publisher.error()
        self._publisher = None
