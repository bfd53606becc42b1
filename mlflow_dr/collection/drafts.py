"""Raw training examples, as every format's reader yields them, written down with passage codes.

A code numbers the passages in the order in which they are first met. What a code stands for, the
row of a passage that came with the examples or an id to be looked up in a corpus, is the same for
all examples, so it is settled once, after the last of them (`cleaning.py`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import nan
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.corpus import Corpus, CorpusWriter
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError
from mlflow_dr.progress import progress_bar

DRAFT_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("query", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("query_tokens", pa.list_(pa.int32())),
        ("positives", pa.list_(pa.int32())),
        ("negatives", pa.list_(pa.int32())),
        ("others", pa.list_(pa.int32())),
        ("positive_scores", pa.list_(pa.float32())),
        ("negative_scores", pa.list_(pa.float32())),
        ("other_scores", pa.list_(pa.float32())),
    ]
)
EXAMPLES_PER_BATCH = 8192

NO_QUERY = "records without a query"
NO_POSITIVE = "records without a usable positive passage"
EMPTY = "passages without text"


class RawExample(NamedTuple):
    """One record of a training file; passages are given whole, or all of them by their ids.

    Attributes:
        where: its place, for messages.
        query: the question.
        positives: relevant passages.
        negatives: hard negatives.
        positive_scores: a teacher's scores of the positives, NaN where one is missing; empty where
            all are.
        negative_scores: likewise of the negatives.
        others: negatives that are not hard, where the format has them and they are asked for.
    """

    where: str
    query: Query
    positives: Sequence[Passage] | Sequence[str]
    negatives: Sequence[Passage] | Sequence[str]
    positive_scores: Sequence[float] = ()
    negative_scores: Sequence[float] = ()
    others: Sequence[Passage] | Sequence[str] = ()


class Tally:
    """What is left out while examples are made, by kind, each with its first case."""

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


class Codes(Protocol):
    """Numbers passages in the order in which they are met."""

    def code(self, passage: Passage | str, where: str) -> int | None:
        """The passage's code; None for one that is empty."""


class PassageCodes:
    """Codes of passages that come with the examples: the rows of the corpus they are written to.

    A passage is known by its content, as DPR and Tevatron train on the text and not on the id. It
    keeps its id; where another passage before it has the same id, its content makes it one.
    """

    def __init__(self, writer: CorpusWriter, tally: Tally) -> None:
        self._writer = writer
        self._tally = tally
        self._codes: dict[str, int] = {}
        self._contents = array("q")
        self._tokenised: bool | None = None

    def code(self, passage: Passage | str, where: str) -> int | None:
        """The row that the passage has or gets.

        Raises:
            DataError: some passages are text and some token ids.
        """
        if isinstance(passage, str):
            raise TypeError(f"{where}: a passage id where passages are given whole")
        if not (passage.text.strip() or passage.title.strip() or passage.tokens):
            self._tally.add(EMPTY, where)
            return None
        content = hash((passage.title, passage.text, tuple(passage.tokens or ())))
        passage_id = passage.id or _content_id(passage)
        code = self._codes.get(passage_id)
        if code is not None and self._contents[code] != content:
            passage_id = _content_id(passage)
            code = self._codes.get(passage_id)
        if code is not None:
            return code
        self._codes[passage_id] = len(self._contents)
        tokenised = passage.tokens is not None
        if self._tokenised not in (None, tokenised):
            raise DataError(
                f"{where}: a passage of {'token ids' if tokenised else 'text'} among passages of "
                f"{'text' if tokenised else 'token ids'}; tokenise all of them, or none"
            )
        self._tokenised = tokenised
        self._contents.append(content)
        self._writer.add(passage._replace(id=passage_id))
        return self._codes[passage_id]


class IdCodes:
    """Codes of passages that are named by their ids."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def code(self, passage: Passage | str, where: str) -> int | None:
        """The number of ids that were met before this one."""
        if not isinstance(passage, str):
            raise TypeError(f"{where}: a whole passage where passages are given by id")
        return self._codes.setdefault(passage, len(self._codes))

    def rows(self, corpus: Corpus) -> tuple[list[str], np.ndarray]:
        """The ids by code, and their rows in a corpus, `(n_ids,) int64`, -1 where it lacks one."""
        ids = list(self._codes)
        return ids, corpus.rows_of(ids)


def write_draft(path: Path, records: Iterable[RawExample], codes: Codes, tally: Tally) -> int:
    """Write the records that have a query and a positive passage; the others are counted.

    Returns:
        How many records there were.
    """
    count = 0
    iterator = iter(records)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, DRAFT_SCHEMA) as writer,
        progress_bar(None, "reading the training examples", "examples") as bar,
    ):
        while group := list(islice(iterator, EXAMPLES_PER_BATCH)):
            writer.write_batch(_batch(group, codes, tally))
            count += len(group)
            bar.update(len(group))
    return count


def draft_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """What `write_draft` wrote, mapped from the file."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    for index in range(file.num_record_batches):
        yield file.get_batch(index)


def _batch(group: Sequence[RawExample], codes: Codes, tally: Tally) -> pa.RecordBatch:
    queries: list[Query] = []
    sides = (_Side(), _Side(), _Side())
    for raw in group:
        query = raw.query
        if not (query.text.strip() or query.tokens):
            tally.add(NO_QUERY, raw.where)
            continue
        if not sides[0].add(raw.positives, raw.positive_scores, codes, raw.where, required=True):
            tally.add(NO_POSITIVE, raw.where)
            continue
        sides[1].add(raw.negatives, raw.negative_scores, codes, raw.where)
        sides[2].add(raw.others, (), codes, raw.where)
        queries.append(query)
    columns = [
        [query.id for query in queries],
        [query.text for query in queries],
        [query.answers for query in queries],
        [query.tokens or () for query in queries],
        *(side.codes() for side in sides),
        *(side.scores() for side in sides),
    ]
    fields = zip(columns, DRAFT_SCHEMA, strict=True)
    return pa.record_batch([pa.array(c, field.type) for c, field in fields], schema=DRAFT_SCHEMA)


class _Side:
    """The positives, the negatives or the others of a group of examples, end to end."""

    def __init__(self) -> None:
        self._codes = array("i")
        self._scores = array("f")
        self._offsets = array("i", [0])

    def add(
        self,
        passages: Sequence[Passage | str],
        scores: Sequence[float],
        codes: Codes,
        where: str,
        required: bool = False,
    ) -> bool:
        """Add one example's passages; False, and nothing added, when it has none and must."""
        before = len(self._codes)
        for passage, score in zip(passages, scores or [nan] * len(passages), strict=True):
            if (code := codes.code(passage, where)) is not None:
                self._codes.append(code)
                self._scores.append(score)
        if required and len(self._codes) == before:
            return False
        self._offsets.append(len(self._codes))
        return True

    def codes(self) -> pa.Array:
        return list_array(np.asarray(self._offsets), np.asarray(self._codes))

    def scores(self) -> pa.Array:
        return list_array(np.asarray(self._offsets), np.asarray(self._scores))


def list_array(offsets: np.ndarray, values: np.ndarray) -> pa.Array:
    """Lists of numbers from where each begins, `(n_lists + 1,) int32`, and all of them."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def _content_id(passage: Passage) -> str:
    """An id for a passage without one; 96 bits of a hash, so that two contents never share it."""
    content = (
        f"{passage.title}\x00{passage.text}".encode()
        if passage.tokens is None
        else np.asarray(passage.tokens, "<i4").tobytes()
    )
    return hashlib.blake2b(content, digest_size=12).hexdigest()
