"""What makes an encoder beside its weights: all that must not be forgotten at encode time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from mlflow_dr.errors import UsageError, quoted

POOLINGS = ("cls", "mean", "last", "max", "mean_sqrt_len", "weighted_mean")
EXPECTED: dict[type, type] = {bool: bool, int: Integral, str: str}
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
        check_types(self)


@dataclass(frozen=True)
class EncoderConfig:
    """How text becomes a vector around the backbone.

    Attributes:
        pooling: how the token vectors become one; one of `POOLINGS`, or several joined by `+`.
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
        check_types(self)
        if not set(self.pooling.split("+")) <= set(POOLINGS):
            raise UsageError(f"pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        for name in ("query_max_length", "passage_max_length"):
            length = getattr(self, name)
            if length < SHORTEST:
                raise UsageError(f"{name} is {length}; at least {SHORTEST} tokens are needed")


def check_types(settings: Any) -> None:
    """Refuse a setting of another type than its default, such as the string `"no"` as a boolean.

    Args:
        settings: a dataclass; fields without a default, or with None, are not looked at.

    Raises:
        UsageError: with the name of the setting.
    """
    for field in fields(settings):
        value, kind = getattr(settings, field.name), type(field.default)
        if kind not in EXPECTED:
            continue
        if not isinstance(value, EXPECTED[kind]) or (kind is int and isinstance(value, bool)):
            raise UsageError(
                f"{field.name} is {quoted(value)}; expected a value of type {kind.__name__}"
                + (" (true or false, without quotation marks)" if kind is bool else "")
            )


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
