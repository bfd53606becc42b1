"""Configuration of `mlflow-dr qa`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mlflow_dr.config import Config, ConfigError, Flag, checked
from mlflow_dr.fields import Count, File, Match, Seed, Subsets, TrackingUri, joined
from mlflow_dr.reader.config import parse_counts

NOT_IN_FOLDER = re.compile(r"[^\w.-]+")
TINY = "tiny"
TINY_READER_RATE, READER_RATE = 1e-3, 1e-4


class QaConfig(Config):
    """`mlflow-dr qa`: from questions with answers to a curve of exact match."""

    dataset: str = "demo-qa"
    """A collection with two splits of questions that have answers: a folder, a name, or
    dpr:<files>."""
    train_split: str = "train"
    """The questions to train the reader on, and the retriever if there are no other examples."""
    split: str | None = None
    """The questions to measure on (default: dev, else test)."""
    output: File | None = None
    """The folder of all that is written (default: qa-DATASET). A finished part in it is kept."""
    train_questions: Count = 1500
    """Use a random sample of this many questions of the training split."""
    dev_questions: Count = 300
    """Measure on a random sample of this many questions."""
    seed: Seed = 0
    match: Match = "string"
    model: str = TINY
    """The encoder that the retriever begins with; tiny is trained from scratch."""
    subset: Annotated[Subsets, Field(max_length=1)] = ()
    depth: Count = 50
    """Passages of each question that are found for the reader."""
    reader_model: str | None = None
    """The encoder or reader that the reader begins with (default: the best retriever)."""
    reader_steps: Count = 250
    """Training steps of the reader."""
    reader_publish_steps: Count = 50
    """Steps between two checkpoints of the reader, each of which is measured."""
    reader_batch_size: Count = 8
    """Questions in a step of the reader."""
    reader_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Largest learning rate of the reader (default: 1e-3 with tiny, else 1e-4)."""
    passages_per_question: Annotated[int, Field(ge=2)] = 4
    """Passages of a question in a step of the reader."""
    sequence_length: Annotated[int, Field(ge=16)] = 256
    """Longest sequence of the reader, in tokens."""
    eval_top_docs: Annotated[
        str,
        BeforeValidator(joined),
        AfterValidator(checked(lambda text: parse_counts([text]))),
        Flag("--eval-top-docs", several=True),
    ] = "1 5 10"
    """Numbers of passages that the reader chooses from, in one word such as "1 5 10"; each is
    measured by itself."""
    poll_seconds: Annotated[float, Field(gt=0)] = 2.0
    """Seconds between two requests of a validator to the server."""
    experiment_name: str | None = None
    """The experiment of a new run."""
    tracking_uri: TrackingUri = None
    force: Annotated[bool, Field(description="Begin anew instead of keeping finished parts.")] = (
        False
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        most = max(self.top_docs)
        if most > min(self.depth, 100):
            raise ConfigError(
                "eval_top_docs", f" {most}: only {min(self.depth, 100)} passages are read (--depth)"
            )
        return self

    @property
    def top_docs(self) -> tuple[int, ...]:
        """Numbers of passages that the reader chooses from."""
        return parse_counts([self.eval_top_docs])

    @property
    def folder(self) -> Path:
        """The folder of all that is written."""
        name = NOT_IN_FOLDER.sub("-", Path(self.dataset.partition("?")[0]).name).strip("-.")
        return self.output or Path(f"qa-{name or 'output'}")

    @property
    def reader_rate(self) -> float:
        """The largest learning rate of the reader."""
        usual = TINY_READER_RATE if self.model == TINY else READER_RATE
        return self.reader_learning_rate or usual
