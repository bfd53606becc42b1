"""Asyncval's inputs: passages, queries and judgements, each in files of their own.

Layout: Zhuang and Zuccon, Asyncval: A Toolkit for Asynchronously Validating Dense Retriever
Checkpoints during Training, SIGIR 2022. A passage or query is a line
`{"text_id": ..., "text": ...}`, its text a string or token ids without special tokens.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.formats import Examples, check_split
from mlflow_dr.collection.jsonl import (
    check_complete,
    fields_of,
    identifier,
    named_files,
    read_records,
    state_of,
    text_or_tokens,
)
from mlflow_dr.collection.qrels import checked_topics, read_qrels
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.errors import DataError, UsageError, quoted

log = logging.getLogger(__name__)

PREFIX = "asyncval:"
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ID, TEXT = "text_id", "text"


class AsyncvalFiles:
    """A collection in files as Asyncval takes them. Each query file is a split, named by its stem.

    A split is judged on its own queries only, however many share the judgements.

    Args:
        candidates: a file of passages, or a folder whose `.json` and `.jsonl` files, packed or
            not, are read in the order of their names.
        queries: files of queries.
        qrels: one file of judgements for all of them, or one for each, in the same order.

    Raises:
        UsageError: no queries or judgements, not as many as needed, or two splits of one name.
    """

    def __init__(self, candidates: Path, queries: Sequence[Path], qrels: Sequence[Path]) -> None:
        self._candidates = _whole(candidates)
        self._query_files = [_whole(path) for path in queries]
        self._qrel_files = [_whole(path) for path in qrels]
        if not queries or len(qrels) not in (1, len(queries)):
            raise UsageError(
                f"{len(queries)} query files and {len(qrels)} files of judgements; expected some "
                "query files, and one file of judgements for all or one for each"
            )
        self.splits: Sequence[str] = [_stem(path) for path in queries]
        if repeated := {one for one in self.splits if self.splits.count(one) > 1}:
            raise UsageError(
                f"two query files are called {min(repeated)!r}, and a split has the name of its "
                "file; rename one, or validate them one by one"
            )

    @property
    def name(self) -> str:
        """What `open_collection` opens again, from any folder of this machine."""
        files = [("queries", path) for path in self._query_files]
        files += [("qrels", path) for path in self._qrel_files]
        listed = "&".join(f"{key}={_quoted(path)}" for key, path in files)
        return f"{PREFIX}{_quoted(self._candidates)}?{listed}"

    @property
    def source(self) -> str:
        """The files, in words."""
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
        return cached_corpus("\n".join([PREFIX, *map(state_of, files)]), _passages(files))

    def topics(self, split: str) -> Topics:
        """The judged queries of one query file; how many are not judged is said in a warning."""
        check_split(self, split)
        place = self.splits.index(split)
        queries, file = self._queries[place], self._query_files[place]
        path = self._qrel_files[place if len(self._qrel_files) > 1 else 0]
        qrels = read_qrels(path)
        if len(self._qrel_files) == 1:
            others = {query_id for one in self._queries for query_id in one} - queries.keys()
            qrels = {key: judged for key, judged in qrels.items() if key not in others}
        where = f"{path} for {file.name}"
        topics = checked_topics(where, queries.values(), qrels, self._corpus)
        if unjudged := [query_id for query_id in queries if query_id not in qrels]:
            log.warning(
                "%s: left out: %d queries are not judged (such as %r)",
                *(where, len(unjudged), unjudged[0]),
            )
        return topics

    @cached_property
    def _queries(self) -> list[dict[str, Query]]:
        return [_queries(path) for path in self._query_files]

    def examples(self) -> Examples:
        """There are none.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} has judged queries and no training examples; it can be validated on, and "
            "training needs another dataset"
        )


def asyncval_files(name: str) -> AsyncvalFiles:
    """The collection of a name such as `asyncval:corpus?queries=dev.json&qrels=qrels.tsv`.

    Characters of a path that have a meaning there are written as in an URL (`%26` for `&`).

    Raises:
        UsageError: the name is not of this form.
    """
    candidates, _, listed = name.removeprefix(PREFIX).partition("?")
    files: dict[str, list[Path]] = {"queries": [], "qrels": []}
    pairs = [part.partition("=") for part in listed.split("&")]
    if not candidates or not all(key in files and path for key, _, path in pairs):
        raise UsageError(
            f"dataset {name!r}: expected {PREFIX}CANDIDATES?queries=FILE&qrels=FILE, with as many "
            "queries= and qrels= as there are files"
        )
    for key, _, path in pairs:
        files[key].append(_unquoted(path))
    return AsyncvalFiles(_unquoted(candidates), files["queries"], files["qrels"])


