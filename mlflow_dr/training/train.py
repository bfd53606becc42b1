"""Training from beginning to end: from a collection to checkpoints and metrics in MLflow."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from torch import distributed
from transformers import TrainerCallback, TrainingArguments, set_seed

from mlflow_dr import compat
from mlflow_dr.encoder.saving import restore_encoder
from mlflow_dr.errors import MissingExtraError, TrackingError, UsageError
from mlflow_dr.process_tree import Sampler
from mlflow_dr.tracking.artifacts import keep_held_out
from mlflow_dr.tracking.checkpoints import fail_pending_checkpoints
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.context import system_metrics
from mlflow_dr.tracking.descriptions import describe_run
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
from mlflow_dr.training.arguments import TrainingRequest
from mlflow_dr.training.callbacks import (
    SUMMARY_TAG,
    MetricCallback,
    ScheduledPublishing,
    StopCallback,
    publish_schedule,
)
from mlflow_dr.training.checkpoint_source import DirectorySource
from mlflow_dr.training.data import TrainingData, open_data
from mlflow_dr.training.data_metrics import DataMetrics, Supply
from mlflow_dr.training.disk_use import DiskUse
from mlflow_dr.training.encoder_setup import build_encoder, collator_of, mixed_training_set
from mlflow_dr.training.flags import MERGED, TORCH
from mlflow_dr.training.publishing import (
    CheckpointSource,
    EncoderSource,
    Publisher,
    published_checkpoints,
)
from mlflow_dr.training.resume import (
    Resumption,
    begin_output,
    claimed_output,
    complete_checkpoints_until,
    find_resumption,
    incomplete_reason,
    note_changes,
)
from mlflow_dr.training.run_params import encoder_params, params_of, run_name
from mlflow_dr.training.trainer import RetrieverTrainer

log = logging.getLogger(__name__)

LOSS_METRIC = "train/loss"
START_TAG = "mlflow_dr.start"
SECONDS_OF_ONE_REQUEST = 1.0
STDERR = 2


def train(request: TrainingRequest) -> str:
    """Train an encoder and publish its checkpoints.

    Under torchrun every process calls this; only the first one writes to MLflow and saves.

    Returns:
        The id of the MLflow run.

    Raises:
        UsageError: the collection has no training examples, the encoder does not exist, there is
            nothing to resume from, or another training is writing to `output_dir`.
        TrackingError: the tracking server cannot be reached, or the last checkpoint could not be
            published; its encoder is saved in `output_dir` then.
        CheckpointError: the checkpoint to resume from does not fit.
        TrainingError: the loss is not a finite number.
        MissingExtraError: JAX is not installed.
        DeviceError: JAX cannot use its devices.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and its encoder published.
    """
    arguments = request.trainer
    kind = trainer_kind(request)
    resumption = find_resumption(str(arguments.output_dir), arguments.resume_from_checkpoint)
    if arguments.process_index > 0:
        logging.getLogger("mlflow_dr").setLevel(logging.WARNING)
        _train(request, kind, open_data(request.data, arguments.seed), None, resumption)
        return ""
    output, overwrites = str(arguments.output_dir), arguments.overwrite_output_dir
    with claimed_output(output, resumption, request.saves, overwrites):
        return _train_first(request, kind, resumption)


def trainer_kind(request: TrainingRequest) -> type[RetrieverTrainer]:
    """The trainer of `--engine`. JAX's joins its hosts now: it says which process is the first.

    Raises:
        MissingExtraError: JAX is not installed.
        UsageError: flags of hosts are missing.
        DeviceError: JAX cannot use its devices, or its hosts do not find each other.
    """
    if request.engine.engine == TORCH:
        _use_one_gpu(request.trainer)
        return RetrieverTrainer
    _check_jax()
    from mlflow_dr.jax_engine.trainer import JaxTrainer

    JaxTrainer.join(request.trainer, request.engine)
    return JaxTrainer


def compile_only(request: TrainingRequest) -> str:
    """Compile a step for the TPUs of `--compile-only`; says what it needs on each device.

    Raises:
        MissingExtraError: JAX or libtpu is not installed.
        UsageError: there are no such TPUs, or the encoder is not written in JAX.
        TrainingError: the step does not fit.
    """
    _check_jax()
    from mlflow_dr.jax_engine.compile_only import compile_for

    return compile_for(request)


def _check_jax() -> None:
    if importlib.util.find_spec("jax") is None:
        raise MissingExtraError('--engine jax needs JAX: pip install "mlflow_dr[jax]"')


def _train_first(
    request: TrainingRequest, kind: type[RetrieverTrainer], resumption: Resumption | None
) -> str:
    """Train in the process that writes to MLflow and saves; returns the run's id."""
    arguments = request.trainer
    client = connect(request.publish.tracking_uri)
    data = open_data(request.data, arguments.seed)
    before = find_run(client, resumption.run_id).seen if resumption else None
    run = open_run(
        client,
        request.publish.experiment_name,
        resumption.run_id if resumption else None,
        arguments.run_name,
        run_name(request),
    )
    log.info("run %s (%s)", run.id, run.name)
    with run.finish_on_exit("training", before), system_metrics(run):
        if resumption is None and request.saves:
            begin_output(str(arguments.output_dir), run.id)
        keep_held_out(run, data.held_out)  # before the param that names it to validators
        if resumption is not None:
            note_changes(run, request, resumption.name)
        _describe(run, request, data)
        _train(request, kind, data, run, resumption)
    return run.id


