"""Training from beginning to end: from a collection to checkpoints and figures in MLflow."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from types import FrameType
from typing import Any

from transformers import set_seed

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.interface import Examples, chosen_split
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tiny import tiny_encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    SPLIT_PARAM,
    TrackedRun,
    open_run,
)
from mlflow_dr.training.arguments import RetrieverTrainingArguments, TrainingRequest
from mlflow_dr.training.batches import Collator, TrainingSet
from mlflow_dr.training.publishing import Publisher
from mlflow_dr.training.trainer import (
    MetricCallback,
    PublishCallback,
    RetrieverTrainer,
    StopCallback,
)

log = logging.getLogger(__name__)

TINY = "tiny"
ALWAYS_LOGGED = (
    "learning_rate",
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "gradient_accumulation_steps",
    "seed",
    "bf16",
    "fp16",
)
NEVER_LOGGED = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token"}


def train(request: TrainingRequest) -> str:
    """Train an encoder and publish its checkpoints.

    Returns:
        The id of the MLflow run.

    Raises:
        UsageError: the collection has no training examples, or there is no such encoder.
        TrackingError: the tracking server cannot be reached.
        KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and its encoder published.
    """
    client = connect(request.publish.tracking_uri)
    collection = open_collection(request.data.dataset_name)
    split = chosen_split(collection, request.data.validation_split)
    examples = collection.examples()
    run = open_run(client, request.publish.experiment_name)
    log.info("run %s (%s)", run.id, run.name)
    status = "FAILED"
    try:
        run.set_tags({DATASET_TAG: collection.name})
        run.log_params({DATASET_PARAM: collection.name, SPLIT_PARAM: split, **_params(request)})
        run.log_collection(
            collection.name,
            digest=examples.digest,
            source=collection.source,
            profile={"examples": len(examples), "split": "train"},
            context="training",
        )
        _train(request, examples, run)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.finish(status)
        log.info("run %s: training %s", run.id, status.lower())
    return run.id


def _train(request: TrainingRequest, examples: Examples, run: TrackedRun) -> None:
    set_seed(request.trainer.seed)
    encoder = _encoder(request, examples)
    _one_device(request.trainer)
    log.info("training %s on %d examples", request.model.model_name_or_path, len(examples))
    publisher = Publisher(run, encoder)
    stop = StopCallback()
    trainer = RetrieverTrainer(
        encoder,
        request.trainer,
        TrainingSet(examples, request.data.train_n_passages, request.trainer.seed),
        Collator(Tokenizing(encoder.tokenizer, encoder.settings)),
        request.model.temperature,
        [
            MetricCallback(run.log_metrics),
            PublishCallback(
                publisher, request.publish.publish_steps, request.publish.publish_initial
            ),
            stop,
        ],
        request.chunk_sizes(),
    )
    try:
        with _asked_by_signals(stop):
            trainer.train()
    except Exception:  # not KeyboardInterrupt, which means at once, published or not
        publisher.close()
        raise
    publisher.close()
    if stop.reason:
        raise KeyboardInterrupt


def _encoder(request: TrainingRequest, examples: Examples) -> Encoder:
    if request.model.model_name_or_path == TINY:
        return tiny_encoder(_texts(examples), request.fresh_encoder_config())
    changes: dict[str, Any] = request.encoder_changes()
    return load_encoder(
        request.model.model_name_or_path,
        attention=request.model.attn_implementation,
        trust_remote_code=request.model.trust_remote_code,
        **changes,
    )


def _texts(examples: Examples) -> Iterator[str]:
    for index in range(len(examples)):
        example = examples[index]
        yield example.query.text
        for passage in example.positives:
            yield f"{passage.title} {passage.text}"


def _params(request: TrainingRequest) -> dict[str, Any]:
    """What the run shows: our own arguments, and Hugging Face's where they are not the default."""
    defaults = {
        field.name: field.default
        for field in fields(RetrieverTrainingArguments)
        if field.default is not MISSING
    }
    values = request.trainer.to_dict()
    chosen = {
        name: value
        for name, value in values.items()
        if name in ALWAYS_LOGGED
        or (isinstance(value, bool | int | float | str) and value != defaults.get(name, value))
    }
    own = {
        "model": request.model.model_name_or_path,
        **asdict(request.model),
        **asdict(request.data),
        "publish_steps": request.publish.publish_steps,
    }
    both = {**chosen, **own}
    return {
        name: value
        for name, value in both.items()
        if value not in (None, "") and name not in NEVER_LOGGED
    }


def _one_device(arguments: RetrieverTrainingArguments) -> None:
    """Keep Trainer from nn.DataParallel, which would split the batch and its in-batch negatives."""
    if arguments.n_gpu > 1:
        log.warning("%d GPUs are visible; training uses the first one", arguments.n_gpu)
        arguments._n_gpu = 1


@contextmanager
def _asked_by_signals(stop: StopCallback) -> Iterator[None]:
    """On SIGINT or SIGTERM end cleanly after the step; the second time at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.reason:
            raise KeyboardInterrupt
        stop.ask(signal.Signals(number).name)
        print("stopping after this step; once more to stop at once", file=sys.stderr)  # noqa: T201

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
