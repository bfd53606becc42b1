"""`mlflow-dr run`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import depth, dtype, measures, tracking_uri


@click.command("run", context_settings={"ignore_unknown_options": True})
@click.option("--dataset", default="demo", show_default=True, help="The collection.")
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
@click.option("--name", default="val", show_default=True, help="Prefixes the metrics.")
@click.option("--poll-seconds", type=click.FloatRange(min=0.05), default=2.0, show_default=True)
@click.option("--experiment-name", help="The experiment of a new run.")
@tracking_uri
@click.argument("trainer_flags", nargs=-1, type=click.UNPROCESSED)
def command(
    dataset: str,
    model: str,
    gpus: int,
    measures: str,
    depth: int | None,
    dtype: str,
    name: str,
    poll_seconds: float,
    experiment_name: str | None,
    tracking_uri: str | None,
    trainer_flags: tuple[str, ...],
) -> int:
    """Train and validate side by side; what `mlflow run .` calls.

    Flags that are not listed go to `mlflow-dr train`. The validator takes the last GPU when there
    are two or more, else its share of the processor.

    \b
    Example:
        mlflow-dr run --dataset demo --learning-rate 1e-3
    """
    from mlflow_dr.launch import launch

    training = ["--dataset", dataset, *trainer_flags]
    if model != "auto":
        training += ["--model", model]
    validating = ["--measures", measures, "--dtype", dtype, "--name", name]
    validating += ["--poll-seconds", str(poll_seconds)]
    if depth is not None:
        validating += ["--depth", str(depth)]
    return launch(training, validating, name, tracking_uri, experiment_name, gpus)