def _describe(run: TrackedRun, request: TrainingRequest, data: TrainingData) -> None:
    """Show the training data and parameters on the run, and what validators need to know."""
    params = {DATASET_PARAM: request.data.dataset_name, **params_of(request)}
    if data.collection is not None:
        run.set_tags({DATASET_TAG: data.collection.name})
        params = {**params, DATASET_PARAM: data.collection.name, SPLIT_PARAM: data.split}
    elif suite := request.data.validation_dataset:
        log.info("validators need --dataset %s, unless `mlflow-dr run` has started them", suite)
    else:
        log.warning(
            "%s has no judged queries, so validators cannot evaluate on it; name a collection that "
            "has some by --validation_dataset",
            request.data.dataset_name,
        )
    run.log_params(params)
    for part in data.parts:
        run.log_collection(
            part.name,
            digest=part.examples.digest,
            source=part.source,
            profile={"examples": len(part.examples), "split": "train"},
            context="training",
        )
    describe_run(run)


def _start(request: TrainingRequest, run: TrackedRun | None, resumption: Resumption | None) -> str:
    """The name of the encoder to begin with; `models:/<id>` for a published one.

    A resumed training takes the id from its run: an alias may name another version by then, and
    adapters would be put on another base.
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


def _train(
    request: TrainingRequest,
    kind: type[RetrieverTrainer],
    data: TrainingData,
    run: TrackedRun | None,
    resumption: Resumption | None,
) -> None:
    """Train; `run` is None in all processes but the first."""
    stop = StopCallback()
    with ExitStack() as ending:
        name = _start(request, run, resumption)
        start = ending.enter_context(local_encoder(name, request.publish.tracking_uri))
        ending.callback(_leave_group)
        set_seed(request.trainer.seed)
        encoder = build_encoder(request, data, start)
        if run is not None:
            run.log_params(encoder_params(encoder))
        training_set = mixed_training_set(request, data, encoder)
        log.info("training %s on %d examples", request.model.model_name_or_path, len(training_set))
        schedule = publish_schedule(request, len(training_set))
        source = EncoderSource(encoder, merged=request.model.lora_publish == MERGED)
        published, last_step = _resumed_run(run, resumption) if run and resumption else ({}, None)
        output = Path(str(request.trainer.output_dir))
        publisher = Publisher(run, source, published, keep_in=output, on_refused=stop.ask)
        callbacks: list[TrainerCallback] = []
        supply = Supply()
        if run is not None:
            ending.enter_context(_closing(publisher, request, stop))
            if resumption is not None and (begin := resumption.checkpoint) is not None:
                _publish_missed_checkpoints(request, publisher, source, begin, schedule)
            data_metrics = DataMetrics(supply, ending.enter_context(Sampler()))
            summarise = partial(_note_summary, run)
            callbacks.append(MetricCallback(run.log_metrics, last_step, data_metrics, summarise))
            ending.callback(StopWatcher(run, stop.ask).close)
        initial = request.publish.publish_initial
        if run is not None:
            callbacks.append(DiskUse(run, source.bytes, schedule, initial))
        callbacks += [ScheduledPublishing(publisher.publish, schedule, initial), stop]
        ending.enter_context(_library_errors())
        trainer = kind(
            encoder,
            request.trainer,
            training_set,
            collator_of(encoder),
            request.loss.objective(encoder),
            callbacks,
            request.loss.chunk_sizes(),
            run.id if run else "",
            request.model.trust_remote_code,
            supply,
        )
        ending.enter_context(stop_on_signals(stop, says=run is not None))
        trainer.resume(resumption.checkpoint if resumption else None)
    # with an exit code from another process, torchrun would kill the first one
    if stop.killed and run is not None:
        raise KeyboardInterrupt
    if stop.reason:
        log.info("training ended as asked: %s", stop.reason)


@contextmanager
def _library_errors() -> Iterator[None]:
    """Turn what Trainer says of missing packages and of its flags into one line."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError) as error:
        is_plain = isinstance(error, ImportError) or "installed" in str(error)
        is_of_flags = isinstance(error, ValueError) and "distributed training" in str(error)
        if not is_plain and not is_of_flags:
            raise
        raise UsageError(" ".join(str(error).split())) from error


