"""Training examples as sentence-transformers has them: pairs, triplets, negatives and scores.

A column says by its name what it is. Source: "Dataset Overview" in the documentation of
sentence-transformers; lists under `pos` and `neg` are FlagEmbedding's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from mlflow_dr.collection.jsonl import read_records
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, quoted

ANCHORS = ("anchor", "query", "question", "sentence1")
POSITIVES = ("positive", "pos", "passage", "answer", "document", "response", "sentence2")
NEGATIVE = re.compile(r"neg(ative)?s?[_-]?\d*")
SCORES = ("score", "scores", "label", "labels")
SIDES = ("pos_scores", "neg_scores")


@dataclass(frozen=True)
class PairRecord:
    """One row of such a table.

    Attributes:
        location: where it is, for messages.
        anchor: the text of the query.
        positives: texts of relevant passages.
        negatives: texts of hard negatives.
        scores: a teacher's scores of the positives, then of the negatives; or one number.
    """

    layout: ClassVar[str] = "pairs of sentence-transformers"
    fields: ClassVar[str] = "anchor or query, positive or passage"
    by_id: ClassVar[bool] = False

    location: str
    anchor: str
    positives: Sequence[str]
    negatives: Sequence[str]
    scores: Sequence[float]

    def example(self, index: int, location: str) -> RawExample:
        """The row as a raw example; its index is the query's id."""
        positives, negatives = (
            [Passage("", "", text) for text in side] for side in (self.positives, self.negatives)
        )
        scores = list(self.scores)
        if len(scores) == 1 and len(positives) == len(negatives) == 1:
            scores.append(0.0)  # the margin between the two
        if len(scores) not in (0, len(positives) + len(negatives)):
            raise DataError(
                f"{location}: {len(scores)} scores for {len(positives) + len(negatives)} passages; "
                "give one for each, or the margin of a pair"
            )
        return RawExample(
            location,
            Query(str(index), self.anchor),
            positives,
            negatives,
            scores[: len(positives)],
            scores[len(positives) :],
        )


def is_pair(record: Mapping[str, Any]) -> bool:
    """Whether the fields of a record are those of a pair."""
    return any(name in record for name in ANCHORS) and any(name in record for name in POSITIVES)


def read_pairs(files: Sequence[Path]) -> Iterator[RawExample]:
    """The examples of files of pairs, numbered from 0 through all of them.

    Rows of a query, a passage and a score that follow each other with the same query are one
    example. If all of its scores are 0 or 1, they say which passages are relevant; otherwise the
    passage with the highest score is the positive, and the scores are a teacher's.

    Raises:
        DataError: a file is damaged, or a row is malformed, with its location.
    """
    index = 0
    rows = (_row(record, place) for file in files for place, record in read_records(file, dict))
    for _, group in groupby(rows, key=lambda row: row.anchor):
        for row in _merged(list(group)):
            yield row.example(index, row.location)
            index += 1


def _merged(rows: list[PairRecord]) -> list[PairRecord]:
    """Rows with one query: as they are, or as one if each is a passage with a score."""
    if not all(len(row.scores) == len(row.positives) == 1 and not row.negatives for row in rows):
        return rows
    first = rows[0]
    ranked = sorted(rows, key=lambda row: -row.scores[0])
    if {row.scores[0] for row in rows} <= {0.0, 1.0}:
        by_label = {
            label: [row.positives[0] for row in rows if row.scores[0] == label] for label in (1, 0)
        }
        return [PairRecord(first.location, first.anchor, by_label[1], by_label[0], ())]
    passages = [row.positives[0] for row in ranked]
    scores = [row.scores[0] for row in ranked]
    return [PairRecord(first.location, first.anchor, passages[:1], passages[1:], scores)]


def _row(record: Mapping[str, Any], location: str) -> PairRecord:
    anchor = next((record[name] for name in ANCHORS if name in record), None)
    positive = next((record[name] for name in POSITIVES if name in record), None)
    if not isinstance(anchor, str):
        raise DataError(
            f"{location}: {' or '.join(ANCHORS)} is {quoted(anchor)}; expected the text of a query"
        )
    names = [name for name in record if NEGATIVE.fullmatch(name)]
    negatives = [text for name in names for text in _texts(record[name], name, location)]
    given = next((record[name] for name in SCORES if name in record), None)
    if given is None and any(record.get(name) is not None for name in SIDES):
        given = [score for name in SIDES for score in record.get(name) or ()]
    return PairRecord(
        location,
        anchor,
        _texts(positive, "the positive", location),
        negatives,
        _numbers(given, location),
    )


def _texts(value: Any, name: str, location: str) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, list) else []
    if (value is not None and not isinstance(value, str | list)) or not all(
        isinstance(text, str) for text in texts
    ):
        raise DataError(f"{location}: {name} is {quoted(value)}; expected a text, or several")
    return texts


def _numbers(value: Any, location: str) -> list[float]:
    values = value if isinstance(value, list) else [] if value in (None, "") else [value]
    try:
        numbers = [float(number) for number in values]
    except (TypeError, ValueError) as error:
        raise DataError(f"{location}: score is {quoted(value)}; expected numbers") from error
    if not all(abs(number) < 3.4e38 for number in numbers):
        raise DataError(f"{location}: score is {quoted(value)}; expected finite numbers")
    return numbers