def asyncval_name(candidates: Path, queries: Sequence[Path], qrels: Sequence[Path]) -> str:
    """The name of a collection of these files; see `AsyncvalFiles`."""
    return AsyncvalFiles(candidates, queries, qrels).name


def given_collection(
    dataset: str | None, files: Sequence[Sequence[Path]], words: Sequence[str], where: str = ""
) -> tuple[str | None, Sequence[str]]:
    """The dataset that a user names, or the name of the files that they give instead.

    Args:
        dataset: what they name.
        files: candidates, queries and qrels that they give.
        words: how dataset, candidates, queries and qrels are called there.
        where: the place, for messages.

    Returns:
        The name, None when they say neither, and the splits that they gave files of.

    Raises:
        UsageError: they give a name and files, or not all of the files.
    """
    if not any(files):
        return dataset, ()
    missing = [word for word, some in zip(words[1:], files, strict=True) if not some]
    candidates, queries, qrels = files
    if dataset is not None or missing or len(candidates) > 1:
        lacks = f"; there is no {', no '.join(missing)}" if missing else ""
        raise UsageError(
            f"{where}give {words[0]}, or {words[1]} (once), {words[2]} and {words[3]}{lacks}"
        )
    collection = AsyncvalFiles(candidates[0], queries, qrels)
    return collection.name, collection.splits


def _whole(path: Path) -> Path:
    """The whole path; links stay, because a split has the name that the user gave its file."""
    return path.expanduser().absolute()


def _quoted(path: Path) -> str:
    return quote(os.fsencode(path))


def _unquoted(text: str) -> Path:
    if "\0" in text or "%00" in text:
        raise UsageError(f"{quoted(text)}: no file can have a NUL character in its name")
    return Path(os.fsdecode(unquote_to_bytes(text)))


def _stem(path: Path) -> str:
    suffix = next((one for one in SUFFIXES if path.name.endswith(one)), path.suffix)
    return path.name.removesuffix(suffix)


class _Text(NamedTuple):
    """One line: a passage or a query."""

    where: str
    id: str
    text: str
    tokens: list[int] | None


def _passage_files(candidates: Path) -> list[Path]:
    """The file itself, or those of a folder.

    Raises:
        DataError: the folder has none.
    """
    if not candidates.is_dir():
        return [candidates]
    files = named_files(candidates, SUFFIXES)
    check_complete(files)
    there = sorted(path for path in candidates.iterdir() if not path.name.startswith("."))
    strays = [path.name for path in there if path not in files]
    if not files:
        raise DataError(
            f"{candidates}: expected files of passages ({', '.join(SUFFIXES)}), there are "
            f"{f'only {strays[0]} and the like' if strays else 'none'}"
        )
    if strays:
        log.info("%s: passed over: %d other files (such as %s)", candidates, len(strays), strays[0])
    return files


def _passages(files: Sequence[Path]) -> Iterator[Passage]:
    one: _Text | None = None
    for one in _checked("passage", partial(_texts, files)):
        yield Passage(one.id, "", one.text, one.tokens)
    if one is None:
        raise DataError(f"{', '.join(map(str, files))}: the corpus has no passages")


def _queries(path: Path) -> dict[str, Query]:
    read = partial(_texts, [path])
    return {one.id: Query(one.id, one.text, (), one.tokens) for one in _checked("query", read)}


def _checked(what: str, read: Callable[[], Iterator[_Text]]) -> Iterator[_Text]:
    """All of them; an error when an id is used twice, or some are text and others token ids."""
    seen: set[str] = set()
    tokenised: bool | None = None
    for one in read():
        if one.id in seen:
            first = next(other.where for other in read() if other.id == one.id)
            raise DataError(f"{one.where}: {what} id {quoted(one.id)} was used at {first} already")
        seen.add(one.id)
        if tokenised not in (None, one.tokens is not None):
            kinds = ("text", "token ids") if tokenised else ("token ids", "text")
            raise DataError(
                f"{one.where}: the {what} is {kinds[0]}, those before it are {kinds[1]}; tokenise "
                "all of them, or none"
            )
        tokenised = one.tokens is not None
        yield one


def _texts(files: Sequence[Path]) -> Iterator[_Text]:
    for file in files:
        for where, record in read_records(file):
            if ID not in record:
                raise DataError(
                    f"{where}: no {ID!r}; it has {fields_of(record)}, expected {ID}, "
                    f"{TEXT}; if the file holds something else, move it elsewhere"
                )
            content, tokens = text_or_tokens(record.get(TEXT), f"{where}: {TEXT}")
            yield _Text(where, identifier(record, ID, where), content, tokens)
