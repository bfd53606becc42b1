"""Training from beginning to end: from a collection to checkpoints and metrics in MLflow."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from transformers import TrainerCallback, set_seed

from mlflow_dr.encoder.model import Encoder
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
from mlflow_dr.training.batches import TrainingSet
from mlflow_dr.training.callbacks import (
    SUMMARY_TAG,
    MetricCallback,
    ScheduledPublishing,
    StopCallback,
    publish_schedule,
)
from mlflow_dr.training.data import Mixture, TrainingData, open_data
from mlflow_dr.training.data_metrics import DataMetrics
from mlflow_dr.training.disk_use import DiskUse
from mlflow_dr.training.encoder_setup import build_encoder, collator_of, mixed_training_set
from mlflow_dr.training.flags import MERGED, TORCH
from mlflow_dr.training.missed_checkpoints import publish_missed_checkpoints
from mlflow_dr.training.process import leave_group, stop_on_signals, use_one_gpu
from mlflow_dr.training.publishing import (
    EncoderSource,
    Publisher,
    published_checkpoints,
)
from mlflow_dr.training.resume import (
    Resumption,
    begin_output,
    claimed_output,
    find_resumption,
    note_changes,
)
from mlflow_dr.training.run_params import encoder_params, params_of, run_name
from mlflow_dr.training.trainer import RetrieverTrainer, TrainerParts

log = logging.getLogger(__name__)

LOSS_METRIC = "train/loss"
START_TAG = "mlflow_dr.start"


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
    resumption = find_resumption(request.output, arguments.resume_from_checkpoint)
    if arguments.process_index > 0:
        logging.getLogger("mlflow_dr").setLevel(logging.WARNING)
        _train_silently(request, kind, resumption)
        return ""
    overwrites = arguments.overwrite_output_dir
    with claimed_output(request.output, resumption, request.saves, overwrites):
        return _train_first(request, kind, resumption)


def trainer_kind(request: TrainingRequest) -> type[RetrieverTrainer]:
    """The trainer of `--engine`. JAX's joins its hosts now: it says which process is the first.

    Raises:
        MissingExtraError: JAX is not installed.
        UsageError: flags of hosts are missing.
        DeviceError: JAX cannot use its devices, or its hosts do not find each other.
    """
    if request.engine.engine == TORCH:
        use_one_gpu(request.trainer)
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
    with _begun_encoder(request, data, resumption) as (start, encoder):
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
                begin_output(request.output, run.id)
            keep_held_out(run, data.held_out)  # before the param that names it to validators
            if resumption is not None:
                note_changes(run, request, resumption.name)
            if start.startswith(MODEL_SCHEME):
                run.set_tags({START_TAG: start})
            _describe(run, request, data)
            _train(request, kind, data, encoder, run, resumption)
    return run.id


def _train_silently(
    request: TrainingRequest, kind: type[RetrieverTrainer], resumption: Resumption | None
) -> None:
    """Train in a process that writes nothing."""
    data = open_data(request.data, request.trainer.seed)
    with _begun_encoder(request, data, resumption) as (_, encoder):
        _train(request, kind, data, encoder, None, resumption)


@contextmanager
def _begun_encoder(
    request: TrainingRequest, data: TrainingData, resumption: Resumption | None
) -> Iterator[tuple[str, Encoder]]:
    """The name of the encoder to begin with, and the encoder to train; its files stay inside.

    It is made before a run is opened, so that an encoder that cannot be trained leaves none.
    """
    name = _start(request, resumption)
    with local_encoder(name, request.publish.tracking_uri) as directory:
        set_seed(request.trainer.seed)
        yield name, build_encoder(request, data, directory)


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


def _start(request: TrainingRequest, resumption: Resumption | None) -> str:
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
    return checkpoint_by_uri(client, name).uri


def _train(
    request: TrainingRequest,
    kind: type[RetrieverTrainer],
    data: TrainingData,
    encoder: Encoder,
    run: TrackedRun | None,
    resumption: Resumption | None,
) -> None:
    """Train; `run` is None in all processes but the first."""
    stop = StopCallback()
    with ExitStack() as ending:
        ending.callback(leave_group)
        if run is not None:
            run.log_params(encoder_params(encoder))
        training_set = mixed_training_set(request, data, encoder)
        log.info("training %s on %d examples", request.model.model_name_or_path, len(training_set))
        schedule = publish_schedule(request, len(training_set))
        source = EncoderSource(encoder, merged=request.model.lora_publish == MERGED)
        published, last_step = _resumed_run(run, resumption) if run and resumption else ({}, None)
        publisher = Publisher(run, source, published, keep_in=request.output, on_refused=stop.ask)
        parts = _parts(request, encoder, training_set, run)
        initial = request.publish.publish_initial
        callbacks: list[TrainerCallback] = []

        def publish(step: int) -> bool:
            parts.losses.check()
            return publisher.publish(step)

        if run is not None:
            ending.enter_context(_closing(publisher, request, stop))
            if resumption is not None and (begin := resumption.checkpoint) is not None:
                publish_missed_checkpoints(request, publisher, source, begin, schedule)
            sampler = ending.enter_context(Sampler())
            callbacks.append(_metric_callback(run, DataMetrics(parts.supply, sampler), last_step))
            callbacks.append(DiskUse(run, source.bytes, schedule, initial))
            ending.callback(StopWatcher(run, stop.ask).close)
        callbacks += [ScheduledPublishing(publish, schedule, initial), stop]
        ending.enter_context(_library_errors())
        trainer = kind(replace(parts, callbacks=callbacks))
        ending.enter_context(stop_on_signals(stop, says=run is not None))
        trainer.resume(resumption.checkpoint if resumption else None)
    # with an exit code from another process, torchrun would kill the first one
    if stop.killed and run is not None:
        raise KeyboardInterrupt
    if stop.reason:
        log.info("training ended as asked: %s", stop.reason)


def _parts(
    request: TrainingRequest,
    encoder: Encoder,
    training_set: TrainingSet | Mixture,
    run: TrackedRun | None,
) -> TrainerParts:
    """What a trainer is made of, without callbacks."""
    return TrainerParts(
        encoder,
        request.trainer,
        training_set,
        collator_of(encoder),
        request.loss.objective(encoder),
        chunk_sizes=request.loss.chunk_sizes(),
        run_id=run.id if run else "",
        trust_remote_code=request.model.trust_remote_code,
        packs_texts=request.model.attn_implementation is None,
    )


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


def _metric_callback(run: TrackedRun, data: DataMetrics, last_step: int | None) -> MetricCallback:
    """Writes losses, what the data costs, and the figures of the whole training to a run."""
    return MetricCallback(run.log_metrics, last_step, data, partial(_note_summary, run))


def _note_summary(run: TrackedRun, values: Mapping[str, float]) -> None:
    """Tag a run with the figures of the whole training."""
    try:
        run.set_tags({SUMMARY_TAG: json.dumps(values)})
    except TrackingError as error:  # the training itself has ended well
        log.warning("the summary of the training is not on the run: %s", error)


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
