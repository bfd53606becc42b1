"""Token ids of what the reader reads: a question, a title and a passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError

LONGEST = 512
"""Most tokens of question and title together, and most tokens of a passage."""


class SequenceBuilder:
    """Makes sequences `[CLS] question [SEP] title [SEP] passage`, without a token at the end.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: the most tokens of question and title together, and of a passage by itself; where
            question and title have more, the longer of the two is cut.

    Raises:
        UsageError: the tokenizer has no special tokens between two texts.
    """

    def __init__(self, tokenizer: Any, length: int = LONGEST) -> None:
        self._tokenizer = tokenizer
        self._length = length
        first, second = self.bare(["a", "b"])
        pair: list[int] = tokenizer("a", "b", add_special_tokens=True)["input_ids"]
        start = _position(pair, first, 0)
        middle = start + len(first)
        end = _position(pair, second, middle)
        if start < 0 or end <= middle:
            raise UsageError(
                "the tokenizer puts no token between two texts, so a reader cannot tell question "
                "and passage apart; choose a model such as BERT, RoBERTa or MiniLM"
            )
        self._before = pair[:start]
        self._between = pair[middle:end]
        self._after = pair[end + len(second) :]

    @property
    def digest(self) -> str:
        """Names the tokenizer's rules and the length."""
        config = EncoderConfig(query_max_length=self._length, passage_max_length=self._length)
        return TextTokenizer(self._tokenizer, config).query_digest()

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without special tokens, each at most `length`."""
        if not texts:
            return []
        encoded = self._tokenizer(
            [text.strip() for text in texts],
            add_special_tokens=False,
            truncation=True,
            max_length=self._length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def words(self, text: str) -> tuple[np.ndarray, list[int | None]]:
        """Where the tokens of a passage are in its text, as `bare` cuts it.

        Returns:
            The first character and the one after the last of each token, `(n_tokens, 2) int64`, and
            the number of each token's word.
        """
        left = len(text) - len(text.lstrip())
        encoded = self._tokenizer(
            text.strip(),
            add_special_tokens=False,
            truncation=True,
            max_length=self._length,
            return_offsets_mapping=True,
        )
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2) + left
        return offsets, encoded.word_ids(0)

    def head(self, question: Sequence[int], title: Sequence[int]) -> list[int]:
        """Special tokens, question and title: what stands before the passage.

        Args:
            question: token ids without special tokens.
            title: the same.
        """
        special = len(self._before) + len(self._between) + len(self._after)
        first, second = _cut_longest(len(question), len(title), self._length - special)
        return [
            *self._before,
            *question[:first],
            *self._between,
            *title[:second],
            *self._after,
        ]


def _cut_longest(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that fit together, the longer one cut first (`longest_first`)."""
    if first + second <= room:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return (shorter, longer) if first <= second else (longer, shorter)


def _position(ids: list[int], part: list[int], start: int) -> int:
    """Where a part of token ids begins; -1 if it is not there."""
    ends = range(start, len(ids) - len(part) + 1)
    return next((index for index in ends if ids[index : index + len(part)] == part), -1)


def find_spans(passage: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Every place of every answer in a passage, by answer, then by position.

    Args:
        passage: token ids as characters; see `as_characters`.
        answers: the same; an empty answer is nowhere.

    Returns:
        The first and the last token of each place.
    """
    spans = []
    for answer in filter(None, answers):
        start = passage.find(answer)
        while start >= 0:
            spans.append((start, start + len(answer) - 1))
            start = passage.find(answer, start + 1)
    return spans


def as_characters(ids: Sequence[int]) -> str:
    """Token ids as a text with one character each, in which Python searches fast."""
    return "".join(map(chr, ids))
