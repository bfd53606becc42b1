"""Training arguments: our own beside Hugging Face's, under the names that Tevatron's users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.encoder.config import (
    DEFAULT_PASSAGE_LENGTH,
    DEFAULT_QUERY_LENGTH,
    EncoderConfig,
)
from mlflow_dr.errors import UsageError


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(
        default="bert-base-uncased",
        metadata={
            "aliases": ["--model"],
            "help": "An encoder's or backbone's directory, a Hugging Face name, or `tiny`: a "
            "two-layer BERT from scratch.",
        },
    )
    pooling: str | None = field(
        default=None,
        metadata={
            "help": "cls, mean, last, max, mean_sqrt_len or weighted_mean (default: what "
            "the encoder's directory says; mean for a bare backbone)."
        },
    )
    normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Scale vectors to length 1, so that the score is the cosine (default: "
            "what the encoder's directory says; no for a bare backbone)."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the scores in the loss."})
    query_prefix: str | None = field(default=None, metadata={"help": "Put before every query."})
    passage_prefix: str | None = field(default=None, metadata={"help": "Put before every passage."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "transformers' attention: sdpa, eager, flash_attention_2."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Let code in the backbone's directory run."}
    )

    grad_cache: bool = field(
        default=False,
        metadata={"help": "Encode the batch in chunks: the same gradient in less memory."},
    )
    gc_q_chunk_size: int = field(default=4, metadata={"help": "Queries in a chunk."})
    gc_p_chunk_size: int = field(default=32, metadata={"help": "Passages in a chunk."})

    def __post_init__(self) -> None:
        for name in ("gc_q_chunk_size", "gc_p_chunk_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature}; it must be above 0")


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str = field(
        default="demo",
        metadata={
            "aliases": ["--dataset"],
            "help": "demo, msmarco, a folder in BEIR's layout, or irds:<id>.",
        },
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "The split that validators measure (default: dev, else test)."},
    )
    train_n_passages: int = field(
        default=8,
        metadata={"help": "Passages per query: one positive, the rest hard negatives."},
    )
    q_max_len: int = field(
        default=DEFAULT_QUERY_LENGTH, metadata={"help": "Tokens of a query at most."}
    )
    p_max_len: int = field(
        default=DEFAULT_PASSAGE_LENGTH, metadata={"help": "Tokens of a passage at most."}
    )
    passage_field_separator: str = field(
        default=" ", metadata={"help": "Stands between a passage's title and text."}
    )

    def __post_init__(self) -> None:
        if self.train_n_passages < 1:
            raise UsageError(f"train_n_passages is {self.train_n_passages}; it must be at least 1")


@dataclass
class PublishArguments:
    """What goes to MLflow."""

    publish_steps: int = field(
        default=500, metadata={"help": "Publish a checkpoint every so many steps; 0: at the end."}
    )
    publish_initial: bool = field(
        default=True, metadata={"help": "Publish the encoder before the first step, too."}
    )
    tracking_uri: str | None = field(
        default=None, metadata={"help": "The tracking server (default: MLFLOW_TRACKING_URI)."}
    )
    experiment_name: str | None = field(
        default=None, metadata={"help": "The experiment of a new run."}
    )

    def __post_init__(self) -> None:
        if self.publish_steps < 0:
            raise UsageError(f"publish_steps is {self.publish_steps}; it must be at least 0")


@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """Hugging Face's arguments, with defaults for publishing to MLflow instead of saving here."""

    output_dir: str | None = field(
        default="outputs", metadata={"help": "Where --save_steps writes checkpoints."}
    )
    save_strategy: SaveStrategy | str = field(
        default="no", metadata={"help": "no, steps or epoch; --save_steps alone means steps."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    # HfArgumentParser takes the second type of a union that has None: a string
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Further integrations; MLflow is always written to."}
    )


@dataclass(frozen=True)
class TrainingRequest:
    """Everything that `mlflow-dr train` was asked."""

    model: ModelArguments
    data: DataArguments
    publish: PublishArguments
    trainer: RetrieverTrainingArguments

    def chunk_sizes(self) -> dict[str, int] | None:
        """Texts in a chunk of the gradient cache, by role; None without it."""
        if not self.model.grad_cache:
            return None
        return {"query": self.model.gc_q_chunk_size, "passage": self.model.gc_p_chunk_size}

    def encoder_changes(self) -> dict[str, Any]:
        """What the flags say about the encoder; the rest stays as its directory says."""
        wanted = {
            "pooling": self.model.pooling,
            "normalize": self.model.normalize,
            "query_prompt": self.model.query_prefix,
            "passage_prompt": self.model.passage_prefix,
            "query_max_length": self.data.q_max_len,
            "passage_max_length": self.data.p_max_len,
            "title_separator": self.data.passage_field_separator,
        }
        return {key: value for key, value in wanted.items() if value is not None}

    def fresh_encoder_config(self) -> EncoderConfig:
        """The configuration of an encoder that is made from scratch."""
        return EncoderConfig(**self.encoder_changes())
