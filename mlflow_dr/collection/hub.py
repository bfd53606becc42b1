"""Collections on the Hugging Face hub in Tevatron's layout: one repository for each table.

Source: Gao et al., Tevatron: An Efficient and Flexible Toolkit for Dense Retrieval, 2022.
`datasets` reads their files but, from release 4 on, refuses the loading scripts beside them; so
the files are fetched as they are and read as plain JSON lines or Parquet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.irds import topics_of
from mlflow_dr.collection.records import Example, Passage, Query, Topics, check_split
from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once, cache_dir, digest_of

log = logging.getLogger(__name__)

PASSAGE_COLUMNS = ("docid", "title", "text")
EXAMPLE_COLUMNS = ("query_id", "query", "positive_passages", "negative_passages")

READERS = {".parquet": "parquet", ".jsonl.gz": "json", ".jsonl": "json"}


def msmarco_passage() -> HubCollection:
    """MS MARCO passage ranking: Tevatron's training examples and passages, `dev` of 6,980 queries.

    Source: Bajaj et al., MS MARCO: A Human Generated MAchine Reading COmprehension Dataset, 2016.
    """
    return HubCollection(
        "msmarco",
        examples="Tevatron/msmarco-passage",
        corpus="Tevatron/msmarco-passage-corpus",
        judged={"dev": "msmarco-passage/dev/small"},
    )


class HubCollection:
    """Examples and passages from the Hugging Face hub, judged queries from ir_datasets.

    Args:
        name: what the user calls it.
        examples: repository of `train.jsonl.gz` (or `.jsonl`, Parquet), rows of `EXAMPLE_COLUMNS`.
        corpus: repository of `corpus.jsonl.gz` (or the like), rows of `PASSAGE_COLUMNS`.
        judged: split -> id in ir_datasets whose judgements name this corpus' passages.
    """

    def __init__(self, name: str, examples: str, corpus: str, judged: Mapping[str, str]) -> None:
        self.name = name
        queries = ", ".join(judged.values())
        self.source = f"Hugging Face {examples} and {corpus}; ir_datasets {queries}"
        self._repos = (examples, corpus)
        self._judged = judged

    @property
    def splits(self) -> Sequence[str]:
        """Splits that have judged queries."""
        return list(self._judged)

    def corpus(self) -> Corpus:
        """The passages, mapped from the Arrow file that `datasets` made of them.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, lack a column or a
                value, or repeat an id.
        """
        return self._corpus

    @cached_property
    def _corpus(self) -> Corpus:
        return _corpus(_fetched(self._repos[1], "corpus"))

    def topics(self, split: str) -> Topics:
        """The judged queries of one split.

        Raises:
            UsageError: there is no such split.
            DataError: queries or judgements cannot be downloaded or read, or do not fit the corpus.
        """
        check_split(self, split)
        return topics_of(self._judged[split], self._corpus)

    def examples(self) -> HubExamples:
        """The training examples.

        Raises:
            DataError: they can neither be downloaded nor found in the cache, lack a column, or
                none of them is usable.
        """
        fetched = _fetched(self._repos[0], "train")
        return HubExamples(fetched.rows(), fetched.where, fetched.digest)


class HubExamples:
    """Training examples by row of a memory-mapped `datasets.Dataset`.

    Rows without a query or without a positive passage are left out, with one warning that counts
    them.

    Args:
        rows: a `datasets.Dataset` with `EXAMPLE_COLUMNS`.
        where: its source, for messages.
        digest: names the contents.
    """

    def __init__(self, rows: Any, where: str, digest: str) -> None:
        table = _arrow(rows)
        _check_examples(table, where)
        self._rows = rows
        self._kept = _usable_rows(table, where)
        self.digest = digest

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[int(self._kept[index])]
        return Example(
            Query(str(row["query_id"]), row["query"]),
            [_passage(record) for record in row["positive_passages"]],
            [_passage(record) for record in row["negative_passages"] or ()],
        )


class _Fetched(NamedTuple):
    """Data files of one format, of one repository at one commit, on this machine."""

    repo: str
    commit: str
    reader: str
    files: list[Path]

    @property
    def where(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"Hugging Face {self.repo} ({self.files[0].name}{more})"

    @property
    def digest(self) -> str:
        """Names the contents: a commit of the hub never changes."""
        return digest_of("hub", self.repo, self.commit, *(file.name for file in self.files))

    def rows(self) -> Any:
        """The files' rows as one `datasets.Dataset`, an Arrow file mapped from the cache.

        Raises:
            DataError: a file is damaged, or its rows have not all the same columns.
        """
        from datasets import load_dataset

        files = [str(file) for file in self.files]
        try:
            return load_dataset(self.reader, data_files=files, split="train")
        except Exception as error:
            raise DataError(
                f"{self.where}: cannot be read ({_reason(error.__cause__ or error)}); if a file is "
                f"damaged, `hf download --force-download --repo-type dataset {self.repo}` "
                "replaces it"
            ) from error


def _fetched(repo: str, stem: str) -> _Fetched:
    """The files `<stem>.*` or `<stem>-*.*` of a repository, downloaded where the cache lacks them.

    Raises:
        DataError: the hub cannot be reached and the cache lacks them, or the repository does.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = {suffix: _patterns(stem, suffix) for suffix in READERS}
    every_pattern = [pattern for group in patterns.values() for pattern in group]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", allow_patterns=every_pattern))
    except LocalEntryNotFoundError as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DataError(
            f"Hugging Face {repo}: not whole in the cache {constants.HF_HUB_CACHE}, and the hub "
            f"cannot be reached{offline}; connect to the network, unset HF_HUB_OFFLINE, or point "
            f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}` has filled"
        ) from error
    except Exception as error:
        raise DataError(f"Hugging Face {repo}: cannot be downloaded ({_reason(error)})") from error
    for suffix, group in patterns.items():  # a repository may offer the same rows in two formats
        if files := sorted(path for pattern in group for path in folder.glob(pattern)):
            return _Fetched(repo, folder.name, READERS[suffix], files)
    raise DataError(
        f"Hugging Face {repo}: no {stem}.jsonl.gz, .jsonl or .parquet in {folder}; "
        f"expected Tevatron's layout; `hf download --repo-type dataset {repo}` completes the folder"
    )


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _patterns(stem: str, suffix: str) -> list[str]:
    return [f"{stem}{suffix}", f"{stem}-*{suffix}", f"data/{stem}-*{suffix}"]


def _corpus(fetched: _Fetched) -> Corpus:
    """The fetched passages; ids are checked and contents digested once for each commit."""
    table = _passage_table(_arrow(fetched.rows()), fetched.where)

    def check_and_digest(partial: Path) -> None:
        log.info("%s: checking %d passages, once", fetched.where, len(table))
        _check_passages(table, fetched.where)
        partial.write_text(Corpus(table).digest)

    digest = build_once(cache_dir() / "digests" / fetched.digest, check_and_digest).read_text()
    return Corpus(table, digest)


def _arrow(rows: Any) -> pa.Table:
    """The Arrow table under a `datasets.Dataset`, still mapped from disk."""
    return rows.with_format("arrow")[:]


def _passage_table(table: pa.Table, where: str) -> pa.Table:
    """Columns `id`, `title`, `text` as strings; only a column of another type is copied."""
    _check_columns(table.schema, PASSAGE_COLUMNS, where)
    columns = [table[name] for name in PASSAGE_COLUMNS]
    for name, column in zip(PASSAGE_COLUMNS, columns, strict=True):
        _check_type(column.type, name, where)
    passages = pa.table(columns, names=SCHEMA.names).cast(SCHEMA)
    if passages["title"].null_count:
        passages = passages.set_column(1, SCHEMA.field("title"), passages["title"].fill_null(""))
    return passages


def _check_passages(passages: pa.Table, where: str) -> None:
    for name in ("id", "text"):
        if missing := passages[name].null_count:
            raise DataError(f"{where}: {missing} of {len(passages)} passages have no {name}")
    ids = passages["id"]
    if (distinct := pc.count_distinct(ids).as_py()) != len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0]
        raise DataError(
            f"{where}: {len(ids) - distinct} passages repeat an id (such as {repeated.as_py()!r})"
        )


def _check_columns(schema: pa.Schema, expected: Sequence[str], where: str) -> None:
    missing = [name for name in expected if name not in schema.names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(schema.names)}, "
            f"expected {', '.join(expected)}"
        )


def _check_type(got: pa.DataType, name: str, where: str) -> None:
    """Text everywhere; an id may be a whole number, and a title is null where no row has one."""
    text = pa.types.is_string(got) or pa.types.is_large_string(got)
    number = name.endswith("id") and pa.types.is_integer(got)
    untitled = name == "title" and pa.types.is_null(got)
    if not (text or number or untitled):
        raise DataError(f"{where}: column {name} holds {got}, expected strings")


def _check_examples(table: pa.Table, where: str) -> None:
    _check_columns(table.schema, EXAMPLE_COLUMNS, where)
    for name in ("query_id", "query"):
        _check_type(table.schema.field(name).type, name, where)
    for name in ("positive_passages", "negative_passages"):
        _check_passage_lists(table[name], f"{where}, {name}")


def _check_passage_lists(lists: pa.ChunkedArray, where: str) -> None:
    is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
    item = lists.type.value_type if is_list else None
    if item is not None and pa.types.is_null(item):
        return  # no row has a passage
    if item is None or not pa.types.is_struct(item):
        raise DataError(f"{where}: holds {lists.type}, expected lists of passages")
    fields = pa.schema(list(item))
    _check_columns(fields, PASSAGE_COLUMNS, where)
    for name in PASSAGE_COLUMNS:
        _check_type(fields.field(name).type, name, where)
    passages = pc.list_flatten(lists)
    for name in ("docid", "text"):
        if missing := pc.struct_field(passages, name).null_count:
            raise DataError(f"{where}: {missing} of {len(passages)} passages have no {name}")


def _usable_rows(table: pa.Table, where: str) -> np.ndarray:
    """Rows with a query and a positive passage, `(n_usable,) int64`; the others are counted."""
    asked = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(table["query"])), 0)
    answered = pc.greater(pc.list_value_length(table["positive_passages"]), 0)
    has_query, has_positive = (
        mask.fill_null(False).combine_chunks().to_numpy(zero_copy_only=False)
        for mask in (asked, answered)
    )
    kept = np.flatnonzero(has_query & has_positive)
    problems = f"{(~has_query).sum()} without a query, {(~has_positive).sum()} without a positive"
    if len(kept) == 0:
        raise DataError(f"{where}: none of {len(table)} rows can be trained on: {problems}")
    if len(kept) < len(table):
        left_out = len(table) - len(kept)
        log.warning("%s: left out: %d of %d rows (%s)", where, left_out, len(table), problems)
    return kept


def _passage(record: Mapping[str, Any]) -> Passage:
    return Passage(str(record["docid"]), record["title"] or "", record["text"])
