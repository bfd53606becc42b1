"""`mlflow-dr run`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.validation.config import RunConfig


@click.command("run", cls=TakesSeveral, context_settings={"ignore_unknown_options": True})
@takes(RunConfig)
@click.argument("trainer_flags", nargs=-1, type=click.UNPROCESSED)
def command(config: RunConfig, trainer_flags: tuple[str, ...]) -> int:
    """Train and validate side by side; what `mlflow run .` calls.

    Flags that are not listed go to `mlflow-dr train`, and --seed is the training's. The validator
    takes the last GPU when there are two or more, else its share of the processor.

    \b
    Example:
        mlflow-dr run --dataset demo --learning-rate 1e-3 --patience 3
    """
    from mlflow_dr.training.flags import check_flags

    parameters = click.get_current_context().command.params
    check_flags(trainer_flags, [name for parameter in parameters for name in parameter.opts])
    training = [*(("--dataset", config.dataset) if config.dataset else ()), *trainer_flags]
    if config.model != "auto":
        training += ["--model", config.model]
    from mlflow_dr.launch import launch  # five seconds of imports

    return launch(config, training)
