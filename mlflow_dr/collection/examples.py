"""Training examples: mapped from the user's cache, or made of relevance judgements."""

from __future__ import annotations

import hashlib
import logging
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.corpus import ContentDigest, Corpus, CorpusWriter, opened_corpus
from mlflow_dr.collection.records import Example, Passage, Query, Topics
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of
from mlflow_dr.progress import progress_bar

log = logging.getLogger(__name__)

LAYOUT = 2
"""Raise it when the rules of drafts or cleaning change: what is cached is then not used."""

NO_ROWS = np.empty(0, np.int64)


def cached_examples(
    key: str, records: Iterable[RawExample], where: str, corpus: Corpus | None = None
) -> CachedExamples:
    """Examples made from raw records once, kept as Arrow files in the user's cache, and mapped.

    One record is one example: two records with one query id stay two examples, because files join
    what several retrievers found for a query, and because ids of joined data sets may coincide.
    Passages that come with the records become a corpus of their own, each id once; two texts with
    one id are two passages.

    What is left out is counted in one warning, again at every opening: records without a query or
    a usable positive, passages without text or that the corpus lacks, repeats, negatives that are
    positives of the same query.

    Args:
        key: names the source and its state; the cache's key.
        records: read only when the cache has no examples under this key.
        where: the source, for messages.
        corpus: what passage ids are looked up in; None where the records carry their passages.

    Raises:
        DataError: no record is usable; or whatever reading `records` raises.
    """
    room = cache_entry(
        "examples",
        digest_of(LAYOUT, key, corpus.digest if corpus else "inline"),
        lambda partial: _write(partial, records, where, corpus),
    )
    if left_out := (room / "left_out").read_text(encoding="utf-8"):
        log.warning("%s: left out: %s", where, left_out)
    return CachedExamples(room, opened_corpus(room / "passages") if corpus is None else corpus)


class CachedExamples:
    """Examples by index, mapped from a folder of the cache; reading one takes microseconds.

    Attributes:
        passages: what positives and negatives are rows of.
        digest: names the contents, 16 characters.
    """

    def __init__(self, room: Path, passages: Corpus) -> None:
        self._room = room
        self.passages = passages
        self.digest = digest_of((room / "digest").read_text(), passages.digest)
        table = pa.ipc.open_file(pa.memory_map(str(room / "examples.arrow"))).read_all()
        self._batches = [_Batch(batch) for batch in table.to_batches()]
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches]).tolist()

    def __reduce__(self) -> tuple[Callable[..., CachedExamples], tuple[Any, ...]]:
        return CachedExamples, (self._room, self.passages)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        batch = bisect_right(self._starts, index) - 1
        return self._batches[batch].example(int(index) - self._starts[batch])

    def others(self, index: int) -> np.ndarray:
        """Rows of an example's negatives that are not hard, `(n_others,) int64`; most have none."""
        batch = bisect_right(self._starts, index) - 1
        return self._batches[batch].others(int(index) - self._starts[batch])

    def negative_counts(self) -> np.ndarray:
        """How many hard negatives each example has, `(n_examples,) int64`."""
        return np.concatenate([batch.negative_counts() for batch in self._batches])


