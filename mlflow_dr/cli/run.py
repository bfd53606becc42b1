"""`mlflow-dr run`."""

from __future__ import annotations

from typing import Any

import click

from mlflow_dr.cli.options import (
    Finite,
    depth,
    dtype,
    judged,
    keep_up,
    measures,
    policy_options,
    refine,
    subset,
    tracking_uri,
)


@click.command("run", context_settings={"ignore_unknown_options": True})
@click.option("--dataset", help="The collection (default: what --config says, else demo).")
@click.option(
    "--model", default="auto", show_default=True, help="The encoder; auto: as fits the dataset."
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Training processes, each on a GPU of its own (torchrun); the validator takes another.",
)
@measures
@depth
@dtype
@subset
@judged
@refine
@keep_up
@policy_options
@click.option("--name", default="val", show_default=True, help="Prefixes the metrics.")
@click.option(
    "--poll-seconds",
    "--poll_seconds",
    type=Finite(min=0.05),
    default=2.0,
    show_default=True,
    help="Time between two requests for new checkpoints.",
)
@click.option("--experiment-name", "--experiment_name", help="The experiment of a new run.")
@tracking_uri
@click.argument("trainer_flags", nargs=-1, type=click.UNPROCESSED)
def command(
    dataset: str | None,
    model: str,
    gpus: int,
    name: str,
    subsets: tuple[str, ...],
    experiment_name: str | None,
    tracking_uri: str | None,
    trainer_flags: tuple[str, ...],
    **validator_options: Any,
) -> int:
    """Train and validate side by side; what `mlflow run .` calls.

    Flags that are not listed go to `mlflow-dr train`, and --seed is the training's. The validator
    takes the last GPU when there are two or more, else its share of the processor.

    \b
    Example:
        mlflow-dr run --dataset demo --learning-rate 1e-3 --patience 3
    """
    from mlflow_dr.training.flags import check_flags

    parameters = click.get_current_context().command.params
    own = [name for parameter in parameters for name in parameter.opts]
    check_flags(trainer_flags, own)  # before five seconds of imports
    from mlflow_dr.cli.validate import plan_of
    from mlflow_dr.engines.share import share_machine
    from mlflow_dr.launch import launch

    training = [*(("--dataset", dataset) if dataset else ()), *trainer_flags]
    if model != "auto":
        training += ["--model", model]
    validating = ["--name", name]
    for key, value in [*validator_options.items(), *(("subset", one) for one in subsets)]:
        flag = f"--{key.replace('_', '-')}"
        if value is True:
            validating.append(flag)
        elif value not in (None, False):
            validating += [flag, str(value)]
    plan = plan_of([*share_machine(trainers=gpus).validator_flags, *validating])
    # what is shown in the end is the first of them
    shown = plan.validations[0].name
    return launch(training, validating, shown, tracking_uri, experiment_name, gpus)
