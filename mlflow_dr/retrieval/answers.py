"""Whether a passage holds an answer, by the rules of DPR's evaluation.

By `string`, an answer is held where its tokens follow each other in the passage's text (the title
does not count), after Unicode's canonical decomposition (NFD) and in lower case. A token is a run
of letters, digits and marks, or any other single character that is neither white space nor a
control character. By `regex`, an answer is a regular expression of the `regex` module, searched for
in the text without regard to case, after NFD of both. By `kilt`, an answer is held where it is a
part of the text, after both are in lower case, without ASCII punctuation and articles, and with
single blanks; `cat` is held by `cats`.

Sources: Petroni et al., KILT: a Benchmark for Knowledge Intensive Language Tasks, NAACL 2021;
Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020,
whose code takes the tokens from DrQA (Chen et al., ACL 2017).
"""

from __future__ import annotations

import logging
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import regex

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, UsageError, quoted

log = logging.getLogger(__name__)

STRING, REGEX, KILT = "string", "regex", "kilt"
MATCHES = (STRING, REGEX, KILT)
PASSAGES_KEPT = 1 << 18
SECONDS_PER_MATCH = 5.0
"""Processor time of one search; some expressions would take years on a long text."""

LONGEST_PATTERN = 10_000
"""Characters of a regular expression; of a million, compiling takes a minute."""

FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLE = re.compile(r"\b(?:a|an|the)\b")

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def answer_tokens(text: str) -> list[str]:
    """The tokens of an answer or a passage."""
    decomposed = unicodedata.normalize("NFD", text)
    # token by token, because the lower case of the Greek sigma depends on what follows it
    return [token.lower() for token in _TOKEN.findall(decomposed)]


class AnswerFinder:
    """Finds answers in the passages of a corpus; a passage's tokens are made once and kept.

    Args:
        corpus: the passages.
        kept: passages whose tokens are kept; of a 120-word passage they take about 1 KB.
        match: `string`, `kilt`, or `regex` where answers are regular expressions (CuratedTREC's
            are).

    Raises:
        UsageError: no such way to match.
    """

    def __init__(self, corpus: Corpus, kept: int = PASSAGES_KEPT, match: str = STRING) -> None:
        if match not in MATCHES:
            raise UsageError(f"match {match!r}: expected one of {', '.join(MATCHES)}")
        self._corpus = corpus
        self._match = match
        self._text = lru_cache(kept)(self._read)

    def sought(self, answers: Sequence[str]) -> tuple[Any, ...]:
        """Answers as `holds` takes them.

        By `string` and `kilt`, one without any token (empty, or white space) is left out: DPR's
        rule would find it in every passage. By `regex`, one that is no regular expression is left
        out, as DPR does; `faults` says which.
        """
        if self._match == REGEX:
            patterns = map(_pattern, dict.fromkeys(answers))
            return tuple(pattern for pattern in patterns if not isinstance(pattern, str))
        form = FORMS[self._match]
        return tuple(dict.fromkeys(form(answer) for answer in answers if answer_tokens(answer)))

    def faults(self, answers: Sequence[str]) -> list[str]:
        """Which answers should be regular expressions and are not, with the reason."""
        if self._match != REGEX:
            return []
        return [fault for answer in answers if isinstance(fault := _pattern(answer), str)]

    def holds(self, row: int, sought: Sequence[Any]) -> bool:
        """Whether the passage at this row holds one of the answers.

        Raises:
            DataError: the search for a regular expression takes too long.
        """
        if not sought:
            return False
        text = self._text(row)
        if self._match == REGEX:
            return any(self._matches(pattern, text, row) for pattern in sought)
        return any(answer in text for answer in sought)

    def _matches(self, pattern: regex.Pattern[str], text: str, row: int) -> bool:
        try:
            return pattern.search(text, timeout=SECONDS_PER_MATCH) is not None
        except TimeoutError:
            raise DataError(
                f"answer {quoted(pattern.pattern)}: the regular expression takes more than "
                f"{SECONDS_PER_MATCH:g} s on passage {quoted(self._corpus[row].id)}; write it "
                "without repeats inside repeats"
            ) from None

    def _read(self, row: int) -> str:
        return FORMS[self._match](self._corpus[row].text)


def _pattern(answer: str) -> regex.Pattern[str] | str:
    """An answer as a regular expression, or what is wrong with it."""
    if len(answer) > LONGEST_PATTERN:
        return f"{quoted(answer)}: {len(answer):,} characters, more than {LONGEST_PATTERN:,}"
    try:
        return regex.compile(unicodedata.normalize("NFD", answer), FLAGS)
    except (regex.error, RecursionError, OverflowError, ValueError, MemoryError) as error:
        return f"{quoted(answer)}: {error}"


def _spaced(text: str) -> str:
    """Tokens between blanks, which no token holds: a sequence of tokens is a substring."""
    return f" {' '.join(answer_tokens(text))} "


def _kilt_form(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single blanks."""
    plain = text.lower().translate(NO_PUNCTUATION)
    return " ".join(ARTICLE.sub(" ", plain).split())


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


FORMS: Mapping[str, Callable[[str], str]] = {
    STRING: _spaced,
    REGEX: _decomposed,
    KILT: _kilt_form,
}
"""What a passage is searched as, by the way to match."""


def warn_of_faults(finder: AnswerFinder, queries: Iterable[Query]) -> None:
    """Warn of answers that are not regular expressions, with their number and an example."""
    faults = [
        f"query {quoted(query.id)}, {fault}"
        for query in queries
        for fault in finder.faults(query.answers)
    ]
    if faults:
        log.warning(
            "%d answers are not regular expressions, so that no passage holds them (such as %s)",
            *(len(faults), faults[0]),
        )
