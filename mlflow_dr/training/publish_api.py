"""Publishing from other people's training: a function for any loop, a callback for Trainer."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import fail_pending_checkpoints
from mlflow_dr.tracking.client import connect, tracking_uri
from mlflow_dr.tracking.runs import TrackedRun, active_run_id, find_run, name_collection
from mlflow_dr.training.callbacks import ScheduledPublishing, every_steps
from mlflow_dr.training.checkpoint_source import source_of, unwrapped
from mlflow_dr.training.publishing import (
    CheckpointSource,
    Publisher,
    close_at_exit,
    published_checkpoints,
)

log = logging.getLogger(__name__)

UNPUBLISHED = "unpublished"

_publishers: dict[tuple[str, str], Publisher] = {}
"""(tracking URI, run id) -> the run's publisher, until `flush_checkpoints`."""
_sources: dict[tuple[str, str], tuple[Any, tuple[Any, ...], CheckpointSource]] = {}
"""(tracking URI, run id) -> the model that was published last without waiting, and its source."""
_noted: set[tuple[str | None, ...]] = set()


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
    """Publish a model as the checkpoint of a training step, for validators to evaluate.

    Only rank 0 publishes; other ranks may call this, too. A step that the run already has is not
    published again.

        with mlflow.start_run():
            for step, batch in enumerate(batches, start=1):
                ...
                if step % 1000 == 0:
                    publish_checkpoint(model, step, dataset="msmarco", wait=False)
            flush_checkpoints()

    Args:
        model: an mlflow_dr Encoder, a SentenceTransformer, a Hugging Face PreTrainedModel, or the
            directory of one of these. With `wait=False` a directory must not change until it is
            published.
        step: the training step; metrics are logged at this step.
        run_id: the MLflow run. By default MLflow's active run, else `$MLFLOW_RUN_ID`.
        tokenizer: the tokenizer of a PreTrainedModel.
        dataset: what validators evaluate on, as in `mlflow-dr validate --dataset`. It is noted on
            the run, so that `mlflow-dr validate --run-id RUN` needs no further flags.
        split: the split of the dataset; by default its development split.
        wait: return when the checkpoint is READY, after all earlier checkpoints of the run. With
            `wait=False` this returns when the weights are copied into host memory; while two
            copies are waiting, it also waits for the older one. A failure is then logged and noted
            on the run, and the last checkpoint that failed is saved in `unpublished/` in the
            working directory. If nothing can be published at all, the next call raises. Call
            `flush_checkpoints` before the run ends.
        settings: fields of `EncoderConfig`, for a PreTrainedModel: `pooling` and `normalize` are
            required, prompts and lengths are optional.

    Returns:
        The model id, for `models:/<id>`; None with `wait=False` and on other ranks.

    Raises:
        UsageError: there is no run, the model cannot be published, or the dataset or split is
            unknown.
        CheckpointError: files of a directory are missing or damaged.
        TrackingError: the checkpoint was not published; with `wait=False`, the first one was not.
    """
    step = _checked_step(step)
    if not is_first_rank():
        return None
    key = (tracking_uri(), active_run_id(run_id))
    source = _source(key, model, tokenizer, settings, keep=not wait)
    publisher = _publisher(key, source, dataset, split)
    if not wait and publisher.refused and (error := publisher.error()) is not None:
        raise error
    is_new = publisher.publish(step, source, wait)
    if wait and step not in publisher.published:
        raise publisher.error() or TrackingError(f"step {step} was not published")
    if not is_new:
        log.warning("step %d is published already; it is not published again", step)
    return publisher.published[step] if wait else None


def flush_checkpoints() -> None:
    """Wait until every checkpoint that was submitted with `wait=False` is published.

    Validators leave when a run has ended, so call this before it ends. It is also called when
    Python exits.

    Raises:
        TrackingError: some steps were not published.
    """
    failed: list[int] = []
    why: TrackingError | None = None
    _sources.clear()
    while _publishers:
        publisher = _publishers.popitem()[1]
        publisher.close()
        failed += publisher.unpublished
        why = why or publisher.error()
    if failed:
        steps = ", ".join(map(str, failed))
        reason = why or "the log and the run's tags say why"
        raise TrackingError(f"not published: step {steps}; {reason}")


def is_first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return True
    return distributed.get_rank() == 0


def prepared_run(run_id: str, dataset: str | None, split: str | None) -> TrackedRun:
    """The run; dataset and split are noted on it, if they are given.

    Raises:
        UsageError: an unknown dataset or split, or a split without a dataset.
        TrackingError: there is no such run, or the server does not answer.
    """
    if split and not dataset:
        raise UsageError(f"split={split!r} needs a dataset; give dataset=, too")
    run = find_run(connect(), run_id)
    if dataset:
        collection = open_collection(dataset)
        name_collection(run, collection.name, chosen_split(collection, split))
    return run


