"""`mlflow-dr reader-data`, `-train`, `-validate` and `-predict`: answers from passages."""

from __future__ import annotations

import click

from mlflow_dr.cli.options import TakesSeveral, takes
from mlflow_dr.reader.config import (
    ReaderDataConfig,
    ReaderPredictConfig,
    ReaderTrainConfig,
    ReaderValidateConfig,
)


@click.command("reader-data", cls=TakesSeveral)
@takes(ReaderDataConfig)
def reader_data_command(config: ReaderDataConfig) -> None:
    """Prepare the reader's data of a retriever's results, and show how much there is.

    The data is kept in the cache, by the files, the tokenizer and the lengths. `reader-train` and
    `reader-predict` find it there, or make it themselves.

    \b
    Example:
        mlflow-dr reader-data --results train.json --is-train-set --model bert-base-uncased
        mlflow-dr reader-data --results dev.json --model bert-base-uncased
    """
    from mlflow_dr.reader.preprocessing import prepare_data

    data = prepare_data(config)
    click.echo(f"{len(data)} questions, {data.n_passages} passages")


@click.command("reader-train", cls=TakesSeveral)
@takes(ReaderTrainConfig)
def reader_train_command(config: ReaderTrainConfig) -> None:
    """Train DPR's reader: which passage has the answer, and where it begins and ends.

    The reader is written to --output-dir, a directory that has everything to read with. Losses and
    checkpoints go to an MLflow run, and `reader-validate` measures the checkpoints.

    \b
    Example:
        mlflow-dr reader-train --train-file train.json --output-dir reader
        mlflow-dr reader-train --train-file train.json --output-dir reader --resume
    """
    from mlflow_dr.reader.training import train_reader

    done = train_reader(config)
    if done is None:  # another process of torchrun prints
        return
    click.echo(
        f"{done.steps} steps, {done.questions} questions, mean loss {done.loss:.4f}, "
        f"{done.real_tokens:.0%} of the tokens were no padding"
    )
    click.echo(f"wrote {config.output_dir}")


@click.command("reader-validate", cls=TakesSeveral)
@takes(ReaderValidateConfig)
def reader_validate_command(config: ReaderValidateConfig) -> int:
    """Measure each checkpoint of a reader's run, now and as they come.

    Several validators, on any machines, share the checkpoints of a run. The figures are written to
    the run and to the checkpoint, at the checkpoint's step, such as `reader/em_at_10`.

    \b
    Example:
        mlflow-dr reader-validate --run-id RUN --results dev.json --eval-top-docs 1 5 10
        mlflow-dr reader-validate --run-id RUN --results dev.json --once
    """
    from mlflow_dr.reader.validation import validate_reader

    counts = validate_reader(config)
    click.echo(f"{counts.done} checkpoints validated, {counts.failed} failed")
    return 1 if counts.failed else 0


@click.command("reader-predict", cls=TakesSeveral)
@takes(ReaderPredictConfig)
def reader_predict_command(config: ReaderPredictConfig) -> None:
    """Answer questions from a retriever's passages, and measure exact match and F1.

    READER is a directory that `reader-train` has written, or models:/<id> of a checkpoint. Of the
    first n passages, the one with the highest relevance is chosen, and then its best span. `em@n`
    and `f1@n` are of answers as they are in the text, `em_decoded@n` of the text that DPR makes of
    their tokens.

    \b
    Example:
        mlflow-dr reader-predict reader --results dev.json --eval-top-docs 10 20 50
        mlflow-dr reader-predict reader --results test.json --output predictions.json
    """
    from mlflow_dr.reader.prediction import predict_answers

    for name, value in predict_answers(config).items():
        click.echo(f"{name}\t{value:.4f}")
    if config.output is not None:
        click.echo(f"wrote {config.output}")
