"""Collections on the hub that are tables of passages, queries and judgements.

The layouts are recognised by what a repository holds: BEIR's (the judgements are in a repository of
their own), MTEB's and NanoBEIR's (one configuration for each table, or one split for each
collection), MIRACL's (TSV files by language) and BRIGHT's (examples that name relevant documents).
Sources: Thakur et al., BEIR, 2021; Muennighoff et al., MTEB, 2023; Zhang et al., MIRACL, 2023; Su
et al., BRIGHT, 2025.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from mlflow_dr.collection.catalogue import check_split
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import JudgedExamples
from mlflow_dr.collection.hub_files import card_configs, download_paths, repository_files
from mlflow_dr.collection.jsonl import checked_id, read_records
from mlflow_dr.collection.qrels import checked_topics, read_qrels, read_qrels_records
from mlflow_dr.collection.records import Query, Topics, unique
from mlflow_dr.collection.text_files import read_text_files, text_of
from mlflow_dr.errors import DataError, UsageError, quoted
from mlflow_dr.files import decoded, read_lines

CORPUS, QUERIES, QRELS = "corpus", "queries", "qrels"
ROLES = {CORPUS: CORPUS, QUERIES: QUERIES, "query": QUERIES, QRELS: QRELS}
SUFFIX = re.compile(r"\.(parquet|(jsonl|json|tsv)(\.gz)?)$")
SHARD = re.compile(r"-\d+-of-\d+$")
SPLITS = ("train", "dev", "validation", "valid", "val", "test")
UNNAMED_SPLIT = "train"
"""What `datasets` calls the only split of a table that was uploaded without one."""
OTHER_CONFIG = "default"
MIRACL = re.compile(r"([^/]+)-([^-/]+)/(topics|qrels)/[^/]+-([^-/]+)\.tsv")
NONE_EXCLUDED = "N/A"  # in BRIGHT
GOLD = {"documents": ("", "gold_ids"), "long_documents": ("-long", "gold_ids_long")}
"""BRIGHT's corpora -> what the collection's name ends in, and the field of relevant passages."""

Listing = Mapping[tuple[str, str], Sequence[str]]
"""Configuration and split -> paths."""


class Tables(NamedTuple):
    """The files of one collection.

    Attributes:
        corpus: passages.
        queries: split -> its queries.
        qrels: split -> its judgements; empty if another repository has them.
        gold: the field of a query's record that lists its relevant passages, instead of `qrels`.
    """

    corpus: Sequence[str]
    queries: Mapping[str, Sequence[str]]
    qrels: Mapping[str, Sequence[str]]
    gold: str = ""


def find_tables(files: Sequence[str], configs: Sequence[Any] = ()) -> dict[str, Tables]:
    """The collections of a repository, by name; an only one without a name is called "".

    Args:
        files: the paths of all its files.
        configs: the configurations of its card.
    """
    if found := _miracl_tables(files):
        return found
    listing = _card_listing(files, configs) or _path_listing(files)
    return _bright_tables(listing) or _tables_by_role(listing)


def _miracl_tables(files: Sequence[str]) -> dict[str, Tables]:
    """MIRACL's: `miracl-v1.0-ar/topics/topics.miracl-v1.0-ar-dev.tsv`, and `qrels/` beside it."""
    found: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(dict))
    for path in files:
        if match := MIRACL.fullmatch(path):
            found[match[2]][match[3]][match[4]] = [path]
    return {
        name: Tables((), kinds["topics"], kinds[QRELS])
        for name, kinds in found.items()
        if kinds["topics"].keys() & kinds[QRELS].keys()
    }


def _bright_tables(listing: Listing) -> dict[str, Tables]:
    return {
        split + end: Tables(paths, {"test": listing["examples", split]}, {}, field)
        for (config, split), paths in listing.items()
        if config in GOLD and ("examples", split) in listing
        for end, field in [GOLD[config]]
    }


def _tables_by_role(listing: Listing) -> dict[str, Tables]:
    """Tables whose configuration, its ending or its split says what they are."""
    by_name: dict[str, dict[str, dict[str, Sequence[str]]]] = defaultdict(
        lambda: {CORPUS: {}, QUERIES: {}, QRELS: {}}
    )
    for (config, split), paths in listing.items():
        prefix, _, end = config.rpartition("-")
        if end in ROLES:
            by_name[prefix][ROLES[end]][split] = paths
        elif split in ROLES:
            by_name[config.removeprefix(OTHER_CONFIG)][ROLES[split]][""] = paths
    judged = {split: paths for (config, split), paths in listing.items() if config == OTHER_CONFIG}
    if "" in by_name and not by_name[""][QRELS]:
        by_name[""][QRELS] = {split: paths for split, paths in judged.items() if split not in ROLES}
    tables: dict[str, Tables] = {}
    for name, roles in by_name.items():
        if roles[CORPUS] and roles[QUERIES]:
            tables |= _by_corpus(name, roles)
    return tables


