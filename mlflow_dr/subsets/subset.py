"""A subset: passages of a corpus with their origin, and the queries that search them.

It is written as a BEIR folder, in one file or in shards, or as Asyncval's files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import write_lines
from mlflow_dr.collection.qrels import write_qrels
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write, digest_of
from mlflow_dr.progress import progress_bar
from mlflow_dr.subsets.spec import ALL, SubsetSpec, SubsetTerm
from mlflow_dr.subsets.strategies import SubsetSources

JUDGED = "judged"
BEIR, ASYNCVAL = "beir", "asyncval"

Tokens = Callable[[Sequence[str]], Sequence[Sequence[int]]]
"""Texts to token ids, without special tokens."""


@dataclass(frozen=True)
class Subset:
    """The passages and queries of a validation.

    Attributes:
        spec: the request.
        corpus: the whole corpus.
        topics: the queries, and their judgements.
        rows: the passages that are searched, rows of the corpus, ascending, `(n,) int64`.
        origins: which of `names` a passage comes from, as bits, `(n,) int64`.
        candidates: the only rows that each query ranks, `(n_candidates,) int64`; None if each
            query ranks all passages.
    """

    spec: SubsetSpec
    corpus: Corpus
    topics: Topics
    rows: np.ndarray
    origins: np.ndarray
    candidates: Sequence[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Where passages come from: they are judged, or chosen by a term."""
        terms = (term for term in self.spec.terms if term.strategy.chooses != "queries")
        return (JUDGED, *(term.shown for term in terms))

    @property
    def sizes(self) -> dict[str, int]:
        """How many passages have each origin; a passage may have several."""
        return {name: int((self.origins >> bit & 1).sum()) for bit, name in enumerate(self.names)}

    @cached_property
    def sample(self) -> np.ndarray:
        """The passages that only the random sample has chosen, rows ascending, `(n,) int64`."""
        (bit,) = (
            bit
            for bit, name in enumerate(self.names)
            if self.spec.sample is not None and name == self.spec.sample.shown
        )
        return self.rows[self.origins == 1 << bit]

    @cached_property
    def digest(self) -> str:
        """A digest of passages, queries and candidates, however they were chosen."""
        ids = sorted(self.corpus.ids.take(pa.array(self.rows)).to_pylist())
        parts = ["\n".join(ids), "\n".join(sorted(query.id for query in self.topics.queries))]
        if self.candidates is not None:
            for query, rows in zip(self.topics.queries, self.candidates, strict=True):
                named = sorted(self.corpus.ids.take(pa.array(rows)).to_pylist())
                parts.append("\n".join([query.id, *named]))
        return digest_of(*parts)

    def table(self) -> pa.Table:
        """Ids of the passages, and where they come from: columns `passage_id` and `origin`."""
        combinations, which = np.unique(self.origins, return_inverse=True)
        texts = [
            " + ".join(name for bit, name in enumerate(self.names) if bits >> bit & 1)
            for bits in combinations.tolist()
        ]
        origin = pa.DictionaryArray.from_arrays(which.astype(np.int32), pa.array(texts))
        ids = self.corpus.ids.take(pa.array(self.rows)).combine_chunks()
        return pa.table({"passage_id": ids, "origin": origin})


def make_subset(spec: SubsetSpec, sources: SubsetSources) -> Subset:
    """Choose the queries first, then passages for these queries; judged passages are included.

    Raises:
        DataError: a ranking file is malformed, or about another collection.
        UsageError: no such encoder.
    """
    sources = replace(sources, seed=spec.seed)
    queries = spec.term_that_chooses("queries")
    if queries is not None:
        sources = replace(sources, topics=_chosen_topics(queries, sources))
    corpus, topics = sources.corpus, sources.topics
    judged = _judged_rows(spec, corpus, topics)
    choices = [
        (term.strategy.chooses, term.strategy.choose(term, sources))
        for term in spec.terms
        if term is not queries
    ]
    candidates = None
    for chooses, rows in choices:
        if chooses == "candidates":
            candidates = [np.union1d(*pair) for pair in zip(rows, judged, strict=True)]
    joined, origins = _joined([_union(judged), *(_union(rows) for _, rows in choices)])
    return Subset(spec, corpus, topics, joined, origins, candidates)


def _chosen_topics(term: SubsetTerm, sources: SubsetSources) -> Topics:
    topics = sources.topics
    positions = _union(term.strategy.choose(term, sources))
    queries = [topics.queries[position] for position in positions]
    return topics.of(queries)


def _judged_rows(spec: SubsetSpec, corpus: Corpus, topics: Topics) -> list[np.ndarray]:
    """The judged passages of each query that are always included."""
    ids = [
        [
            pid
            for pid, rel in topics.qrels.get(query.id, {}).items()
            if rel > 0 or spec.judged == ALL
        ]
        for query in topics.queries
    ]
    rows = corpus.rows_of([pid for of_query in ids for pid in of_query])
    return np.split(rows, np.cumsum([len(of_query) for of_query in ids])[:-1])


def _union(groups: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.int64), *groups]))


