"""Training from beginning to end: from a collection to checkpoints and figures in MLflow."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from torch import distributed as dist
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.errors import TrackingError
from mlflow_dr.tracking.checkpoints import fail_pending_checkpoints, ready_steps
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.context import system_metrics
from mlflow_dr.tracking.encoders import MODEL_SCHEME, local_encoder
from mlflow_dr.tracking.registry import checkpoint_by_uri
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    SPLIT_PARAM,
    TrackedRun,
    find_run,
    open_run,
)
from mlflow_dr.tracking.stop_request import StopWatcher, clear_stop_request
from mlflow_dr.training.arguments import RetrieverTrainingArguments, TrainingRequest
from mlflow_dr.training.callbacks import MetricCallback, StopCallback
from mlflow_dr.training.checkpoint_source import EncoderSource
from mlflow_dr.training.data import TrainingData, open_data
from mlflow_dr.training.encoder_setup import build_encoder, collator_of, mixed_training_set
from mlflow_dr.training.flags import MERGED
from mlflow_dr.training.params import note_changes, params_of
from mlflow_dr.training.publish_api import CheckpointPublisher, PublishCallback, ShardGatherer
from mlflow_dr.training.publishing import (
    Publisher,
    PublishSchedule,
    publish_missed_checkpoints,
    publish_schedule,
)
from mlflow_dr.training.resume import (
    Resumption,
    begin_output,
    check_output_dir,
    find_resumption,
    locked_output,
    output_directories,
)
from mlflow_dr.training.trainer import RetrieverTrainer

log = logging.getLogger(__name__)

LOSS_METRIC = "train/loss"
START_TAG = "mlflow_dr.start"
SECONDS_OF_ONE_REQUEST = 1.0
STDERR = 2


def train(request: TrainingRequest) -> str:
    """Train an encoder and publish its checkpoints.

    Under torchrun every process calls this; the first one alone writes to MLflow and saves.

    Returns:
        The id of the MLflow run.

    Raises:
        UsageError: the collection has no training examples, or there is no such encoder; or there
            is nothing to resume, or another training is writing to `output_dir`.
        TrackingError: the tracking server cannot be reached, or the last checkpoint could not be
            published; its encoder is saved in `output_dir` then.
        CheckpointError: what is resumed from does not fit.
        TrainingError: the loss is not a number.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and its encoder published.
    """
    arguments = request.trainer
    resumption = find_resumption(str(arguments.output_dir), arguments.resume_from_checkpoint)
    if arguments.process_index > 0:
        logging.getLogger("mlflow_dr").setLevel(logging.WARNING)
        _train(request, open_data(request.data), None, resumption)
        return ""
    saves = arguments.save_strategy != SaveStrategy.NO
    with locked_output(*output_directories(str(arguments.output_dir), saves, resumption)):
        return _train_first(request, resumption)


def _train_first(request: TrainingRequest, resumption: Resumption | None) -> str:
    """Train in the process that writes to MLflow and saves; returns the run's id."""
    arguments = request.trainer
    saves = arguments.save_strategy != SaveStrategy.NO
    if resumption is None and saves:
        check_output_dir(str(arguments.output_dir), arguments.overwrite_output_dir)
    client = connect(request.publish.tracking_uri)
    data = open_data(request.data)
    run = open_run(
        client,
        request.publish.experiment_name,
        resumption.run_id if resumption else None,
        arguments.run_name,
    )
    log.info("run %s (%s)", run.id, run.name)
    with run.finish_on_exit("training"), system_metrics(run):
        if resumption is None and saves:
            begin_output(str(arguments.output_dir), run.id)
        if resumption is not None:
            begun = resumption.checkpoint.name if resumption.checkpoint else "the start"
            note_changes(run, request, begun)
        _describe(run, request, data)
        _train(request, data, run, resumption)
    return run.id


def _describe(run: TrackedRun, request: TrainingRequest, data: TrainingData) -> None:
    """Show on the run what is trained on what, and what validators need to know."""
    known = {DATASET_PARAM: request.data.dataset_name, **params_of(request)}
    if data.collection is not None:
        run.set_tags({DATASET_TAG: data.collection.name})
        known = {**known, DATASET_PARAM: data.collection.name, SPLIT_PARAM: data.split}
    else:
        log.warning(
            "%s has no judged queries: nothing can be validated on it; --validation_dataset names "
            "a collection that has some",
            request.data.dataset_name,
        )
    run.log_params(known)
    for part in data.parts:
        run.log_collection(
            part.name,
            digest=part.examples.digest,
            source=part.source,
            profile={"examples": len(part.examples), "split": "train"},
            context="training",
        )


def _train(
    request: TrainingRequest,
    data: TrainingData,
    run: TrackedRun | None,
    resumption: Resumption | None,
) -> None:
    name = _start(request, run, resumption)
    with local_encoder(name, request.publish.tracking_uri) as start:
        _train_from(start, request, data, run, resumption)


