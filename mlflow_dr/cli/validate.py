"""`mlflow-dr validate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from mlflow_dr.cli.options import (
    RUN,
    Finite,
    TakesSeveral,
    checkpoints_dir,
    encoder_changes,
    encoder_options,
    evaluation_options,
    every,
    file_options,
    given_dataset,
    keep_up,
    policy_options,
    refine,
    run_of_project,
    subset_options,
    tracking_uri,
)

ORDERS = ("oldest", "newest", "bisect")


@click.command("validate", cls=TakesSeveral)
@click.option("--run-id", help=RUN)
@click.option("--experiment", help="Or all runs of this experiment, later ones too.")
@checkpoints_dir("; figures go to --run-id, or to a new run")
@click.option("--dataset", help="The collection (default: the run's).")
@file_options
@click.option(
    "--split",
    multiple=True,
    help="The queries to put (default: the run's on its own collection, else dev, else test). Of "
    "several, each is a validation of its own, called NAME-SPLIT.",
)
@subset_options
@refine
@keep_up
@policy_options
@evaluation_options
@encoder_options
@click.option(
    "--name",
    help="Prefixes the metrics (default: val); of a subset, its name is added.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A YAML file of several validations, each with its name; other flags stand for what it "
    "does not say.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    default="oldest",
    show_default=True,
    help="What comes first; bisect: the newest, then what lies farthest from all that is done.",
)
@every
@click.option(
    "--max-lag",
    type=Finite(min=0, min_open=True),
    help="Begin no checkpoint that was published more than so many seconds ago.",
)
@click.option("--retry-failed", is_flag=True, help="Try again what was recorded as failed.")
@click.option(
    "--poll-seconds",
    type=Finite(min=0.05),
    default=2.0,
    show_default=True,
    help="Time between two looks at the server.",
)
@click.option(
    "--follow/--once",
    default=True,
    show_default=True,
    help="Wait for more checkpoints until the run has ended, or do what is there and end.",
)
@tracking_uri
def command(
    run_id: str | None,
    experiment: str | None,
    checkpoints_dir: Path | None,
    dataset: str | None,
    candidate_dir: Path | None,
    query_files: tuple[Path, ...],
    qrel_files: tuple[Path, ...],
    split: tuple[str, ...],
    name: str | None,
    config: Path | None,
    tracking_uri: str | None,
    **options: Any,
) -> int:
    """Validate each checkpoint of a run, an experiment or a directory, now and as they come.

    Collection, split and lengths come from the run and its checkpoints. Start it before, during or
    after training, stop it and start it again, and as many as you like, on any machines: each does
    what nobody else is at.

    The exit code is 1 when a checkpoint is FAILED, which says that no encoder can be read from its
    files, or when some could not be fetched or read on this machine and are left to others.

    \b
    Example:
        mlflow-dr validate --run-id 0123456789abcdef0123456789abcdef
        mlflow-dr validate --experiment msmarco --order bisect --config validations.yaml
        mlflow-dr validate --checkpoints-dir output --dataset path/to/beir
        mlflow-dr validate --ckpts_dir output --candidate_dir corpus --query_files dev.json \\
            --qrel_file qrels.tsv --metrics RR@10 nDCG@10
    """
    if bool(run_id or checkpoints_dir) == bool(experiment):
        raise click.UsageError("give --run-id, --experiment or --checkpoints-dir")
    dataset, sets = given_dataset(dataset, candidate_dir, query_files, qrel_files)
    if checkpoints_dir and not (run_id or dataset or config):
        raise click.UsageError("a new run names no dataset; give --dataset")

    from mlflow_dr.tracking.client import connect, limit_mlflow_retries
    from mlflow_dr.tracking.patience import Patience
    from mlflow_dr.tracking.status import curves_hint
    from mlflow_dr.validation.watch import watch

    project = run_of_project(tracking_uri)
    plan = _plan(config, (dataset, sets, split), name, options)
    limit_mlflow_retries()
    # a run that is there is followed; a new one may be the first of its store
    client = connect(tracking_uri, may_create=not (run_id or experiment))
    patiently = Patience(client, plan.poll_seconds)
    with _followed(client, patiently, run_id, experiment, checkpoints_dir, dataset) as followed:
        counts = watch(followed, plan)
        is_project = project and followed.run and followed.run.id == project.id
        if followed.run is not None and not is_project:
            click.echo(curves_hint(followed.run), err=True)
        if project is not None and not is_project:
            text = f"validated {counts.done} checkpoints of {followed.name}\n"
            figures = {"validated/done": counts.done, "validated/failed": counts.failed}
            project.log_report(figures, {"validated.txt": text})
    return 0 if counts.are_good else 1


@contextmanager
def _followed(
    client: Any,
    patiently: Any,
    run_id: str | None,
    experiment: str | None,
    directory: Path | None,
    dataset: str | None,
) -> Iterator[Any]:
    """What is followed; a run that is made for it names the dataset, and is ended with it."""
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.tracking.directories import FollowedDirectory
    from mlflow_dr.tracking.following import FollowedExperiment, FollowedRun
    from mlflow_dr.tracking.runs import DATASET_TAG, open_run, resolve_run

    if experiment is not None:
        yield patiently(partial(FollowedExperiment, client, experiment))
    elif run_id is not None:
        run = patiently(partial(resolve_run, client, run_id))
        if directory is None:
            yield FollowedRun(run)
        else:
            yield FollowedDirectory(run, directory, is_mine=False)
    else:
        named = {DATASET_TAG: open_collection(dataset).name} if dataset else {}
        run = patiently(partial(open_run, client))
        patiently(partial(run.set_tags, named))
        click.echo(f"run {run.id} ({run.name})", err=True)
        with run.finish_on_exit("validation"):
            yield FollowedDirectory(run, cast(Path, directory), is_mine=True)


def plan_of(words: Sequence[str]) -> Any:
    """The plan that the command would make of these flags.

    Raises:
        ClickException: a flag that it does not have, or a value that it does not take.
        UsageError: flags that make no sense together.
    """
    with command.make_context("validate", list(words)) as context:
        given = context.params
    names = ("dataset", "candidate_dir", "query_files", "qrel_files")
    dataset, sets = given_dataset(*(given[name] for name in names))
    return _plan(given["config"], (dataset, sets, given["split"]), given["name"], given)


def _plan(
    config: Path | None,
    data: tuple[str | None, Sequence[str], Sequence[str]],
    name: str | None,
    options: dict[str, Any],
) -> Any:
    from mlflow_dr.decisions.pruning import parse_keep_rules
    from mlflow_dr.engines.devices import resolve_device, resolve_dtype
    from mlflow_dr.retrieval.measures import check_depth, parse_measures
    from mlflow_dr.tracking.validations import FIRST_NAME
    from mlflow_dr.validation.evaluate import Settings
    from mlflow_dr.validation.order import Order
    from mlflow_dr.validation.plan import Asked, Plan
    from mlflow_dr.validation.plan_file import read_plan
    from mlflow_dr.validation.policies import Wishes

    if config is not None and name is not None:
        raise click.UsageError("--name beside --config: names are in the file")
    measures = parse_measures(options["measures"])
    check_depth(measures, options["depth"])
    resolve_dtype(options["dtype"], resolve_device(options["device"]))
    settings = Settings(
        measures,
        options["depth"],
        options["device"],
        options["dtype"],
        options["keep_own_id"],
    )
    asked = Asked(
        settings,
        *data,
        subsets=options["subsets"],
        seed=options["seed"],
        judged=options["judged"],
        refine=options["refine"],
    )
    others: dict[str, Any] = {
        "order": Order(options["order"]),
        "every": options["every"],
        "max_lag_seconds": options["max_lag"],
        "retry_failed": options["retry_failed"],
        "keep_up": options["keep_up"],
        "wishes": Wishes(
            options["metric"],
            options["patience"],
            options["min_delta"],
            parse_keep_rules(options["keep"]) if options["keep"] else None,
        ),
        "follow": options["follow"],
        "poll_seconds": options["poll_seconds"],
        "encoder_changes": encoder_changes(options),
    }
    if config is not None:
        return read_plan(config, asked, **others)
    return Plan(asked.validations(name or FIRST_NAME), **others)
