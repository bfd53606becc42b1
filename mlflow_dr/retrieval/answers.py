"""Whether a passage holds an answer, by the rule of DPR's evaluation.

An answer is held where its tokens follow each other in the passage's text (the title does not
count), after Unicode's canonical decomposition (NFD) and in lower case. A token is a run of
letters, digits and marks, or any other single character that is neither white space nor a control
character. Source: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering,
EMNLP 2020, whose code takes the tokens from DrQA (Chen et al., ACL 2017).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import regex

from mlflow_dr.collection.corpus import Corpus

PASSAGES_KEPT = 1 << 18

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def answer_tokens(text: str) -> list[str]:
    """The tokens of an answer or a passage."""
    decomposed = unicodedata.normalize("NFD", text)
    # each by itself: the Greek sigma's lower case depends on what follows it
    return [token.lower() for token in _TOKEN.findall(decomposed)]


class AnswerFinder:
    """Finds answers in the passages of a corpus; a passage's tokens are made once and kept.

    Args:
        corpus: the passages.
        kept: passages whose tokens are kept; of a 120-word passage they take about 1 KB.
    """

    def __init__(self, corpus: Corpus, kept: int = PASSAGES_KEPT) -> None:
        self._corpus = corpus
        self._text = lru_cache(kept)(self._read)

    def sought(self, answers: Sequence[str]) -> tuple[str, ...]:
        """Answers as `holds` takes them.

        One without any token (empty, or white space) is left out: DPR's rule would find it in
        every passage.
        """
        texts = (_spaced(answer) for answer in answers)
        return tuple(dict.fromkeys(text for text in texts if text.strip()))

    def holds(self, row: int, sought: Sequence[str]) -> bool:
        """Whether the passage at this row holds one of the answers."""
        if not sought:
            return False
        text = self._text(row)
        return any(answer in text for answer in sought)

    def _read(self, row: int) -> str:
        return _spaced(self._corpus[row].text)


def _spaced(text: str) -> str:
    """Tokens between blanks, which no token holds: a sequence of tokens is a substring."""
    return f" {' '.join(answer_tokens(text))} "
