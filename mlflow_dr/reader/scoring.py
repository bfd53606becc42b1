"""Exact match and F1 of predicted answers, as SQuAD defines them.

Source: Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable

import regex

# unlike `re`, the module `regex` knows that an accent after a letter belongs to the word
_ARTICLE = regex.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: str) -> str:
    """An answer in lower case without ASCII punctuation and articles, single blanks in between."""
    text = _ARTICLE.sub(" ", answer.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(text.split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 if the prediction is one of the answers after `normalized`, else 0."""
    text = normalized(prediction)
    return float(any(text == normalized(answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The harmonic mean of the precision and recall of words, of the answer where it is largest."""
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def _f1(prediction: str, answer: str) -> float:
    predicted, expected = normalized(prediction).split(), normalized(answer).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))
