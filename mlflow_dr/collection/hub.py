"""Collections on the Hugging Face hub in Tevatron's layout: one repository for each table.

Source: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
`datasets` reads their files but, from release 4 on, refuses the loading scripts beside them; so
the files are fetched as they are and read as plain JSON lines or Parquet.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.drafts import RawExample
from mlflow_dr.collection.examples import CachedExamples, cached_examples
from mlflow_dr.collection.hub_files import (
    READERS,
    HubFiles,
    fetched,
    fetched_where_there,
    reason,
)
from mlflow_dr.collection.interface import check_split
from mlflow_dr.collection.irds import topics_of
from mlflow_dr.collection.judgements import checked_topics
from mlflow_dr.collection.layouts import Layout, layout_of, raw_examples, recognised
from mlflow_dr.collection.recordfiles import read_records
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.collection.tables import arrow_table, check_passages, passage_table
from mlflow_dr.errors import DataError

log = logging.getLogger(__name__)

JUDGED_STEMS = ("dev", "validation", "test")


def msmarco_passage(name: str = "msmarco") -> HubCollection:
    """MS MARCO passage ranking: Tevatron's training examples and passages, `dev` of 6,980 queries.

    Source: Bajaj et al., MS MARCO: A Human Generated MAchine Reading COmprehension Dataset, 2016.
    """
    return HubCollection(
        name,
        examples="Tevatron/msmarco-passage",
        corpus="Tevatron/msmarco-passage-corpus",
        judged={"dev": "msmarco-passage/dev/small"},
    )


def hub_collection(repo: str) -> HubCollection:
    """The collection of a repository `owner/name`, whose passages are in `owner/name-corpus`.

    Of a name that ends in `-new`, Tevatron's mark of examples by id, it is `owner/...-corpus-new`.
    """
    if repo == "Tevatron/msmarco-passage":
        return msmarco_passage(repo)
    corpus = re.sub(r"(-new)?$", r"-corpus\1", repo, count=1)
    return HubCollection(repo, examples=repo, corpus=corpus)


class HubCollection:
    """Examples and passages from the Hugging Face hub, judged queries from there or ir_datasets.

    Args:
        name: what the user calls it.
        examples: repository of `train.jsonl.gz` (or `.jsonl`, Parquet), in any layout of training
            examples. Those that carry their passages need no other repository to train on.
        corpus: repository of `corpus.jsonl.gz` (or the like), rows of `docid, title, text`.
        judged: split -> id in ir_datasets whose judgements name this corpus' passages; without it
            the splits are the `dev`, `validation` and `test` files beside the examples, and the
            positives of a query in them its relevant passages.
    """

    def __init__(
        self, name: str, examples: str, corpus: str, judged: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        queries = f"; ir_datasets {', '.join(judged.values())}" if judged else ""
        self.source = f"Hugging Face {examples} and {corpus}{queries}"
        self._repos = (examples, corpus)
        self._judged = judged

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries.

        Raises:
            DataError: they can neither be downloaded nor found in the cache.
        """
        return list(self._judged if self._judged is not None else self._judged_files)

    @cached_property
    def _judged_files(self) -> dict[str, HubFiles]:
        with self._meant():
            there = fetched_where_there(self._repos[0], JUDGED_STEMS)
        return {stem: files for stem, files in there.items() if _is_judged(files)}

    def corpus(self) -> Corpus:
        """The passages, mapped from the Arrow file that `datasets` made of them.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, lack a column or a
                value, or repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return _corpus(fetched(self._repos[1], "corpus"))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        if self._judged is not None:
            return topics_of(self._judged[split], self._corpus)
        return _topics(self._judged_files[split], self._corpus)

    def examples(self) -> CachedExamples:
        """The training examples.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, are of no known
                layout, or none of them is usable.
        """
        with self._meant():
            files = fetched(self._repos[0], "train")
        with _damage_explained(files):
            layout = layout_of(files.files)
        corpus = self._corpus if layout.by_id else None
        key = f"{layout.name}:{files.digest}"
        return cached_examples(key, _raw_examples(files, layout), files.where, corpus)

    @contextmanager
    def _meant(self) -> Iterator[None]:
        """Of a repository that the user named, an error says that it is no folder either."""
        try:
            yield
        except DataError as error:
            if self.name != self._repos[0]:
                raise
            raise DataError(f"{error}; no file or folder {self.name!r} is here either") from error


def _is_judged(files: HubFiles) -> bool:
    """Whether the first record of a split's files names a relevant passage."""
    with _damage_explained(files):
        where, record = next(read_records(files.files[0]), ("", {}))
        layout = recognised(record)
        return layout is not None and len(layout.example(record, 0, where).positives) > 0


def _topics(files: HubFiles, corpus: Corpus) -> Topics:
    queries: list[Query] = []
    qrels: dict[str, dict[str, int]] = {}
    with _damage_explained(files):
        layout = layout_of(files.files)
    for raw in _raw_examples(files, layout):
        queries.append(raw.query)
        relevant = (p.id if isinstance(p, Passage) else p for p in raw.positives)
        qrels.setdefault(raw.query.id, {}).update(dict.fromkeys(relevant, 1))
    return checked_topics(files.where, queries, qrels, corpus)


def _raw_examples(files: HubFiles, layout: Layout) -> Iterator[RawExample]:
    with _damage_explained(files):
        yield from raw_examples(files.files, layout)


@contextmanager
def _damage_explained(files: HubFiles) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"Hugging Face {files.repo}: {error}; {files.way_out}") from error


def _rows(files: HubFiles, room: Path) -> Any:
    """The files' rows as one `datasets.Dataset` of Arrow files, which are written into `room`.

    Raises:
        DataError: a file is damaged, or its rows have not all the same columns.
    """
    from datasets import load_dataset

    names = [str(file) for file in files.files]
    try:
        return load_dataset(
            READERS[files.suffix], data_files=names, split="train", cache_dir=str(room)
        )
    except Exception as error:
        cause = reason(error.__cause__ or error)
        raise DataError(f"{files.where}: cannot be read ({cause}); {files.way_out}") from error


def _corpus(files: HubFiles) -> Corpus:
    """The fetched passages; they are read, checked and digested once."""

    def write(partial: Path) -> None:
        partial.mkdir()
        with TemporaryDirectory(dir=partial) as room:
            for number, part in enumerate(_rows(files, Path(room)).cache_files):
                Path(part["filename"]).rename(partial / f"rows-{number:05}.arrow")
        table = _table(partial, files.where)
        log.info("%s: checking %d passages, once", files.where, len(table))
        check_passages(table, files.where)
        (partial / "digest").write_text(Corpus(table).digest)

    room = cache_entry("hub", files.digest, write)
    return Corpus(_table(room, files.where), (room / "digest").read_text())


def _table(room: Path, where: str) -> pa.Table:
    """The passages, mapped from the Arrow files that `datasets` has written."""
    from datasets import Dataset, concatenate_datasets

    parts = [Dataset.from_file(str(path)) for path in sorted(room.glob("rows-*.arrow"))]
    return passage_table(arrow_table(concatenate_datasets(parts)), where)
