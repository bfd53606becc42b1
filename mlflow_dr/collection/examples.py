"""Training examples: made of raw examples once, and mapped from the user's cache."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.corpus import ContentDigest, Corpus, CorpusWriter, open_corpus
from mlflow_dr.collection.raw_examples import (
    SCHEMA,
    PassageIndex,
    RawExample,
    SkipReport,
    deduplicate_examples,
)
from mlflow_dr.collection.records import Example, Query, Topics
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of
from mlflow_dr.progress import progress_bar

if TYPE_CHECKING:
    from mlflow_dr.collection.catalogue import Examples

log = logging.getLogger(__name__)

LAYOUT = 2
"""Raise it when the rules of `raw_examples.py` change: examples cached before are not used then."""

EXAMPLES_PER_BATCH = 512
"""Examples that are read before they are written: each may have a hundred passages."""
LOOK_UP_BATCHES = 128
"""Batches whose ids are looked up together, because that takes a pass over the corpus."""
NO_ROWS = np.empty(0, np.int64)


def cached_examples(
    key: str, records: Iterable[RawExample], location: str, corpus: Corpus | None = None
) -> CachedExamples:
    """Examples made from raw records once, kept as Arrow files in the user's cache, and mapped.

    One record is one example: two records with one query id stay two examples, because files join
    what several retrievers found for a query, and because ids of joined data sets may coincide.
    Passages that come with the records become a corpus of their own, each id once; two texts with
    one id are two passages.

    What is left out is counted in one warning at every opening: records without a query or a usable
    positive, passages without text or that the corpus lacks, repeats, and negatives that are
    positives of the same query.

    Args:
        key: names the source and its state; the cache's key.
        records: read only when the cache has no examples under this key.
        location: the source, for messages.
        corpus: where passage ids are looked up; None where the records carry their passages.

    Raises:
        DataError: no record is usable; and anything that reading `records` raises.
    """
    directory = cache_entry(
        "examples",
        digest_of(LAYOUT, key, "inline" if corpus is None else corpus.digest),
        lambda partial: _write(partial, records, location, corpus),
        location,
    )
    if skipped := (directory / "skipped").read_text(encoding="utf-8"):
        log.warning("%s: left out: %s", location, skipped)
    return CachedExamples(
        directory, open_corpus(directory / "passages") if corpus is None else corpus
    )


def _write(
    directory: Path, records: Iterable[RawExample], location: str, corpus: Corpus | None
) -> None:
    directory.mkdir()
    skipped, content = SkipReport(), ContentDigest(SCHEMA)
    read = kept = 0
    iterator = iter(records)
    with ExitStack() as stack:
        target = (
            corpus
            if corpus is not None
            else stack.enter_context(CorpusWriter(directory / "passages", quiet=True))
        )
        index = PassageIndex(target, skipped)
        sink = stack.enter_context(pa.OSFile(str(directory / "examples.arrow"), "wb"))
        file = stack.enter_context(pa.ipc.new_file(sink, SCHEMA))
        bar = stack.enter_context(progress_bar(None, "reading the training examples", "examples"))
        size = EXAMPLES_PER_BATCH * (1 if corpus is None else LOOK_UP_BATCHES)
        while group := list(islice(iterator, size)):
            index.look_up(group)
            examples = deduplicate_examples(group, index, skipped)
            file.write_batch(examples)
            content.update(examples)
            read += len(group)
            kept += len(examples)
            bar.update(len(group))
    if kept == 0:
        problems = str(skipped) or "the source is empty"
        raise DataError(f"{location}: none of {read} records can be trained on: {problems}")
    (directory / "digest").write_text(content.hexdigest())
    (directory / "skipped").write_text(str(skipped), encoding="utf-8")


def topics_of_examples(examples: Examples, rows: Iterable[int]) -> Topics:
    """Queries of training examples, with their positives as relevant passages.

    The positives of examples with the same id and text are merged; if an id comes with another
    text, the example's number is appended to it.
    """
    queries: dict[str, Query] = {}
    qrels: dict[str, dict[str, int]] = {}
    for number in rows:
        query, positives = examples[number][:2]
        earlier = queries.get(query.id, query)
        if (earlier.text, earlier.tokens) != (query.text, query.tokens):
            query = query._replace(id=f"{query.id}#{number}")
        queries[query.id] = query
        judged = qrels.setdefault(query.id, {})
        judged |= {passage.id: 1 for passage in examples.passages.passages(positives)}
    return Topics(list(queries.values()), qrels)


class CachedExamples:
    """Examples by index, mapped from a directory of the cache; reading one takes microseconds.

    Attributes:
        passages: what positives and negatives are rows of.
        digest: names the contents, 16 characters.
    """

    def __init__(self, directory: Path, passages: Corpus) -> None:
        self._directory = directory
        self.passages = passages
        self.digest = digest_of((directory / "digest").read_text(), passages.digest)
        table = pa.ipc.open_file(pa.memory_map(str(directory / "examples.arrow"))).read_all()
        self._batches = [_Batch(batch) for batch in table.to_batches()]
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches]).tolist()

    def __reduce__(self) -> tuple[Callable[..., CachedExamples], tuple[Any, ...]]:
        return CachedExamples, (self._directory, self.passages)

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
    """Some examples; lists are slices of one array, which is much faster than Arrow's lists."""

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
    """A column of lists: all items, and the offset of each list."""

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
        """Zeros, `(n_examples,) int64`: judgements name no hard negatives."""
        return np.zeros(len(self), np.int64)
