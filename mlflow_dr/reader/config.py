"""Configurations of `reader-data`, `reader-train` and `reader-predict`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from mlflow_dr.config import Config, Flag, checked
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.fields import (
    RUN,
    Count,
    Device,
    Dtype,
    File,
    Force,
    Seed,
    Texts,
    TrackingUri,
    as_texts,
)
from mlflow_dr.validation.config import FollowConfig
from mlflow_dr.validation.validations import Refines

COUNT = re.compile("[1-9][0-9]{0,8}")
Number = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
GoldPassages = Annotated[
    File | None,
    Flag("--gold-passages", "--gold-passages-src"),
    Field(
        description="DPR's file of gold passages: passages of a question's own article are its "
        "positives."
    ),
]
SequenceLength = Annotated[
    int, Field(ge=16, description="Longest sequence of question, title and passage, in tokens.")
]


class ReaderDataConfig(Config):
    """`mlflow-dr reader-data`: the reader's data of a retriever's results."""

    results: Annotated[File, Flag("--results", "--retriever-results")]
    """A retriever's results: JSON as `dense_retriever` of DPR writes it, or JSON lines."""
    model: Annotated[str, Flag("--model", "--pretrained-model-cfg")] = "bert-base-uncased"
    """The model whose tokenizer is used."""
    is_train_set: bool = False
    """Choose positives and negatives to learn from; without it, the data is for prediction."""
    gold_passages: GoldPassages = None


class ReaderTrainConfig(Config):
    """`mlflow-dr reader-train`: a reader learns from a retriever's results."""

    train_file: File
    """A retriever's results with `has_answer` for each passage."""
    gold_passages: GoldPassages = None
    model: Annotated[str, Flag("--model", "--pretrained-model-cfg")] = "bert-base-uncased"
    """The encoder or reader to begin with: a directory, a hub name, or models:/<id>."""
    output_dir: File
    """Where the reader is written, and checkpoints to resume from."""
    batch_size: Count = 16
    """Questions in a step of one process, before --gradient-accumulation-steps."""
    passages_per_question: Annotated[int, Field(ge=2)] = 24
    """Passages of a question in a step: one positive, and negatives."""
    sequence_length: SequenceLength = 350
    max_n_answers: Count = 10
    """Most places of answers in a passage that are learnt from."""
    learning_rate: Positive = 1e-5
    """Largest learning rate; it falls linearly to 0."""
    warmup_steps: Number = 0
    """Steps while the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of Adam."""
    adam_eps: Positive = 1e-8
    """Adam's epsilon."""
    max_grad_norm: Positive = 1.0
    """Longest gradient; longer ones are scaled down to it."""
    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Dropout while training (default: the model's own). 0 is faster on a processor."""
    num_train_epochs: Positive = 3.0
    """Visits of each question."""
    max_steps: Count | None = None
    """Steps, instead of --num-train-epochs."""
    gradient_accumulation_steps: Count = 1
    """Batches of a step."""
    log_batch_step: Count = 100
    """Steps between two logged losses."""
    save_steps: Count | None = None
    """Steps between two checkpoints to resume from (default: none)."""
    resume: bool = False
    """Resume from the last checkpoint in --output-dir."""
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    publish_steps: Count = 500
    """Steps between two published checkpoints; the last step is always published."""
    tracking_uri: TrackingUri = None
    experiment_name: str | None = None
    """The experiment of a new run."""
    run_name: str | None = None
    """The name of the MLflow run."""
    force: Force = False


def parse_counts(texts: Sequence[str]) -> tuple[int, ...]:
    """Numbers from 1 on, such as `1 5 10` or `1,5,10`.

    Raises:
        UsageError: there is something else, or nothing.
    """
    text = " ".join(texts)
    words = text.replace(",", " ").split()
    if not words or not all(COUNT.fullmatch(word) for word in words):
        raise UsageError(f"{quoted(text)}: expected numbers of passages, such as 1 5 10")
    return tuple(dict.fromkeys(map(int, words)))


class ReaderEvalConfig(Config):
    """How a reader answers the questions of a retriever's results."""

    results: Annotated[File, Flag("--results", "--dev-file")]
    """A retriever's results: JSON as `dense_retriever` of DPR writes it, or JSON lines."""
    gold_passages: GoldPassages = None
    eval_top_docs: Annotated[
        Texts,
        BeforeValidator(as_texts),
        AfterValidator(checked(lambda texts: texts and parse_counts(texts))),
        Flag("--eval-top-docs"),
    ] = ()
    """Numbers of passages, such as 1,5,10; each is evaluated by itself (default: all that are
    read)."""
    passages_per_question: Annotated[
        int, Flag("--passages-per-question", "--passages-per-question-predict"), Field(ge=1, le=100)
    ] = 50
    """Passages of a question that are read."""
    max_answer_length: Count = 10
    """Longest answer, in tokens."""
    sequence_length: SequenceLength = 350
    device: Device = "auto"
    dtype: Dtype = "auto"

    @property
    def top_docs(self) -> tuple[int, ...]:
        """Numbers of passages that the reader chooses from."""
        return (
            parse_counts(self.eval_top_docs)
            if self.eval_top_docs
            else (self.passages_per_question,)
        )


class ReaderValidation(NamedTuple):
    """What is measured on every checkpoint of a reader.

    Attributes:
        name: prefixes the metrics.
        refines: None, for every checkpoint is measured.
        mean_of: nothing, for a reader is measured on one set of questions.
    """

    name: str
    refines: Refines | None = None
    mean_of: tuple[str, ...] = ()


class ReaderPredictConfig(ReaderEvalConfig):
    """`mlflow-dr reader-predict`: answers of a reader, from a retriever's results."""

    reader: Annotated[str, Flag(positional=True)]
    output: Annotated[File | None, Flag("--output", "--prediction-results-file")] = None
    """The file of predictions to write, in DPR's layout."""
    tracking_uri: TrackingUri = None
    force: Force = False


class ReaderValidateConfig(ReaderEvalConfig, FollowConfig):
    """`mlflow-dr reader-validate`: figures of each checkpoint of a reader's run."""

    run_id: Annotated[str, RUN]
    name: Annotated[str, Field(pattern=r"^[\w\- ]+$")] = "reader"
    """Prefix of the metrics; a name stands for one configuration on a run."""

    @property
    def all_validations(self) -> tuple[ReaderValidation]:
        """The validation."""
        return (ReaderValidation(self.name),)
