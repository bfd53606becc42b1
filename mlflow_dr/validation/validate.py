"""Validate what a configuration names: a run, an experiment or a directory of checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.suites import suite_members
from mlflow_dr.engines.opening import check_devices_and_dtype
from mlflow_dr.tracking.client import Client, connect
from mlflow_dr.tracking.descriptions import dated_name
from mlflow_dr.tracking.following import (
    Followed,
    FollowedDirectory,
    FollowedExperiment,
    FollowedRun,
)
from mlflow_dr.tracking.runs import DATASET_TAG, open_run, resolve_run
from mlflow_dr.tracking.server import Patience
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts

log = logging.getLogger(__name__)


def validate(config: ValidateConfig) -> tuple[Followed, Counts]:
    """Validate checkpoints now and as they come.

    Args:
        config: names a run, an experiment or a directory; a directory's figures go to its run, or
            to a new one.

    Returns:
        What was followed, and how many checkpoints were validated.

    Raises:
        UsageError: none of them is named, or an unknown dataset or device.
        TrackingError: no such run or experiment, or no server.
        UnavailableError: checkpoint after checkpoint cannot be fetched or read on this machine.
    """
    config.check_source()
    for validation in config.all_validations:
        settings = validation.settings
        check_devices_and_dtype(settings.engine, settings.device, settings.dtype)
    # a run that exists is followed; a new one may be the first of its store
    client = connect(config.tracking_uri, may_create=not (config.run_id or config.experiment))
    with _followed(client, config) as followed:
        return followed, run_validator(followed, config)


@contextmanager
def _followed(client: Client, config: ValidateConfig) -> Iterator[Followed]:
    """What is followed; a run that is made for a directory names the dataset, and ends with it."""
    patiently = Patience(client, config.poll_seconds)
    directory = config.checkpoints_dir
    if config.experiment is not None:
        yield patiently(partial(FollowedExperiment, client, config.experiment))
    elif config.run_id is not None:
        run = patiently(partial(resolve_run, client, config.run_id))
        if directory is None:
            yield FollowedRun(run)
        else:
            yield FollowedDirectory(run, directory, is_mine=False)
    else:
        directory, (dataset, _) = directory or Path(), config.named_dataset()
        is_one = dataset is not None and not suite_members(dataset)
        tags = {DATASET_TAG: open_collection(str(dataset)).name} if is_one else {}
        usual = dated_name(dataset or "validation", str(directory))
        run = patiently(partial(open_run, client, default_name=usual))
        patiently(partial(run.set_tags, tags))
        log.info("run %s (%s)", run.id, run.name)
        with run.finish_on_exit("validation"):
            yield FollowedDirectory(run, directory, is_mine=True)