def _publisher(
    key: tuple[str, str], source: CheckpointSource, dataset: str | None, split: str | None
) -> Publisher:
    """The publisher of a run; dataset and split are noted on the run once."""
    note = (*key, dataset, split)
    if key in _publishers and note in _noted:
        return _publishers[key]
    run = prepared_run(key[1], dataset, split)
    _noted.add(note)
    if key not in _publishers:
        keep_in = Path(UNPUBLISHED, run.id)
        publisher = Publisher(run, source, published_checkpoints(run), keep_in=keep_in)
        close_at_exit(publisher)
        _publishers[key] = publisher
    return _publishers[key]


def _source(
    key: tuple[str, str], model: Any, tokenizer: Any, settings: dict[str, Any], keep: bool
) -> CheckpointSource:
    """The source of a model's weights; the source of the same model is reused."""
    model = unwrapped(model)
    options = (id(tokenizer), *sorted(settings.items()))
    cached = _sources.get(key)
    if cached is not None and cached[0] is model and cached[1] == options:
        return cached[2]
    source = source_of(model, tokenizer, **settings)
    if keep and not isinstance(model, str | Path):  # a directory may have other contents next time
        _sources[key] = (model, options, source)
    return source


def _checked_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UsageError(f"step is {step!r}; expected the number of the training step, at least 0")
    return number


class PublishCallback(ScheduledPublishing):
    """Publishes checkpoints from Hugging Face's Trainer, or sentence-transformers'.

    Training waits only until the weights are copied into host memory; a thread does the rest. Only
    rank 0 publishes. A resumed training publishes no step twice.

    Training stops if the first checkpoint is refused for a reason that will last (no permission, a
    missing module). If the last checkpoint could not be published, `train` raises a TrackingError
    at the end; that checkpoint is saved in the trainer's `output_dir`.

        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset, loss=loss,
            callbacks=[PublishCallback(every=1000, dataset="msmarco")],
        )

    Args:
        every: steps between two checkpoints; 0 publishes only the first and the last. A function
            says for a step whether to publish. None publishes whenever the trainer saves.
        initial: whether the model is published before the first step.
        final: whether the model is published after the last step.
        run_id: the MLflow run. By default the run of the trainer's own MLflow callback, MLflow's
            active run, or `$MLFLOW_RUN_ID`. The callback does not end the run.
        tokenizer: the tokenizer of a Hugging Face model; by default the trainer's
            `processing_class`.
        dataset: what validators evaluate on; see `publish_checkpoint`.
        split: the split of the dataset; by default its development split.
        part: the part of the trainer's model to publish, such as `lambda model: model.encoder`.
        settings: fields of `EncoderConfig`, for a Hugging Face model; see `publish_checkpoint`.

    Raises:
        UsageError: `every` is less than 0. When training begins: there is no run, the model cannot
            be published, or the dataset or split is unknown.
        TrackingError: when training begins, the server does not answer; when it ends, the last
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
        **settings: Any,
    ) -> None:
        if isinstance(every, int) and every < 0:
            raise UsageError(f"every is {every}; expected a number of steps, or None for each save")
        schedule = every_steps(every) if isinstance(every, int) else every
        super().__init__(self._publish, schedule, initial, final)
        self._run_id = run_id
        self._tokenizer = tokenizer
        self._dataset, self._split = dataset, split
        self._part = part
        self._settings = settings
        self._publisher: Publisher | None = None
        self._error: TrackingError | None = None

    def on_train_begin(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Find the run, and publish the model as it is before training."""
        self._close()
        self._error = None
        if state.is_world_process_zero:
            self._publisher = self._opened(args, state, model, processing_class)
        super().on_train_begin(args, state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish if the schedule says so; stop if nothing can be published."""
        super().on_step_end(args, state, control)
        if self._publisher is None or not self._publisher.refused:
            return
        if args.world_size > 1:  # the other processes would wait for this one in their next step
            self._close()
            if self._error is not None:
                raise self._error
        control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        """Publish the last step, unless it is published; raise what went wrong."""
        super().on_train_end(args, state, control)
        if self._error is not None:
            raise self._error

    def end(self, state: TrainerState) -> None:
        """Publish the last step, and wait: validators leave when the run has ended."""
        if self._publisher is not None:
            super().end(state)
            self._close()

    def _opened(
        self, args: TrainingArguments, state: TrainerState, model: Any, processing_class: Any
    ) -> Publisher:
        model = unwrapped(model)
        model = self._part(model) if self._part else model
        tokenizer = self._tokenizer
        if tokenizer is None and self._settings:  # a bare Hugging Face model needs one
            tokenizer = processing_class
        source = source_of(model, tokenizer, **self._settings)
        run = prepared_run(active_run_id(self._run_id), self._dataset, self._split)
        published = {}
        if state.global_step > 0:  # resumed
            fail_pending_checkpoints(run)
            published = published_checkpoints(run)
        keep_in = Path(args.output_dir or ".")
        publisher = Publisher(run, source, published, keep_in=keep_in)
        close_at_exit(publisher)
        return publisher

    def _publish(self, step: int) -> None:
        if self._publisher is not None:
            self._publisher.publish(step)

    def _close(self) -> None:
        if self._publisher is not None:
            self._publisher.close()
            self._error = self._publisher.error()
        self._publisher = None