class _Batch:
    """Some examples; lists are read as parts of one array, which is much quicker than by Arrow."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._count = len(batch)
        self._ids, self._texts = (batch.column(name) for name in ("query_id", "query"))
        self._answers = _Lists(batch.column("answers"))
        self._tokens, self._positives, self._negatives, self._scores, self._others = (
            _Lists(batch.column(name))
            for name in ("query_tokens", "positives", "negatives", "scores", "others")
        )

    def __len__(self) -> int:
        return self._count

    def negative_counts(self) -> np.ndarray:
        return self._negatives.lengths().astype(np.int64)

    def others(self, row: int) -> np.ndarray:
        return self._others.numbers(row).astype(np.int64)

    def example(self, row: int) -> Example:
        scores = self._scores.numbers(row)
        query = Query(
            self._ids[row].as_py(),
            self._texts[row].as_py(),
            tuple(self._answers.items(row)),
            self._tokens.items(row) or None,
        )
        return Example(
            query,
            self._positives.numbers(row).astype(np.int64),
            self._negatives.numbers(row).astype(np.int64),
            scores.copy() if len(scores) else None,
        )


class _Lists:
    """A column of lists: all items, and where each list begins."""

    def __init__(self, column: pa.Array) -> None:
        self._offsets = column.offsets.to_numpy()
        self._values = column.values
        numeric = not pa.types.is_string(self._values.type)
        self._numbers = self._values.to_numpy() if numeric else np.empty(0)

    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets)

    def numbers(self, row: int) -> np.ndarray:
        return self._numbers[self._offsets[row] : self._offsets[row + 1]]

    def items(self, row: int) -> list[Any]:
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        return self._values.slice(start, stop - start).to_pylist() if stop > start else []


def _write(room: Path, records: Iterable[RawExample], where: str, corpus: Corpus | None) -> None:
    room.mkdir()
    draft = room / "draft.arrow"
    tally = Tally()
    if corpus is None:
        with CorpusWriter(room / "passages", quiet=True) as writer:
            count = write_draft(draft, records, PassageCodes(writer, tally), tally)
        known = Rows(np.arange(len(writer)))
    else:
        codes = IdCodes()
        count = write_draft(draft, records, codes, tally)
        names, rows = codes.rows(corpus)
        known = Rows(rows, names)
    kept = _write_cleaned(room, draft, known, tally)
    draft.unlink()
    if kept == 0:
        problems = str(tally) or "the source is empty"
        raise DataError(f"{where}: none of {count} records can be trained on: {problems}")
    (room / "left_out").write_text(str(tally), encoding="utf-8")


def _write_cleaned(room: Path, draft: Path, known: Rows, tally: Tally) -> int:
    kept = 0
    content = ContentDigest(SCHEMA)
    with (
        pa.OSFile(str(room / "examples.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for batch in draft_batches(draft):
            examples = cleaned(batch, known, tally)
            writer.write_batch(examples)
            content.update(examples)
            kept += len(examples)
    (room / "digest").write_text(content.hexdigest())
    return kept


class JudgedExamples:
    """Training examples from relevance judgements: the positives are the relevant passages."""

    def __init__(self, topics: Topics, corpus: Corpus) -> None:
        self.passages = corpus
        pairs = [
            (position, passage_id)
            for position, query in enumerate(topics.queries)
            for passage_id, relevance in topics.qrels[query.id].items()
            if relevance > 0
        ]
        if not pairs:
            raise DataError("the train split has no relevant passage; there is nothing to train on")
        positions = np.array([position for position, _ in pairs])
        self._rows = corpus.rows_of([passage_id for _, passage_id in pairs])
        kept, starts = np.unique(positions, return_index=True)
        self._queries = [topics.queries[position] for position in kept]
        self._starts = [*starts.tolist(), len(pairs)]
        texts = (query.text for query in self._queries)
        self.digest = digest_of(corpus.digest, *self._rows, *self._starts, *texts)

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> Example:
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        return Example(self._queries[index], rows, NO_ROWS)

    def negative_counts(self) -> np.ndarray:
        """None for any: judgements name no hard negatives, `(n_examples,) int64`."""
        return np.zeros(len(self), np.int64)


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
QUERY_COLUMNS = SCHEMA.names[:4]

UNKNOWN = "passages that the corpus lacks"
REPEATED = "passages listed twice for one query"
ALSO_POSITIVE = "negatives that are also positives of their query"
PARTLY_SCORED = "records with a teacher's scores for some of their passages only, so used without"


class Rows(NamedTuple):
    """What the codes of a draft stand for.

    Attributes:
        rows: row of each code, `(n_codes,) int64`; -1 where the corpus lacks the passage.
        names: id of each code, for messages; empty where no row is -1.
    """

    rows: np.ndarray
    names: Sequence[str] = ()


class _Entries(NamedTuple):
    """One entry for each passage: example, code, row and score, all `(n_passages,)`."""

    owners: np.ndarray
    codes: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    def where(self, kept: np.ndarray) -> _Entries:
        return _Entries(*(column[kept] for column in self))


def cleaned(draft: pa.RecordBatch, known: Rows, tally: Tally) -> pa.RecordBatch:
    """Examples of `SCHEMA`; those that no positive is left of are dropped.

    Left out and counted: passages that the corpus lacks, repeats within one list, negatives that
    are positives of the same query too, and scores of examples that lack some.
    """
    ids = draft.column("query_id")
    positives, *rest = (
        _distinct(_known(_side(draft, name, known.rows), known, tally), ids, tally)
        for name in ("positives", "negatives", "others")
    )
    negatives, others = (_no_positives(side, positives, ids, tally) for side in rest)

    usable = np.bincount(positives.owners, minlength=len(draft)) > 0
    _count_examples(tally, NO_POSITIVE, np.flatnonzero(~usable), ids)
    positives, negatives, others = (
        side.where(usable[side.owners]) for side in (positives, negatives, others)
    )
    scores = _scores(positives, negatives, len(draft), ids, tally)
    kept = draft.select(QUERY_COLUMNS).filter(pa.array(usable))
    lists = [
        _lists(positives.owners, positives.rows.astype(np.int32), usable),
        _lists(negatives.owners, negatives.rows.astype(np.int32), usable),
        _lists(*scores, usable),
        _lists(others.owners, others.rows.astype(np.int32), usable),
    ]
    return pa.record_batch([*kept.columns, *lists], schema=SCHEMA)


def _no_positives(side: _Entries, positives: _Entries, ids: pa.Array, tally: Tally) -> _Entries:
    """Negatives without those that are positives of the same query."""
    also_positive = np.isin(_keys(side), _keys(positives))
    _count_examples(tally, ALSO_POSITIVE, side.owners[also_positive], ids)
    return side.where(~also_positive)


def _side(draft: pa.RecordBatch, name: str, rows: np.ndarray) -> _Entries:
    lengths = pc.list_value_length(draft.column(name)).to_numpy(zero_copy_only=False)
    codes = draft.column(name).flatten().to_numpy(zero_copy_only=False)
    scores = draft.column(f"{name.removesuffix('s')}_scores").flatten()
    owners = np.repeat(np.arange(len(draft)), lengths)
    return _Entries(owners, codes, rows[codes], scores.to_numpy(zero_copy_only=False))


def _known(side: _Entries, known: Rows, tally: Tally) -> _Entries:
    unknown = side.rows < 0
    if unknown.any():
        case = repr(known.names[side.codes[unknown][0]])
        tally.add(UNKNOWN, case, int(unknown.sum()))
    return side.where(~unknown)


def _distinct(side: _Entries, ids: pa.Array, tally: Tally) -> _Entries:
    """Each passage once in each list, at its first place."""
    _, first = np.unique(_keys(side), return_index=True)
    again = np.ones(len(side.rows), bool)
    again[first] = False
    _count_examples(tally, REPEATED, side.owners[again], ids)
    return side.where(~again)


def _keys(side: _Entries) -> np.ndarray:
    """A number for each pair of example and row, `(n_passages,) int64`."""
    return side.owners * (np.int64(1) << 32) + side.rows


def _scores(
    positives: _Entries, negatives: _Entries, examples: int, ids: pa.Array, tally: Tally
) -> tuple[np.ndarray, np.ndarray]:
    """Owners and scores, positives before negatives, of examples all of whose passages have one."""
    owners = np.concatenate([positives.owners, negatives.owners])
    scores = np.concatenate([positives.scores, negatives.scores]).astype(np.float32)
    missing = np.bincount(owners, np.isnan(scores), examples)
    present = np.bincount(owners, ~np.isnan(scores), examples)
    _count_examples(tally, PARTLY_SCORED, np.flatnonzero((missing > 0) & (present > 0)), ids)
    whole = missing[owners] == 0
    order = np.argsort(owners[whole], kind="stable")
    return owners[whole][order], scores[whole][order]


def _lists(owners: np.ndarray, values: np.ndarray, usable: np.ndarray) -> pa.Array:
    """One list for each usable example; `owners` ascend."""
    lengths = np.bincount(owners, minlength=len(usable))[usable]
    return list_array(np.concatenate([[0], np.cumsum(lengths)]), values)


def _count_examples(tally: Tally, kind: str, owners: np.ndarray, ids: pa.Array) -> None:
    if len(owners):
        tally.add(kind, f"query {ids[int(owners[0])].as_py()!r}", len(owners))
