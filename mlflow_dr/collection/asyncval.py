"""Asyncval's inputs: passages, queries and judgements, each in files of their own.

Layout: Zhuang and Zuccon, Asyncval: A Toolkit for Asynchronously Validating Dense Retriever
Checkpoints during Training, SIGIR 2022. A passage or query is a line
`{"text_id": ..., "text": ...}`, its text a string or token ids without special tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import msgspec

from mlflow_dr.collection.catalogue import Examples, check_split
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.jsonl import (
    Id,
    TextOrTokens,
    check_complete,
    checked_id,
    named_files,
    read_records,
    state_of,
    text_and_tokens,
)
from mlflow_dr.collection.locations import absolute, quoted_path, unquoted_path
from mlflow_dr.collection.qrels import checked_topics, read_qrels
from mlflow_dr.collection.records import Passage, Query, Topics, unique
from mlflow_dr.errors import DataError, UsageError

log = logging.getLogger(__name__)

PREFIX = "asyncval:"
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


class TextRecord(msgspec.Struct):
    """A line of a file of passages or queries."""

    text_id: Id
    text: TextOrTokens


class AsyncvalFiles:
    """A collection in files as Asyncval takes them. Each query file is a split, named by its stem.

    Each split uses only the judgements of its own queries, even if several splits share a file of
    judgements.

    Args:
        candidates: a file of passages, or a folder whose `.json` and `.jsonl` files, packed or
            not, are read in the order of their names.
        queries: files of queries.
        qrels: one file of judgements for all of them, or one for each, in the same order.

    Raises:
        UsageError: no queries or judgements, not as many as needed, or two splits of one name.
    """

    def __init__(self, candidates: Path, queries: Sequence[Path], qrels: Sequence[Path]) -> None:
        self._candidates = absolute(candidates)
        self._query_files = [absolute(path) for path in queries]
        self._qrel_files = [absolute(path) for path in qrels]
        if not queries or len(qrels) not in (1, len(queries)):
            raise UsageError(
                f"{len(queries)} query files and {len(qrels)} files of judgements; expected some "
                "query files, and one file of judgements for all or one for each"
            )
        self.splits: Sequence[str] = [_stem(path) for path in queries]
        if repeated := {split for split in self.splits if self.splits.count(split) > 1}:
            raise UsageError(
                f"two query files are called {min(repeated)!r}, and a split has the name of its "
                "file; rename one of the files, or validate them separately"
            )

    @property
    def name(self) -> str:
        """What `open_collection` opens again, from any folder of this machine."""
        files = [("queries", path) for path in self._query_files]
        files += [("qrels", path) for path in self._qrel_files]
        listed = "&".join(f"{key}={quoted_path(path)}" for key, path in files)
        return f"{PREFIX}{quoted_path(self._candidates)}?{listed}"

    @property
    def source(self) -> str:
        """The files."""
        queries, qrels = (
            ", ".join(map(str, files)) for files in (self._query_files, self._qrel_files)
        )
        return f"passages {self._candidates}; queries {queries}; judgements {qrels}"

    def corpus(self) -> Corpus:
        """The passages.

        Raises:
            DataError: a malformed line or a repeated id, with file:line; text beside token ids; or
                no passage at all.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        files = _passage_files(self._candidates)
        passages = unique("passage", lambda: _read_texts(files, "passage"))
        key = "\n".join([PREFIX, *map(state_of, files)])
        return cached_corpus(key, passages, location=", ".join(map(str, files)))

    def topics(self, split: str) -> Topics:
        """The judged queries of one query file; a warning counts those that are not judged."""
        check_split(self, split)
        index = self.splits.index(split)
        queries, file = self._queries[index], self._query_files[index]
        path = self._qrel_files[index if len(self._qrel_files) > 1 else 0]
        qrels = read_qrels(path)
        own = {query.id for query in queries}
        if len(self._qrel_files) == 1:
            others = {query.id for file_queries in self._queries for query in file_queries} - own
            qrels = {key: judged for key, judged in qrels.items() if key not in others}
        location = f"{path} for {file.name}"
        topics = checked_topics(location, queries, qrels, self._corpus)
        if unjudged := [query.id for query in queries if query.id not in qrels]:
            log.warning(
                "%s: left out: %d queries are not judged (such as %r)",
                *(location, len(unjudged), unjudged[0]),
            )
        return topics

    @cached_property
    def _queries(self) -> list[list[Query]]:
        return [list(unique("query", partial(_read_queries, path))) for path in self._query_files]

    def examples(self) -> Examples:
        """A collection in this format has no training examples.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} has judged queries and no training examples; it can be validated on, and "
            "training needs another dataset"
        )


def asyncval_files(location: str) -> AsyncvalFiles:
    """The collection of a location such as `corpus?queries=dev.json&qrels=qrels.tsv`.

    Characters of a path that have a meaning there are written as in a URL (`%26` for `&`).

    Raises:
        UsageError: the location is not of this form.
    """
    candidates, _, listed = location.partition("?")
    files: dict[str, list[Path]] = {"queries": [], "qrels": []}
    pairs = [part.partition("=") for part in listed.split("&")]
    if not candidates or not all(key in files and path for key, _, path in pairs):
        raise UsageError(
            f"dataset {PREFIX + location!r}: expected {PREFIX}CANDIDATES?queries=FILE&qrels=FILE, "
            "with as many queries= and qrels= as there are files"
        )
    for key, _, path in pairs:
        files[key].append(unquoted_path(path))
    return AsyncvalFiles(unquoted_path(candidates), files["queries"], files["qrels"])


def given_collection(
    dataset: str | None, files: Sequence[Sequence[Path]], options: Sequence[str], location: str = ""
) -> tuple[str | None, Sequence[str]]:
    """The dataset that a user names, or the name of the files that they give instead.

    Args:
        dataset: the name.
        files: candidates, queries and qrels.
        options: what dataset, candidates, queries and qrels are called, for messages.
        location: where they are given, for messages.

    Returns:
        The name, None when neither is given, and the splits of the files.

    Raises:
        UsageError: a name and files are given, or some of the files are missing.
    """
    if not any(files):
        return dataset, ()
    missing = [option for option, some in zip(options[1:], files, strict=True) if not some]
    candidates, queries, qrels = files
    if dataset is not None or missing or len(candidates) > 1:
        problem = f"; there is no {', no '.join(missing)}" if missing else ""
        raise UsageError(
            f"{location}give {options[0]}, or {options[1]} (once), {options[2]} and "
            f"{options[3]}{problem}"
        )
    collection = AsyncvalFiles(candidates[0], queries, qrels)
    return collection.name, collection.splits


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    return path.name.removesuffix(suffix)


def _passage_files(candidates: Path) -> list[Path]:
    """The file itself, or those of a folder.

    Raises:
        DataError: the folder has none.
    """
    if not candidates.is_dir():
        return [candidates]
    files = named_files(candidates, SUFFIXES)
    check_complete(files)
    present = sorted(path for path in candidates.iterdir() if not path.name.startswith("."))
    strays = [path.name for path in present if path not in files]
    if not files:
        raise DataError(
            f"{candidates}: expected files of passages ({', '.join(SUFFIXES)}), there are "
            f"{f'only {strays[0]} and the like' if strays else 'none'}"
        )
    if strays:
        log.info("%s: skipped %d other files (such as %s)", candidates, len(strays), strays[0])
    return files


def _read_queries(path: Path) -> Iterator[tuple[str, Query]]:
    for location, passage in _read_texts([path], "query"):
        yield location, Query(passage.id, passage.text, (), passage.tokens)


def _read_texts(files: Sequence[Path], kind: str) -> Iterator[tuple[str, Passage]]:
    """Passages or queries; an error when some are text and others token ids."""
    tokenised: bool | None = None
    for file in files:
        for location, record in read_records(file, TextRecord):
            text, tokens = text_and_tokens(record.text)
            if tokenised not in (None, tokens is not None):
                kinds = ("text", "token ids") if tokenised else ("token ids", "text")
                raise DataError(
                    f"{location}: the {kind} is {kinds[0]}, those before it are {kinds[1]}; "
                    "tokenise all of them, or none"
                )
            tokenised = tokens is not None
            yield location, Passage(checked_id(record.text_id, location), "", text, tokens)
