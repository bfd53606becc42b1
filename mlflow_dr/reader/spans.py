"""The best answer of a question from the reader's logits, by DPR's rules.

Of the first n passages, the one with the highest relevance is chosen, and then its span with the
highest sum of start and end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """The first and the last token of an answer in a passage, and the sum of their logits."""

    start: int
    end: int
    score: float


def best_span(starts: np.ndarray, ends: np.ndarray, max_answer_length: int) -> Span:
    """The span with the highest score; of equal scores the one that starts, then ends, first.

    Args:
        starts: logits of the passage's tokens, `(n_tokens,)`, at least one; those that were cut off
            have none.
        ends: the same for the end.
        max_answer_length: the most tokens of an answer.
    """
    length = min(max_answer_length, len(starts))
    padded = np.concatenate([ends.astype(np.float64), np.full(length - 1, -np.inf)])
    scores = starts.astype(np.float64)[:, None] + np.lib.stride_tricks.sliding_window_view(
        padded, length
    )
    start, extent = np.unravel_index(int(scores.argmax()), scores.shape)
    return Span(int(start), int(start + extent), float(scores[start, extent]))


def whole_words(start: int, end: int, words: Sequence[int | None]) -> tuple[int, int]:
    """The first and the last token of a span that is extended to whole words.

    Args:
        start: the first token.
        end: the last token.
        words: the number of each token's word, of the whole passage.
    """
    while start > 0 and words[start] is not None and words[start] == words[start - 1]:
        start -= 1
    while end + 1 < len(words) and words[end] is not None and words[end] == words[end + 1]:
        end += 1
    return start, end


def best_passages(relevance: np.ndarray, usable: np.ndarray, counts: Sequence[int]) -> list[int]:
    """The passage with the highest relevance among the first n, for each n.

    Args:
        relevance: of the passages in the retriever's order, `(n_passages,)`.
        usable: whether a passage has a token left after cutting, `(n_passages,) bool`.
        counts: each n; more than there are means all.

    Returns:
        The index of a passage for each n; -1 where none of the first n is usable.
    """
    values = np.where(usable, relevance, -np.inf)
    chosen = []
    for count in counts:
        some = values[:count]
        chosen.append(int(some.argmax()) if usable[:count].any() else -1)
    return chosen
