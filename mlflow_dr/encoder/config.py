"""The settings of an encoder, which are stored with its weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from mlflow_dr.errors import UsageError, quoted

# our names of the poolings -> sentence-transformers'
POOLINGS = {
    "cls": "cls",
    "mean": "mean",
    "last": "lasttoken",
    "max": "max",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weighted_mean": "weightedmean",
}
EXPECTED: dict[type, type] = {bool: bool, int: Integral, str: str}
DEFAULT_QUERY_LENGTH = 32
DEFAULT_PASSAGE_LENGTH = 128
SHORTEST = 3
"""The smallest length in tokens: a special token at each end, and one token of text."""


@dataclass(frozen=True)
class EncoderConfig:
    """How an encoder turns text into a vector, apart from its backbone.

    Attributes:
        pooling: turns the token vectors into one; one of `POOLINGS`, or several joined by `+`.
        normalize: whether vectors are scaled to length 1, so that the dot product is the cosine.
        query_prompt: put before every query.
        passage_prompt: put before every passage.
        query_max_length: the most tokens of a query, with special tokens and prompt.
        passage_max_length: the most tokens of a passage, with special tokens and prompt.
        title_separator: put between the title and the text of a passage that has a title.
        lowercase: whether text is lower-cased before it is tokenised.
        strip_question_mark: whether one `?` at the end of a query is removed, as DPR does in
            training.
        title_as_pair: whether title and text are tokenised one by one and cut together, each to
            half the length if both are longer, as DPR does; the tokenizer's own separator is then
            between them.
    """

    pooling: str = "cls"
    normalize: bool = False
    query_prompt: str = ""
    passage_prompt: str = ""
    query_max_length: int = DEFAULT_QUERY_LENGTH
    passage_max_length: int = DEFAULT_PASSAGE_LENGTH
    title_separator: str = " "
    lowercase: bool = False
    strip_question_mark: bool = False
    title_as_pair: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not set(self.pooling.split("+")) <= POOLINGS.keys():
            raise UsageError(f"pooling {self.pooling!r}: expected one of {', '.join(POOLINGS)}")
        for name in ("query_max_length", "passage_max_length"):
            length = getattr(self, name)
            if length < SHORTEST:
                raise UsageError(f"{name} is {length}; at least {SHORTEST} tokens are needed")


def check_types(settings: Any) -> None:
    """Refuse settings that have another type than their default, such as `"no"` for a boolean.

    Args:
        settings: a dataclass; fields whose default is missing or None are not checked.

    Raises:
        UsageError: names the setting.
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
    """The flags that a user has given, as the `changes` of `load_encoder`; None is not given."""
    wanted = {
        "pooling": pooling,
        "normalize": normalize,
        "query_max_length": query_max_length,
        "passage_max_length": passage_max_length,
        "tokenizer": tokenizer,
    }
    return {key: value for key, value in wanted.items() if value is not None}