def _joined(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all parts, ascending, and a bit for each part that a row is in."""
    rows = _union(parts)
    origins = np.zeros(len(rows), np.int64)
    for bit, part in enumerate(parts):
        # a search in tens of millions of rows takes seconds
        places = slice(None) if len(part) == len(rows) else np.searchsorted(rows, part)
        origins[places] |= 1 << bit
    return rows, origins


def write_subset(
    output: Path,
    subset: Subset,
    split: str,
    layout: str = BEIR,
    shards: int = 1,
    tokens: Tokens | None = None,
) -> None:
    """Write a subset, its queries and judgements, and where its passages come from.

    - `beir`: `corpus.jsonl`, `queries.jsonl`, `qrels/<split>.tsv`; of several shards
      `corpus-00000-of-00004.jsonl` and so on.
    - `asyncval`: `candidates/split00.jsonl` and so on, `queries.<split>.jsonl`,
      `qrels.<split>.tsv`; lines of `text_id` and `text`, title in front.

    Both have `subset.parquet`: passage ids and origins. In the names of files a split's slashes are
    underscores.

    Args:
        output: the new folder; it is complete, or it does not exist.
        subset: what is written.
        split: names the judgements.
        layout: `beir` or `asyncval`.
        shards: files of passages, of nearly equal numbers.
        tokens: makes the token ids of texts that Asyncval itself expects; with its layout only.

    Raises:
        UsageError: the folder exists, or the subset cannot be written in this layout.
    """
    if output.exists():
        raise UsageError(f"{output}: exists already; name another folder")
    if subset.candidates is not None:
        raise UsageError(
            f"subset {subset.spec.shown} gives each query its own passages, which no folder can "
            "express; write ranking:FILE@K instead"
        )
    if not subset.topics.qrels:
        raise UsageError(
            "the queries have answers and no judgements, which neither layout can express; choose "
            "a split with judgements"
        )
    if subset.corpus.tokenised and layout == BEIR:
        raise UsageError("the corpus is token ids; it can be written with --format asyncval only")
    if not 1 <= shards <= len(subset):
        raise UsageError(f"{shards} shards of {len(subset)} passages; expected 1 to {len(subset)}")
    split = split.replace("/", "_")
    names = _corpus_files(layout, shards)
    record = _beir if layout == BEIR else _asyncval(tokens)
    with atomic_write(output) as partial:
        (partial / Path(names[0]).parent).mkdir(parents=True)
        _write_passages([partial / name for name in names], subset, record)
        of_split = "" if layout == BEIR else f".{split}"
        write_lines(partial / f"queries{of_split}.jsonl", _queries(subset.topics, layout, tokens))
        qrels = f"qrels/{split}.tsv" if layout == BEIR else f"qrels.{split}.tsv"
        write_qrels(partial / qrels, subset.topics, as_trec=layout == ASYNCVAL)
        pq.write_table(subset.table(), partial / "subset.parquet", compression="zstd")


def _corpus_files(layout: str, shards: int) -> list[str]:
    if layout == ASYNCVAL:
        return [f"candidates/split{shard:02}.jsonl" for shard in range(shards)]
    if shards == 1:
        return ["corpus.jsonl"]
    return [f"corpus-{shard:05}-of-{shards:05}.jsonl" for shard in range(shards)]


def _write_passages(
    paths: Sequence[Path],
    subset: Subset,
    records: Callable[[Sequence[Passage]], Iterator[Mapping[str, Any]]],
) -> None:
    def lines(rows: np.ndarray) -> Iterator[Mapping[str, Any]]:
        for group in subset.corpus.batches(rows):
            yield from records(group)
            bar.update(len(group))

    with progress_bar(len(subset), "writing the subset", "passages") as bar:
        for path, rows in zip(paths, np.array_split(subset.rows, len(paths)), strict=True):
            write_lines(path, lines(rows))


def _queries(topics: Topics, layout: str, tokens: Tokens | None) -> Iterator[Mapping[str, Any]]:
    if layout == BEIR:
        for query in topics.queries:
            answers = {"metadata": {"answers": list(query.answers)}} if query.answers else {}
            yield {"_id": query.id, "text": query.text, **answers}
        return
    yield from _texts(list(topics.queries), [query.text for query in topics.queries], tokens)


def _beir(passages: Sequence[Passage]) -> Iterator[Mapping[str, Any]]:
    for passage in passages:
        yield {"_id": passage.id, "title": passage.title, "text": passage.text}


def _asyncval(
    tokens: Tokens | None,
) -> Callable[[Sequence[Passage]], Iterator[Mapping[str, Any]]]:
    def records(passages: Sequence[Passage]) -> Iterator[Mapping[str, Any]]:
        texts = [f"{passage.title} {passage.text}".strip() for passage in passages]
        return _texts(list(passages), texts, tokens)

    return records


def _texts(
    items: Sequence[Passage | Query], texts: Sequence[str], tokens: Tokens | None
) -> Iterator[Mapping[str, Any]]:
    """Lines of `text_id` and `text`: token ids where they are known or made, else the text."""
    made = tokens(texts) if tokens is not None else [None] * len(texts)
    for item, text, ids in zip(items, texts, made, strict=True):
        if item.tokens is not None:
            yield {"text_id": item.id, "text": list(item.tokens)}
        else:
            yield {"text_id": item.id, "text": text if ids is None else list(ids)}
