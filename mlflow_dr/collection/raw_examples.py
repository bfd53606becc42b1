"""Raw training examples, as the readers of all formats yield them, and how they are cleaned.

Passages are numbered in the order in which they are first met. A number stands for the row of a
passage that came with the examples, or for an id that is looked up in a corpus after the last one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import nan
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import CorpusWriter
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError
from mlflow_dr.progress import progress_bar

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
QUERY_SCHEMA = pa.schema(list(SCHEMA)[:4])
EXAMPLES_PER_BATCH = 8192  # at most 32,767: examples are numbered by int16

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
    """Numbers passages in the order in which they are first met.

    A passage that is given in full is written to a new corpus, and its number is its row there. It
    is identified by its content, because DPR and Tevatron train on the text and not on the id. It
    keeps its id unless an earlier passage of other content has it; then it gets a hash of its
    content as id.

    Args:
        writer: of the new corpus; None where passages are given by their ids.
        skipped: counts passages without text.
    """

    def __init__(self, writer: CorpusWriter | None, skipped: SkipReport) -> None:
        self._writer = writer
        self._skipped = skipped
        self._numbers: dict[str, int] = {}
        self._content_hashes = array("q")
        self._tokenised: bool | None = None

    @property
    def ids(self) -> list[str]:
        """The ids of all passages, by their numbers."""
        return list(self._numbers)

    def number(self, passage: Passage | str, location: str) -> int | None:
        """The number of a passage or an id; None for a passage without text.

        Raises:
            DataError: some passages are text and some token ids.
        """
        if isinstance(passage, str) or self._writer is None:
            return self._numbers.setdefault(str(passage), len(self._numbers))
        if not (passage.text.strip() or passage.title.strip() or passage.tokens):
            self._skipped.add(EMPTY, location)
            return None
        content_hash = hash((passage.title, passage.text, tuple(passage.tokens or ())))
        passage_id = passage.id or _content_id(passage)
        number = self._numbers.get(passage_id)
        if number is not None and self._content_hashes[number] != content_hash:
            passage_id = _content_id(passage)
            number = self._numbers.get(passage_id)
        if number is None:
            number = self._numbers[passage_id] = len(self._content_hashes)
            self._content_hashes.append(content_hash)
            self._check_kind(passage, location)
            self._writer.add(passage._replace(id=passage_id))
        return number

    def _check_kind(self, passage: Passage, location: str) -> None:
        tokenised = passage.tokens is not None
        if self._tokenised not in (None, tokenised):
            raise DataError(
                f"{location}: a passage of {'token ids' if tokenised else 'text'} among passages "
                f"of {'text' if tokenised else 'token ids'}; tokenise all of them, or none"
            )
        self._tokenised = tokenised


def _content_id(passage: Passage) -> str:
    """An id for a passage without one: 96 bits of a hash, so that no two contents share it."""
    content = (
        f"{passage.title}\x00{passage.text}".encode()
        if passage.tokens is None
        else np.asarray(passage.tokens, "<i4").tobytes()
    )
    return hashlib.blake2b(content, digest_size=12).hexdigest()


class PassageLists(NamedTuple):
    """One list of passages for each example of a batch, such as the positives.

    Attributes:
        examples: the example of each passage, ascending, `(n_passages,) int16`.
        numbers: the passages' numbers, or their rows, `(n_passages,) int32`.
        scores: a teacher's scores of them, NaN without one, `(n_passages,) float32`.
    """

    examples: np.ndarray
    numbers: np.ndarray
    scores: np.ndarray

    def select(self, kept: np.ndarray) -> PassageLists:
        """The passages of a mask or of indexes."""
        return PassageLists(*(column[kept] for column in self))

    def keys(self) -> np.ndarray:
        """A number for each pair of example and passage, `(n_passages,) int64`."""
        return self.examples * (np.int64(1) << 32) + self.numbers


class ExampleBatch(NamedTuple):
    """Some thousand raw examples with numbered passages.

    Attributes:
        queries: a record batch of `QUERY_SCHEMA`.
        positives: lists of relevant passages.
        negatives: lists of hard negatives.
        others: lists of negatives that are not hard.
    """

    queries: pa.RecordBatch
    positives: PassageLists
    negatives: PassageLists
    others: PassageLists


def number_passages(
    records: Iterable[RawExample], index: PassageIndex, skipped: SkipReport
) -> Iterator[tuple[int, ExampleBatch]]:
    """Batches of the records that have a query and a positive passage; the others are counted.

    Yields:
        How many records were read for a batch, and the batch.
    """
    iterator = iter(records)
    with progress_bar(None, "reading the training examples", "examples") as bar:
        while group := list(islice(iterator, EXAMPLES_PER_BATCH)):
            yield len(group), _batch(group, index, skipped)
            bar.update(len(group))


def _batch(group: Sequence[RawExample], index: PassageIndex, skipped: SkipReport) -> ExampleBatch:
    queries: list[Query] = []
    positives, negatives, others = lists = (_ListBuilder(), _ListBuilder(), _ListBuilder())
    for raw in group:
        if not (raw.query.text.strip() or raw.query.tokens):
            skipped.add(NO_QUERY, raw.location)
            continue
        example = len(queries)
        if not positives.add(example, raw.positives, raw.positive_scores, index, raw.location):
            skipped.add(NO_POSITIVE, raw.location)
            continue
        negatives.add(example, raw.negatives, raw.negative_scores, index, raw.location)
        others.add(example, raw.others, (), index, raw.location)
        queries.append(raw.query)
    columns = (
        [query.id for query in queries],
        [query.text for query in queries],
        [query.answers for query in queries],
        [query.tokens or () for query in queries],
    )
    fields = zip(columns, QUERY_SCHEMA, strict=True)
    arrays = [pa.array(column, field.type) for column, field in fields]
    batch = pa.record_batch(arrays, schema=QUERY_SCHEMA)
    return ExampleBatch(batch, *(builder.lists() for builder in lists))


class _ListBuilder:
    """Collects the positives, the negatives or the others of a batch."""

    def __init__(self) -> None:
        self._examples = array("h")
        self._numbers = array("i")
        self._scores = array("f")

    def add(
        self,
        example: int,
        passages: Sequence[Passage | str],
        scores: Sequence[float],
        index: PassageIndex,
        location: str,
    ) -> bool:
        """Add one example's passages; False when there is none."""
        before = len(self._numbers)
        for passage, score in zip(passages, scores or [nan] * len(passages), strict=True):
            if (number := index.number(passage, location)) is not None:
                self._examples.append(example)
                self._numbers.append(number)
                self._scores.append(score)
        return len(self._numbers) > before

    def lists(self) -> PassageLists:
        """What was added; where no passage has a score, the scores take no memory."""
        scores = np.asarray(self._scores)
        if np.isnan(scores).all():
            scores = np.broadcast_to(np.float32(nan), scores.shape)
        return PassageLists(np.asarray(self._examples), np.asarray(self._numbers), scores)


