"""`mlflow-dr qa`."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, check_trainer_flags, takes
from mlflow_dr.qa.config import QaConfig


@click.command("qa", cls=TakesSeveral, context_settings={"ignore_unknown_options": True})
@takes(QaConfig)
@click.argument("trainer_flags", nargs=-1, type=click.UNPROCESSED)
def qa_command(config: QaConfig, trainer_flags: tuple[str, ...]) -> None:
    """Train a retriever and a reader, and answer questions.

    Both trainings are validated while they go on. --output gets the results of the retriever, the
    predictions and a page with all figures. If interrupted, the same command goes on after the last
    finished part. Flags that are not listed go to `mlflow-dr train`, for the retriever.

    \b
    Example:
        mlflow-dr qa --dataset demo-qa --output answers
        mlflow-dr qa --dataset path/to/dpr --model my-encoder --max_steps 500 --reader-steps 600
    """
    check_trainer_flags(trainer_flags)
    from mlflow_dr.qa.pipeline import answer_questions  # five seconds of imports

    click.echo(f"wrote {answer_questions(config, trainer_flags)}")