def _start(request: TrainingRequest, run: TrackedRun | None, resumption: Resumption | None) -> str:
    """The encoder's name; of a published one its id, which a resumed training takes from its run.

    An alias may name another version by then, and adapters would be put on another base.
    """
    name = request.model.model_name_or_path
    if not name.startswith(MODEL_SCHEME):
        return name
    client = connect(request.publish.tracking_uri)
    if resumption is not None:
        begun = find_run(client, resumption.run_id).fetch().data.tags.get(START_TAG)
        if begun is not None:
            return begun
    uri = checkpoint_by_uri(client, name).uri
    if run is not None:
        run.set_tags({START_TAG: uri})
    return uri


def _train_from(
    start: str,
    request: TrainingRequest,
    data: TrainingData,
    run: TrackedRun | None,
    resumption: Resumption | None,
) -> None:
    set_seed(request.trainer.seed)
    encoder = build_encoder(request, data, start)
    _one_device(request.trainer)
    training_set = mixed_training_set(request, data, encoder)
    log.info("training %s on %d examples", request.model.model_name_or_path, len(training_set))
    is_due = publish_schedule(request, len(training_set))
    stop = StopCallback()
    callbacks: list[TrainerCallback] = [stop]
    source = EncoderSource(encoder, merged=request.model.lora_publish == MERGED)
    with ExitStack() as ending:
        ending.callback(_leave_group)
        if run is not None:
            callbacks = [*_writers(request, run, source, resumption, stop, is_due, ending), stop]
            watcher = StopWatcher(run, stop.ask)
            ending.callback(watcher.close)
        elif request.trainer.fsdp:
            callbacks = [_publishing(request, ShardGatherer(source), is_due), stop]
        trainer = RetrieverTrainer(
            encoder,
            request.trainer,
            training_set,
            collator_of(encoder),
            request.loss.objective(),
            callbacks,
            request.loss.chunk_sizes(),
            run.id if run else "",
            request.model.trust_remote_code,
        )
        ending.enter_context(_asked_by_signals(stop, says=run is not None))
        trainer.resume(resumption.checkpoint if resumption else None)
    # an exit code of another process would have torchrun kill the first one
    if stop.killed and run is not None:
        raise KeyboardInterrupt
    if stop.reason:
        log.info("training ended as asked: %s", stop.reason)


def _writers(
    request: TrainingRequest,
    run: TrackedRun,
    source: EncoderSource,
    resumption: Resumption | None,
    stop: StopCallback,
    is_due: PublishSchedule,
    ending: ExitStack,
) -> list[TrainerCallback]:
    """The callbacks that write to the run; what a resumed training has written it writes not twice.

    Args:
        stop: asked where nothing can be published.
        is_due: after which steps a checkpoint is published.
        ending: closes the publisher, unless KeyboardInterrupt means at once, published or not; then
            raises a TrackingError where the last checkpoint was not published.
    """
    done: set[int] = set()
    known = None
    if resumption is not None:
        clear_stop_request(run)
        fail_pending_checkpoints(run)
        done = ready_steps(run)
        known = run.last_step(LOSS_METRIC)
        begun = resumption.checkpoint.name if resumption.checkpoint else "the start"
        for problem in resumption.damaged:
            log.warning("%s; passed over", problem)
        log.info("resuming run %s from %s", run.id, begun)
    output = Path(str(request.trainer.output_dir))
    publisher = Publisher(run, source, done, keep_in=output, on_refused=stop.ask)

    def close(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            publisher.close()
        if (error := publisher.error()) is None:
            return
        if kind is not None or stop.killed:
            log.error("%s", error)  # what ends the training is something else
            return
        saves = request.trainer.save_strategy != SaveStrategy.NO
        began = "training has stopped: " if publisher.refused else ""
        raise TrackingError(f"{began}{error}{'; --resume_from_checkpoint goes on' * saves}")

    ending.push(close)
    if resumption is not None and resumption.checkpoint is not None:
        publish_missed_checkpoints(request, publisher, source, done, resumption.checkpoint, is_due)
    return [MetricCallback(run.log_metrics, known), _publishing(request, publisher, is_due)]


def _publishing(
    request: TrainingRequest, publisher: CheckpointPublisher, is_due: PublishSchedule
) -> PublishCallback:
    initial = request.publish.publish_initial
    return PublishCallback(is_due, initial=initial, publisher=publisher)


def _leave_group() -> None:
    """Left to the interpreter's end, threads of the process group may abort the process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _one_device(arguments: RetrieverTrainingArguments) -> None:
    """Keep Trainer from nn.DataParallel, which would split the batch and its in-batch negatives."""
    if arguments.n_gpu > 1:
        log.warning("%d GPUs are visible; training uses the first one", arguments.n_gpu)
        arguments._n_gpu = 1


@contextmanager
def _asked_by_signals(stop: StopCallback, says: bool) -> Iterator[None]:
    """On SIGINT or SIGTERM end cleanly after the step; the same signal once more, at once.

    One Ctrl-C under torchrun reaches us twice, from the terminal and from torchrun.
    """
    came: dict[int, float] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        first = came.setdefault(number, time.monotonic())
        if time.monotonic() - first > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt
        if says and not stop.killed:
            # the signal may have come amid a write to the stream, which takes no second one then
            os.write(STDERR, b"stopping after this step; once more to stop at once\n")
        stop.ask(signal.Signals(number).name, killed=True)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