def deduplicate_examples(
    batch: ExampleBatch, rows: np.ndarray | None, ids: Sequence[str], skipped: SkipReport
) -> pa.RecordBatch:
    """Examples of `SCHEMA`, with rows instead of numbers; those without a positive are dropped.

    Left out and counted: passages that the corpus lacks, repeats within one list, negatives that
    are positives of the same query too, and scores of examples that lack some.

    Args:
        batch: raw examples.
        rows: the row of each passage number, `(n_numbers,) int32`, -1 where the corpus lacks the
            passage; None where numbers are rows.
        ids: the id of each passage number, for messages.
        skipped: counts what is left out.
    """
    query_ids = batch.queries.column("query_id")

    def count(kind: str, examples: np.ndarray) -> None:
        if len(examples):
            skipped.add(kind, f"query {query_ids[int(examples[0])].as_py()!r}", len(examples))

    def looked_up(lists: PassageLists) -> PassageLists:
        if rows is None:
            return lists
        found = rows[lists.numbers]
        if len(unknown := lists.numbers[found < 0]):
            skipped.add(UNKNOWN, repr(ids[unknown[0]]), len(unknown))
        return lists._replace(numbers=found).select(found >= 0)

    def distinct(lists: PassageLists) -> PassageLists:
        _, first = np.unique(lists.keys(), return_index=True)
        repeated = np.ones(len(lists.numbers), bool)
        repeated[first] = False
        count(REPEATED, lists.examples[repeated])
        return lists.select(~repeated)

    def without_positives(lists: PassageLists) -> PassageLists:
        also_positive = np.isin(lists.keys(), positives.keys())
        count(ALSO_POSITIVE, lists.examples[also_positive])
        return lists.select(~also_positive)

    positives, negatives, others = (distinct(looked_up(lists)) for lists in batch[1:])
    negatives, others = without_positives(negatives), without_positives(others)
    usable = np.bincount(positives.examples, minlength=len(query_ids)) > 0
    count(NO_POSITIVE, np.flatnonzero(~usable))
    negatives, others = (lists.select(usable[lists.examples]) for lists in (negatives, others))

    scored = PassageLists(*map(np.concatenate, zip(positives, negatives, strict=True)))
    is_missing = np.isnan(scored.scores)
    missing = np.bincount(scored.examples, is_missing, len(query_ids))
    present = np.bincount(scored.examples, ~is_missing, len(query_ids))
    count(PARTLY_SCORED, np.flatnonzero((missing > 0) & (present > 0)))
    scored = scored.select(np.argsort(scored.examples, kind="stable"))
    scored = scored.select(missing[scored.examples] == 0)
    columns = [
        *batch.queries.filter(pa.array(usable)).columns,
        _list_array(positives.examples, positives.numbers, usable),
        _list_array(negatives.examples, negatives.numbers, usable),
        _list_array(scored.examples, scored.scores, usable),
        _list_array(others.examples, others.numbers, usable),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _list_array(examples: np.ndarray, values: np.ndarray, usable: np.ndarray) -> pa.Array:
    """One list for each usable example."""
    lengths = np.bincount(examples, minlength=len(usable))[usable]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