def _note_summary(run: TrackedRun, values: Mapping[str, float]) -> None:
    """Tag a run with the figures of the whole training."""
    try:
        run.set_tags({SUMMARY_TAG: json.dumps(values)})
    except TrackingError as error:  # the training itself has ended well
        log.warning("the summary of the training is not on the run: %s", error)


def _use_one_gpu(arguments: TrainingArguments) -> None:
    """Have Trainer use one GPU in each process; with more it would use DataParallel."""
    if arguments.n_gpu > 1:
        log.warning("%d GPUs are visible; training uses the first one", arguments.n_gpu)
        compat.use_devices(arguments, 1)


def _resumed_run(run: TrackedRun, resumption: Resumption) -> tuple[dict[int, str], int | None]:
    """Make a run ready to be continued.

    Returns:
        Step -> model id of its checkpoints, and the last step that has a loss; none of these are
        written twice.
    """
    clear_stop_request(run)
    fail_pending_checkpoints(run)
    for problem in resumption.damaged:
        log.warning("%s; this checkpoint is not used", problem)
    log.info("resuming run %s from %s", run.id, resumption.name)
    return published_checkpoints(run), run.last_step(LOSS_METRIC)


def _publish_missed_checkpoints(
    request: TrainingRequest,
    publisher: Publisher,
    source: EncoderSource,
    checkpoint: Path,
    schedule: Callable[[int], bool],
) -> None:
    """Publish the steps that a killed training could not publish, from the trainer's checkpoints.

    Steps after the checkpoint that is resumed from are trained again, and published then.

    Args:
        request: the resumed training.
        publisher: of its run.
        source: the encoder as it is before the first step. Its adapters are overwritten by those of
            the checkpoints; resuming restores them.
        checkpoint: what is resumed from.
        schedule: after which steps there is a checkpoint.

    Raises:
        TrackingError: the first of them is refused for a reason that will last.
    """

    def publish(step: int, weights: CheckpointSource) -> None:
        publisher.publish(step, weights, wait=True)
        if publisher.refused and (error := publisher.error()) is not None:
            raise error

    if request.publish.publish_initial and 0 not in publisher.published:
        publish(0, source)
    complete = complete_checkpoints_until(checkpoint)
    steps = range(1, max(complete, default=0) + 1)
    missed = [step for step in steps if schedule(step) and step not in publisher.published]
    for step in missed:
        if step in complete and (reason := incomplete_reason(complete[step])):
            log.warning("%s: %s", complete.pop(step), reason)
        if step not in complete:
            continue
        log.info("step %d was not published; publishing %s", step, complete[step])
        if request.model.lora:
            # the base that an adapter names need not be found: tiny, a published checkpoint and one
            # of two encoders are not
            restore_encoder(complete[step], source.encoder, request.model.trust_remote_code)
            publish(step, source)
        else:
            publish(step, DirectorySource(complete[step]))
    if lost := [str(step) for step in missed if step not in complete]:
        log.warning(
            "step %s was not published before the training was stopped, and %s has no complete "
            "checkpoint of it",
            *(", ".join(lost), checkpoint.parent),
        )


@contextmanager
def _closing(publisher: Publisher, request: TrainingRequest, stop: StopCallback) -> Iterator[None]:
    """Close the publisher at the end; on KeyboardInterrupt end at once, published or not.

    Raises:
        TrackingError: the last checkpoint was not published, and nothing else ends the training.
    """
    try:
        yield
    except BaseException as cause:
        if not isinstance(cause, KeyboardInterrupt):
            publisher.close()
        if error := publisher.error():
            log.error("%s", error)
        raise
    publisher.close()
    if (error := publisher.error()) is None:
        return
    if stop.killed:
        log.error("%s", error)
        return
    stopped = "training has stopped: " if publisher.refused else ""
    hint = "; continue it with --resume_from_checkpoint" if request.saves else ""
    raise TrackingError(f"{stopped}{error}{hint}")


def _leave_group() -> None:
    """End the process group; at the exit of the interpreter its threads may abort the process."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def stop_on_signals(stop: StopCallback, says: bool) -> Iterator[None]:
    """On SIGINT or SIGTERM end cleanly after the step; on a second signal, end at once.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun. Signals reach the
    main thread alone; in any other thread nothing is done.

    Args:
        stop: a callback of the trainer.
        says: whether this process says on stderr that it is stopping.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    first_times: dict[int, float] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        first = first_times.setdefault(number, time.monotonic())
        if time.monotonic() - first > SECONDS_OF_ONE_REQUEST:
            raise KeyboardInterrupt
        if says and not stop.killed:
            # not by print: the signal may have come amid a write to the stream
            os.write(STDERR, b"stopping after this step; send the signal again to stop at once\n")
        stop.ask(signal.Signals(number).name, killed=True)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
