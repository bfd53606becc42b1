"""`mlflow-dr train`."""

from __future__ import annotations

import inspect

import click


@click.command(
    "train",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def command(flags: tuple[str, ...]) -> None:
    """Train an encoder and publish its checkpoints to MLflow.

    Takes the flags of Hugging Face's TrainingArguments, of Tevatron and of GC-DPR, with dashes or
    underscores, and --config FILE (YAML or JSON).

    \b
    Example:
        mlflow-dr train --dataset demo --model tiny --max-steps 300 --publish-steps 50
    """
    if {"-h", "--help"} & set(flags):
        from mlflow_dr.training.parsing import training_parser

        about = inspect.cleandoc(command.help or "").replace("\b\n", "")
        click.echo(f"{about}\n\n{training_parser().format_help()}")
        return
    from mlflow_dr.training.flags import check_flags

    check_flags(flags)  # before five seconds of imports
    from mlflow_dr.training.parsing import parse_training
    from mlflow_dr.training.train import train

    train(parse_training(flags))