def _by_corpus(
    name: str, roles: Mapping[str, Mapping[str, Sequence[str]]]
) -> Iterator[tuple[str, Tables]]:
    """A collection; or one for each split of the corpus, if it has several."""
    corpora = roles[CORPUS]
    if len(corpora) == 1:
        (corpus,) = corpora.values()
        yield name, Tables(corpus, roles[QUERIES], _named_splits(roles))
        return
    for split, corpus in corpora.items():
        queries = roles[QUERIES].get(split) or next(iter(roles[QUERIES].values()))
        if split in roles[QRELS]:
            judged = {split if split in SPLITS else "test": roles[QRELS][split]}
            full_name = f"{name}-{split}" if name else split
            yield full_name, Tables(corpus, {"": queries}, judged)


def _named_splits(roles: Mapping[str, Mapping[str, Sequence[str]]]) -> dict[str, Sequence[str]]:
    """The judgements by split; the only one of tables without names of splits is `test`."""
    splits = {split for tables in roles.values() for split in tables}
    if splits <= {UNNAMED_SPLIT, ""}:
        return {"test": paths} if (paths := next(iter(roles[QRELS].values()), None)) else {}
    return dict(roles[QRELS])


def _card_listing(files: Sequence[str], configs: Sequence[Any]) -> Listing:
    """The tables of a card: `data_files` is a pattern, several, or patterns by split."""
    listing: dict[tuple[str, str], list[str]] = {}
    for config in configs:
        if not isinstance(config, Mapping):
            continue
        entries = config.get("data_files")
        for entry in entries if isinstance(entries, list) else [entries]:
            parts = entry if isinstance(entry, Mapping) else {"path": entry}
            given = parts.get("path") or []
            allowed = [given] if isinstance(given, str) else given
            paths = [path for path in files if any(fnmatchcase(path, str(a)) for a in allowed)]
            key = str(config.get("config_name", OTHER_CONFIG)), str(parts.get("split", "train"))
            if paths and all(map(SUFFIX.search, paths)):
                listing[key] = sorted(paths)
    return listing


def _path_listing(files: Sequence[str]) -> Listing:
    """The tables of a repository without a card: `CONFIG/SPLIT-*`, `CONFIG.*`."""
    listing: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files:
        if not SUFFIX.search(path):
            continue
        folder, _, name = SUFFIX.sub("", path).rpartition("/")
        stem = SHARD.sub("", name)
        if folder == "data":
            folder = OTHER_CONFIG
        listing[(folder, stem) if folder else (stem, "")].append(path)
    return {key: sorted(paths) for key, paths in listing.items()}


