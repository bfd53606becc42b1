"""Raw training examples, as readers of formats give them, and what is cleaned of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import repeat
from math import isnan, nan
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import Corpus, CorpusWriter
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError

SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("query_tokens", pa.list_(pa.int32())),
        ("positives", pa.list_(pa.int32())),
        ("negatives", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("others", pa.list_(pa.int32())),
    ]
)


NO_QUERY = "records without a query"
NO_POSITIVE = "records without a usable positive passage"
EMPTY = "passages without text"
UNKNOWN = "passages that the corpus lacks"
REPEATED = "passages listed twice for one query"
ALSO_POSITIVE = "negatives that are also positives of their query"
PARTLY_SCORED = "records with a teacher's scores for some of their passages only, so used without"


class RawExample(NamedTuple):
    """One record of a training file; all of its passages are given in full, or all by their ids.

    Attributes:
        location: where the record is, for messages.
        query: the question.
        positives: relevant passages.
        negatives: hard negatives.
        positive_scores: a teacher's scores of the positives, NaN where one is missing; empty where
            all are.
        negative_scores: the same for the negatives.
        others: negatives that are not hard, where the format has them and they are requested.
    """

    location: str
    query: Query
    positives: Sequence[Passage] | Sequence[str]
    negatives: Sequence[Passage] | Sequence[str]
    positive_scores: Sequence[float] = ()
    negative_scores: Sequence[float] = ()
    others: Sequence[Passage] | Sequence[str] = ()


class SkipReport:
    """Counts what is left out while examples are made, by kind, with the first case of each."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, case: str, number: int = 1) -> None:
        """Count `number` more of a kind; `case` names the first of them."""
        if number:
            before, first = self._kinds.get(kind, (0, case))
            self._kinds[kind] = (before + number, first)

    def __str__(self) -> str:
        return "; ".join(
            f"{number:,} {kind} (such as {case})" for kind, (number, case) in self._kinds.items()
        )


class PassageIndex:
    """Gives the row of each passage, of a given corpus or of a new one.

    A passage that is given in full becomes a row of the new corpus. It is identified by its
    content, because DPR and Tevatron train on the text and not on the id. It keeps its id unless an
    earlier passage of other content has it; then it gets a hash of its content as id.

    Args:
        corpus: in which ids are looked up, or the writer of the new corpus.
        skipped: counts passages without text and those that the corpus lacks.
    """

    def __init__(self, corpus: Corpus | CorpusWriter, skipped: SkipReport) -> None:
        self._corpus = corpus
        self._skipped = skipped
        self._rows: dict[str, int] = {}
        self._content_hashes = array("q")
        self._tokenised: bool | None = None

    def look_up(self, group: Iterable[RawExample]) -> None:
        """Look up the new ids of these examples at once."""
        if isinstance(self._corpus, Corpus):
            ids = (i for raw in group for side in (raw.positives, raw.negatives) for i in side)
            new = [i for i in dict.fromkeys(ids) if isinstance(i, str) and i not in self._rows]
            if new:
                self._rows.update(zip(new, self._corpus.rows_of(new).tolist(), strict=True))

    def row(self, passage: Passage | str, location: str) -> int | None:
        """The row of a passage, or of an id that was looked up; None for an unusable one.

        Raises:
            DataError: some passages are text and some token ids.
        """
        if isinstance(passage, str):
            row = self._rows[passage]
            if row < 0:
                self._skipped.add(UNKNOWN, repr(passage))
            return row if row >= 0 else None
        if not (passage.text.strip() or passage.title.strip() or passage.tokens):
            self._skipped.add(EMPTY, location)
            return None
        content_hash = hash((passage.title, passage.text, tuple(passage.tokens or ())))
        passage_id = passage.id or _content_id(passage)
        existing_row = self._rows.get(passage_id)
        if existing_row is not None and self._content_hashes[existing_row] != content_hash:
            passage_id = _content_id(passage)
            existing_row = self._rows.get(passage_id)
        return (
            self._add(passage, passage_id, content_hash, location)
            if existing_row is None
            else existing_row
        )

    def _add(self, passage: Passage, passage_id: str, content_hash: int, location: str) -> int:
        tokenised = passage.tokens is not None
        if self._tokenised not in (None, tokenised):
            raise DataError(
                f"{location}: a passage of {'token ids' if tokenised else 'text'} among passages "
                f"of {'text' if tokenised else 'token ids'}; tokenise all of them, or none"
            )
        self._tokenised = tokenised
        self._rows[passage_id] = row = len(self._content_hashes)
        self._content_hashes.append(content_hash)
        if isinstance(self._corpus, CorpusWriter):
            self._corpus.add(passage._replace(id=passage_id))
        return row


def _content_id(passage: Passage) -> str:
    """An id for a passage without one: 96 bits of a hash, so that no two contents share it."""
    content = (
        f"{passage.title}\x00{passage.text}".encode()
        if passage.tokens is None
        else np.asarray(passage.tokens, "<i4").tobytes()
    )
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def deduplicate_examples(
    group: Iterable[RawExample], index: PassageIndex, skipped: SkipReport
) -> pa.RecordBatch:
    """Raw examples as a batch of `SCHEMA`; those without a query or a positive are dropped.

    Left out and counted: unusable passages, repeats within one list, negatives that are positives
    of the same query too, and scores of examples that lack some.
    """

    def rows_of(
        raw: RawExample, passages: Sequence[Passage | str], scores: Sequence[float] = ()
    ) -> dict[int, float]:
        rows: dict[int, float] = {}
        for passage, score in zip(passages, scores or repeat(nan), strict=False):
            row = index.row(passage, raw.location)
            if row in rows:
                skipped.add(REPEATED, f"query {raw.query.id!r}")
            elif row is not None:
                rows[row] = score
        return rows

    columns: list[list[Any]] = [[] for _ in SCHEMA]
    for raw in group:
        query = raw.query
        if not (query.text.strip() or query.tokens):
            skipped.add(NO_QUERY, raw.location)
            continue
        positives = rows_of(raw, raw.positives, raw.positive_scores)
        if not positives:
            skipped.add(NO_POSITIVE, raw.location)
            continue
        negatives = rows_of(raw, raw.negatives, raw.negative_scores)
        others = rows_of(raw, raw.others)
        also_positive = [row for side in (negatives, others) for row in side if row in positives]
        skipped.add(ALSO_POSITIVE, f"query {query.id!r}", len(also_positive))
        for row in also_positive:
            negatives.pop(row, None)
            others.pop(row, None)
        scores = [*positives.values(), *negatives.values()]
        missing = sum(map(isnan, scores))
        if 0 < missing < len(scores):
            skipped.add(PARTLY_SCORED, f"query {query.id!r}")
        example = (
            *(query.id, query.text, query.answers, query.tokens or ()),
            *(list(positives), list(negatives), () if missing else scores, list(others)),
        )
        for column, value in zip(columns, example, strict=True):
            column.append(value)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=SCHEMA)
