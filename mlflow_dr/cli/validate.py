"""`mlflow-dr validate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from mlflow_dr.cli.options import TakesSeveral, find_project_run, takes
from mlflow_dr.validation.config import ValidateConfig


@click.command("validate", cls=TakesSeveral)
@takes(ValidateConfig, has_file=True)
def validate_command(config: ValidateConfig) -> int:
    """Validate each checkpoint of a run, an experiment or a directory, now and as they come.

    Collection, split and lengths come from the run and its checkpoints. Start any number of
    validators, on any machines, before, during or after the training, and stop and restart them
    at any time: each takes checkpoints that no other one is working on.

    A --config file may have several validations by name, under the key `validations`.

    The exit code is 1 when a checkpoint is FAILED (no encoder can be read from its files, or it
    took longer than --max-seconds), or when some could not be fetched or read on this machine and
    are left to other validators.

    \b
    Example:
        mlflow-dr validate --run-id 0123456789abcdef0123456789abcdef
        mlflow-dr validate --experiment msmarco --order bisect --config validations.yaml
        mlflow-dr validate --checkpoints-dir output --dataset path/to/beir
        mlflow-dr validate --ckpts_dir output --candidate_dir corpus --query_files dev.json \\
            --qrel_file qrels.tsv --metrics RR@10 nDCG@10
    """
    if bool(config.run_id or config.checkpoints_dir) == bool(config.experiment):
        raise click.UsageError("give --run-id, --experiment or --checkpoints-dir")
    dataset, _ = config.named_dataset()
    if config.checkpoints_dir and not (config.run_id or dataset or config.validations):
        raise click.UsageError("a new run names no dataset; give --dataset")

    from mlflow_dr.engines.opening import check_devices_and_dtype
    from mlflow_dr.tracking.client import connect, limit_mlflow_retries
    from mlflow_dr.tracking.server import Patience
    from mlflow_dr.tracking.status import curves_hint
    from mlflow_dr.validation.validator import run_validator

    for validation in config.all_validations:
        settings = validation.settings
        check_devices_and_dtype(settings.engine, settings.device, settings.dtype)
    project = find_project_run(config.tracking_uri)
    limit_mlflow_retries()
    # a run that exists is followed; a new one may be the first of its store
    client = connect(config.tracking_uri, may_create=not (config.run_id or config.experiment))
    patiently = Patience(client, config.poll_seconds)
    with _followed(client, patiently, config, dataset) as followed:
        counts = run_validator(followed, config)
        is_project = project and followed.run and followed.run.id == project.id
        if followed.run is not None and not is_project:
            click.echo(curves_hint(followed.run), err=True)
        if project is not None and not is_project:
            text = (
                f"validated {counts.done} checkpoints of {followed.name}; {counts.failed} failed\n"
            )
            project.log_report({}, {"validated.txt": text})
    return 0 if counts.are_good else 1


@contextmanager
def _followed(
    client: Any, patiently: Any, config: ValidateConfig, dataset: str | None
) -> Iterator[Any]:
    """What is followed; a run that is made for a directory names the dataset, and ends with it."""
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.collection.suites import suite_members
    from mlflow_dr.tracking.descriptions import dated_name
    from mlflow_dr.tracking.following import FollowedDirectory, FollowedExperiment, FollowedRun
    from mlflow_dr.tracking.runs import DATASET_TAG, open_run, resolve_run

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
        is_one = dataset is not None and not suite_members(dataset)
        tags = {DATASET_TAG: open_collection(str(dataset)).name} if is_one else {}
        usual = dated_name(dataset or "validation", str(directory))
        run = patiently(partial(open_run, client, default_name=usual))
        patiently(partial(run.set_tags, tags))
        click.echo(f"run {run.id} ({run.name})", err=True)
        with run.finish_on_exit("validation"):
            yield FollowedDirectory(run, cast(Path, directory), is_mine=True)