class HubTables:
    """A collection of tables on the hub.

    Args:
        name: what the user calls it.
        repo: its repository.
        revision: a branch, tag or commit; the default branch when None.
        config: which of the repository's collections; the only one when empty.
        tables: all of its collections, by name.
    """

    def __init__(
        self,
        name: str,
        repo: str,
        revision: str | None,
        config: str,
        tables: Mapping[str, Tables],
    ) -> None:
        self.name = name
        self._repo, self._revision = repo, revision
        self._config = _chosen(name, repo, config, tables)
        self._tables = tables[self._config]
        self.source = f"Hugging Face {repo}" + (f" ({self._config})" if self._config else "")

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judgements.

        Raises:
            DataError: the repository of the judgements cannot be reached.
        """
        if self._tables.gold:
            return list(self._tables.queries)
        _, _, qrels = self._qrels
        return sorted(qrels)

    def corpus(self) -> Corpus:
        """The passages.

        Raises:
            DataError: they cannot be downloaded, or a record is malformed.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        if self._tables.corpus:
            return read_text_files(self._download(self._tables.corpus))
        repo = f"{self._repo}-corpus"
        files = [path for path in repository_files(repo) if SUFFIX.search(path)]
        own = [path for path in files if path.partition("/")[0].endswith(f"-{self._config}")]
        if not own:
            raise DataError(
                f"Hugging Face {repo}: no folder of passages ends in -{self._config}; it has "
                f"{quoted(', '.join(sorted({path.partition('/')[0] for path in files})))}"
            )
        return read_text_files(download_paths(repo, own))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        tables = self._tables
        paths = tables.queries.get(split) or list(
            dict.fromkeys(path for paths in tables.queries.values() for path in paths)
        )
        files = self._download(paths)
        location = f"Hugging Face {self._repo} ({', '.join(file.name for file in files[:2])})"
        if tables.gold:
            return self._gold_topics(files, location)

        def read() -> Iterator[tuple[str, Query]]:
            for file in files:
                yield from _queries(file)

        qrels_repo, revision, qrels = self._qrels
        judged: dict[str, dict[str, int]] = {}
        for file in download_paths(qrels_repo, qrels[split], revision):
            is_table = file.name.removesuffix(".gz").endswith(".tsv")
            read_file = read_qrels if is_table else read_qrels_records
            for query_id, relevances in read_file(file).items():
                judged.setdefault(query_id, {}).update(relevances)
        return checked_topics(location, unique("query", read), judged, self._corpus)

    def examples(self) -> JudgedExamples:
        """One example for each query of the train split that has a relevant passage."""
        return JudgedExamples(self.topics("train"), self._corpus)

    @cached_property
    def _qrels(self) -> tuple[str, str | None, Mapping[str, Sequence[str]]]:
        """The repository of the judgements, its revision, and their files by split."""
        if self._tables.qrels:
            return self._repo, self._revision, self._tables.qrels
        repo = f"{self._repo}-qrels"
        files = repository_files(repo)
        listing = _card_listing(files, card_configs(repo, files)) or _path_listing(files)
        qrels = {split or config: paths for (config, split), paths in listing.items()}
        if not qrels:
            raise DataError(
                f"Hugging Face {repo}: no files of judgements, such as test.tsv; it has "
                f"{quoted(', '.join(files))}"
            )
        return repo, None, qrels

    def _gold_topics(self, files: Sequence[Any], location: str) -> Topics:
        """BRIGHT's: each example lists the ids of its relevant and of its excluded documents."""
        queries: list[Query] = []
        qrels: dict[str, dict[str, int]] = {}
        for file in files:
            for place, record in read_records(file, dict):
                gold = record.get(self._tables.gold)
                if not isinstance(gold, list) or not all(isinstance(one, str) for one in gold):
                    raise DataError(
                        f"{place}: {self._tables.gold} is {quoted(gold)}; expected a list of ids"
                    )
                excluded = sorted(set(record.get("excluded_ids") or ()) - {NONE_EXCLUDED})
                query = _query(record, place)._replace(excluded=excluded)
                queries.append(query)
                qrels[query.id] = dict.fromkeys((checked_id(one, place) for one in gold), 1)
        return checked_topics(location, queries, qrels, self._corpus)

    def _download(self, paths: Sequence[str]) -> Sequence[Any]:
        return download_paths(self._repo, paths, self._revision)


def _chosen(name: str, repo: str, config: str, tables: Mapping[str, Tables]) -> str:
    """The name of a collection among those of its repository.

    Raises:
        UsageError: there is none of that name, or there are several and none is named.
    """
    if config in tables:
        return config
    if not config and len(tables) == 1:
        return next(iter(tables))
    names = ", ".join(sorted(filter(None, tables))) or "one collection without a name"
    problem = f"has no collection {config!r}" if config else "has several collections"
    example = next(iter(sorted(filter(None, tables))), "")
    raise UsageError(
        f"{name}: the repository {problem}; name one of them, such as "
        f"{repo}{'/' if example else ''}{example}; it has: {names}"
    )


def _queries(file: Any) -> Iterator[tuple[str, Query]]:
    """Queries as records, or as a table without header: id and text between tabs."""
    if not file.name.endswith((".tsv", ".tsv.gz")):
        for location, record in read_records(file, dict):
            yield location, _query(record, location)
        return
    for number, line in read_lines(file):
        location = f"{file}:{number}"
        query_id, tab, text = decoded(line, file, number).rstrip("\r\n").partition("\t")
        if not tab:
            raise DataError(f"{location}: expected a query's id and its text, with a tab between")
        yield location, Query(checked_id(query_id, location), text)


def _query(record: Mapping[str, Any], location: str) -> Query:
    passage = text_of(record, location)
    return Query(passage.id, passage.text, (), passage.tokens)
