"""What makes an encoder beside its weights: all that must not be forgotten at encode time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from mlflow_dr.errors import UsageError

POOLINGS = ("cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean")
ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "sigmoid")
DEFAULT_QUERY_LENGTH = 32
DEFAULT_PASSAGE_LENGTH = 128
SHORTEST = 3
"""Tokens of a text at most: a special token at each end, and one between them."""


@dataclass(frozen=True)
class ProjectionConfig:
    """One linear layer after the pooling."""

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "identity"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation {self.activation!r}: expected one of {', '.join(ACTIVATIONS)}"
            )


@dataclass(frozen=True)
class EncoderConfig:
    """How text becomes a vector around the backbone.

    Attributes:
        pooling: how the token vectors become one; see `mlflow_dr.encoder.pooling`.
        normalize: whether vectors are scaled to length 1, so that the dot product is the cosine.
        projections: linear layers between pooling and normalisation.
        query_prompt: put before every query.
        passage_prompt: put before every passage.
        query_max_length: tokens of a query at most, special tokens and prompt included.
        passage_max_length: tokens of a passage at most, likewise.
        title_separator: stands between title and text of a passage that has a title.
        lowercase: whether text is lower-cased before the tokenizer sees it.
        strip_question_mark: whether a query loses one `?` at its very end, as in DPR's training.
    """

    pooling: str = "cls"
    normalize: bool = False
    projections: tuple[ProjectionConfig, ...] = ()
    query_prompt: str = ""
    passage_prompt: str = ""
    query_max_length: int = DEFAULT_QUERY_LENGTH
    passage_max_length: int = DEFAULT_PASSAGE_LENGTH
    title_separator: str = " "
    lowercase: bool = False
    strip_question_mark: bool = False

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UsageError(f"pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        for name in ("query_max_length", "passage_max_length"):
            length = getattr(self, name)
            if length < SHORTEST:
                raise UsageError(f"{name} is {length}; at least {SHORTEST} tokens are needed")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderConfig:
        """From what `to_dict` gave.

        Raises:
            UsageError: a key that this version does not know.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown encoder settings {unknown}; known are {sorted(known)}")
        projections = tuple(ProjectionConfig(**one) for one in values.get("projections", ()))
        return cls(**{**values, "projections": projections})


def changes_of(
    pooling: str | None,
    normalize: bool | None,
    query_max_length: int | None,
    passage_max_length: int | None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """What a user's flags say about an encoder, as `load_encoder` takes it; None says nothing."""
    wanted = {
        "pooling": pooling,
        "normalize": normalize,
        "query_max_length": query_max_length,
        "passage_max_length": passage_max_length,
        "tokenizer": tokenizer,
    }
    return {key: value for key, value in wanted.items() if value is not None}
