"""The callback that publishes checkpoints: in Hugging Face's Trainer and those made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import abandon_pending, ready_steps
from mlflow_dr.tracking.current import current_run_id
from mlflow_dr.training.any_loop import prepared_run
from mlflow_dr.training.due import Due
from mlflow_dr.training.publishable import Publishable, source_of, unwrapped
from mlflow_dr.training.publishing import Publisher, close_at_exit

SUMMARY_KEY = "train_runtime"
"""In what Trainer logs once, after the last step and before the run is ended by its callbacks."""


class Submits(Protocol):
    """What is told of the steps to publish: a publisher, or one who only takes part in it."""

    last_step: int | None

    def submit(self, step: int) -> bool:
        """Take note of a step; whether it will be published from here."""


class Mate:
    """Takes part in gathering weights that processes share out, which the first one publishes."""

    def __init__(self, source: Publishable) -> None:
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
        publisher: Submits | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(every, int) and every < 0:
            raise UsageError(f"every is {every}; expected a number of steps, or None for each save")
        self._every = Due(every) if isinstance(every, int) else every
        self._initial = initial
        self._final = final
        self._run_id = run_id
        self._tokenizer = tokenizer
        self._named = (dataset, split)
        self._part = part
        self._settings = settings
        self._is_mine = publisher is None
        self._publisher: Submits | None = publisher
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
        run = prepared_run(current_run_id(self._run_id), *self._named)
        if resumed:
            abandon_pending(run)
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
