"""Training examples in a file or folder of the user's, in any of the known layouts."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.catalogue import POOL_PREFIX
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.dpr import dpr_example, dpr_example_with_others
from mlflow_dr.collection.examples import CachedExamples, RawExample, cached_examples
from mlflow_dr.collection.formats import check_split
from mlflow_dr.collection.jsonl import (
    SUFFIXES,
    Record,
    check_complete,
    check_id,
    fields_of,
    identifier,
    json_lines,
    named_files,
    optional_text,
    read_records,
    state_of,
    text,
)
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.collection.tevatron import id_example, plain_example, tevatron_example
from mlflow_dr.errors import DataError, UsageError, quoted
from mlflow_dr.files import LONGEST_LINE, bounded_lines, opened

log = logging.getLogger(__name__)

TRAIN = re.compile(r"(^|[._-])train", re.IGNORECASE)
OTHER = re.compile(
    r"(^|[._-])(corpus|psgs|queries|dev|valid|validation|val|test|eval)([._\d-]|$)", re.IGNORECASE
)


class TrainingFiles:
    """A collection that has training examples and nothing that is judged.

    The layout is recognised by the first record's fields: Tevatron's, with passages, with ids or
    tokenised, or DPR's. Ids are looked up in the file of passages beside the examples, else in the
    corpus that the caller gives.

    Args:
        path: a file, or a folder whose files are read in the order of their names.
        corpus: has the passages that ids name where no file beside the examples does.
        others: whether negatives that are not hard are read, too.
    """

    splits: Sequence[str] = ()

    def __init__(
        self, path: Path, corpus: Callable[[], Corpus] | None = None, others: bool = False
    ) -> None:
        self._path = path
        self._given = corpus
        self._others = others
        self.name = str(path)
        self.source = f"{'folder' if path.is_dir() else 'file'} {path}"

    def corpus(self) -> Corpus:
        """The passages that the examples' are rows of."""
        return self.examples().passages

    def topics(self, split: str) -> Topics:
        """Nothing is judged here.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} has training examples and no judged queries, so no split {split!r}"
        )

    def examples(self) -> CachedExamples:
        """The training examples.

        Raises:
            DataError: a malformed record, with file:line; no known layout; no usable record; or
                no corpus to look up ids in.
        """
        return self._examples

    def with_others(self) -> TrainingFiles:
        """The same files, read with negatives that are not hard."""
        return TrainingFiles(self._path, self._given, others=True)

    @cached_property
    def _examples(self) -> CachedExamples:
        files = training_files(self._path)
        layout = layout_of(files)
        if self._others:
            if layout.with_others is None:
                raise UsageError(
                    f"{self._path}: files in the layout {layout.name} have no negatives but hard "
                    "ones; leave out --other_negatives"
                )
            layout = layout._replace(name=f"{layout.name} others", example=layout.with_others)
        key = "\n".join([layout.name, *map(state_of, files)])
        corpus = self._corpus_of_ids() if layout.by_id else None
        return cached_examples(key, raw_examples(files, layout), str(self._path), corpus)

    def _corpus_of_ids(self) -> Corpus:
        folder = self._path if self._path.is_dir() else self._path.parent
        if beside := corpus_beside(folder):
            return corpus_of_file(beside)
        if self._given:
            return self._given()
        raise DataError(
            f"{self._path}: its records name passages by id, and {folder} has no corpus.jsonl "
            "(nor .gz, nor psgs*.tsv) to look them up in; put the passages there, or name the "
            "collection that has them"
        )


def training_files(path: Path) -> list[Path]:
    """The files of training examples: the path itself, or those of a folder, by name.

    In a folder these are the files with `train` at the start of a part of their name
    (`nq-train.json`), else all but those of passages, of queries and of other splits
    (`nq-dev.json`, `test.jsonl`).

    Raises:
        DataError: there are none.
    """
    if not path.is_dir():
        return [path]
    files = named_files(path)
    chosen = _chosen(files)
    check_complete(chosen)
    if not chosen:
        there = f"only {', '.join(file.name for file in files)}" if files else "none"
        raise DataError(
            f"{path}: expected files of training examples ({', '.join(SUFFIXES)}), there are "
            f"{there}; name the file itself to train on it"
        )
    names = ", ".join(file.name for file in chosen)
    log.info("%s: of %d files these are read: %s", path, len(files), names)
    return chosen


def has_training_files(folder: Path) -> bool:
    """Whether a folder has files that `training_files` would choose."""
    return bool(_chosen(named_files(folder, warn=False)))


def _chosen(files: Sequence[Path]) -> list[Path]:
    others = {file for file in files if OTHER.search(file.name)}
    train = [file for file in files if TRAIN.search(file.name)]
    plain = [file for file in train if file not in others]  # no `train_queries.jsonl`
    return plain or train or [file for file in files if file not in others]


class Layout(NamedTuple):
    """How the records of a file are laid out.

    Attributes:
        name: what people call it.
        fields: those that it needs, for messages.
        mark: the field that no other layout has.
        by_id: whether its passages are ids, to be looked up in a corpus.
        example: a record, its index in the source and its place -> a raw example.
        with_others: the same with DPR's `negative_ctxs`; None for a layout without them.
    """

    name: str
    fields: str
    mark: str
    by_id: bool
    example: Callable[[Record, int, str], RawExample]
    with_others: Callable[[Record, int, str], RawExample] | None = None


LAYOUTS = (
    Layout(
        "Tevatron",
        "query, positive_passages",
        "positive_passages",
        False,
        tevatron_example,
    ),
    Layout(
        "Tevatron by id",
        "query_text, positive_document_ids",
        "positive_document_ids",
        True,
        id_example,
    ),
    Layout("Tevatron tokenised", "query, positives", "positives", False, plain_example),
    Layout(
        "DPR",
        "question, positive_ctxs",
        "positive_ctxs",
        False,
        dpr_example,
        dpr_example_with_others,
    ),
)


def recognised(record: Record) -> Layout | None:
    """The layout that a record is in; None for an unknown one."""
    return next((layout for layout in LAYOUTS if layout.mark in record), None)


def layout_of(files: Sequence[Path]) -> Layout:
    """The layout of the first record that these files hold.

    Raises:
        DataError: they hold none, or its fields are of no known layout; or the file is damaged.
    """
    for file in files:
        for where, record in read_records(file):
            if layout := recognised(record):
                return layout
            known = "; ".join(f"{layout.name} ({layout.fields})" for layout in reversed(LAYOUTS))
            raise DataError(
                f"{where}: a record with the fields {fields_of(record)}; training "
                f"examples have those of one of: {known}"
            )
    raise DataError(f"{', '.join(map(str, files))}: no records; expected training examples")


def raw_examples(files: Sequence[Path], layout: Layout) -> Iterator[RawExample]:
    """The records of all files, in order, numbered from 0 through all of them.

    Raises:
        DataError: a file is damaged or a record not in this layout, with file:line.
    """
    indexes = count()
    for file in files:
        for where, record in read_records(file):
            if layout.mark not in record:
                raise DataError(
                    f"{where}: no {layout.mark!r}, which the records before it have; it has "
                    f"{fields_of(record)}"
                )
            yield layout.example(record, next(indexes), where)


ID_FIELDS = ("_id", "docid", "document_id", "id")
TEXT_FIELDS = ("text", "document_text")
DPR_COLUMNS = ["id", "text", "title"]


def corpus_of_file(path: Path) -> Corpus:
    """The passages of a file, read once and then mapped from the user's cache.

    `.tsv` and `.tsv.gz` are read as DPR's table `id, text, title` (quoted as its `psgs_w100.tsv`
    is), everything else as JSON lines of `_id` or `docid`, `title`, `text`.

    Raises:
        DataError: a malformed line or a repeated id, with file:line.
    """
    table = path.name.removesuffix(".gz").endswith(".tsv")
    read = _dpr_passages if table else _json_passages
    return cached_corpus(f"passages:{state_of(path)}", _unique(path, read(path)))


def corpus_beside(folder: Path) -> Path | None:
    """The file of passages in a folder: `corpus.jsonl`, or DPR's `psgs*.tsv`; None without one.

    Raises:
        DataError: it has several of DPR's tables.
    """
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        if os.path.lexists(folder / name):  # a link that leads nowhere is refused when it is read
            return folder / name
    tables = sorted([*folder.glob("psgs*.tsv"), *folder.glob("psgs*.tsv.gz")])
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{folder}: which of {names} has the passages? Leave one of them there")
    return tables[0] if tables else None


def _unique(path: Path, passages: Iterator[tuple[int, Passage]]) -> Iterator[Passage]:
    """All passages; an error that names both lines when an id is used twice."""
    seen: dict[str, int] = {}
    for number, passage in passages:
        if (first := seen.setdefault(passage.id, number)) != number:
            raise DataError(
                f"{path}:{number}: passage id {quoted(passage.id)} was used on line {first} already"
            )
        yield passage
    if not seen:
        raise DataError(f"{path}: the corpus has no passages")


def _json_passages(path: Path) -> Iterator[tuple[int, Passage]]:
    id_field = text_field = ""
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        if not id_field:
            id_field, text_field = _field(record, ID_FIELDS), _field(record, TEXT_FIELDS)
        passage_id = identifier(record, id_field, where)
        title = optional_text(record, "title", where)
        yield number, Passage(passage_id, title, text(record, text_field, where))


def _field(record: Record, names: Sequence[str]) -> str:
    return next((name for name in names if name in record), names[0])


def _dpr_passages(path: Path) -> Iterator[tuple[int, Passage]]:
    """Rows as DPR's own reader has them, each with the line on which it begins."""
    csv.field_size_limit(LONGEST_LINE)
    number = 0
    with opened(path) as file:
        lines = (line.decode() for _, line in bounded_lines(path, file))
        rows = csv.reader(lines, delimiter="\t")
        try:
            for row in rows:
                first, number = number + 1, rows.line_num
                where = f"{path}:{first}"
                if number > first and any("\t" in cell and "\n" in cell for cell in row):
                    raise DataError(
                        f"{where}: a quotation mark is not closed on this line: what is quoted "
                        f'goes on to line {number}; double each " in the text (""), and quote it'
                    )
                if not row or row[0] == DPR_COLUMNS[0]:
                    continue
                if len(row) != len(DPR_COLUMNS) or not row[0]:
                    raise DataError(
                        f"{where}: {len(row)} columns, the first of them {quoted(row[0])}; "
                        f"expected {', '.join(DPR_COLUMNS)}, separated by tabs"
                    )
                passage_id, content, title = row
                yield first, Passage(check_id(passage_id, where), title, content)
        except csv.Error as error:
            raise DataError(
                f"{path}:{number + 1}: cannot be read ({error}); a quotation mark on this line may "
                "not be closed"
            ) from error
        except UnicodeDecodeError as error:
            line = rows.line_num + 1
            raise DataError(f"{path}:{line}: cannot be read ({error.reason})") from error


SPLIT = "dev"


class PassagePool:
    """A collection of the questions, positives and negatives of training examples.

    Args:
        path: a file of training examples, or a folder of such files.
    """

    splits: Sequence[str] = (SPLIT,)

    def __init__(self, path: Path) -> None:
        self._files = TrainingFiles(path)
        self.name = f"{POOL_PREFIX}{path}"
        self.source = f"questions and passages of {self._files.source}"

    def corpus(self) -> Corpus:
        """All passages of all examples."""
        return self.examples().passages

    def topics(self, split: str) -> Topics:
        """The questions; all positives of a question are relevant.

        Of examples with one id and one text, the positives are put together; with another text the
        id gets the example's number.

        Raises:
            UsageError: another split than `dev`.
        """
        check_split(self, split)
        return self._topics

    @cached_property
    def _topics(self) -> Topics:
        examples = self.examples()
        queries: dict[str, Query] = {}
        qrels: dict[str, dict[str, int]] = {}
        for number in range(len(examples)):
            query, positives = examples[number][:2]
            known = queries.get(query.id)
            if known is not None and (known.text, known.tokens) != (query.text, query.tokens):
                query = query._replace(id=f"{query.id}#{number}")
            queries[query.id] = query
            judged = qrels.setdefault(query.id, {})
            judged |= {passage.id: 1 for passage in examples.passages.passages(positives)}
        return Topics(list(queries.values()), qrels)

    def examples(self) -> CachedExamples:
        """The examples themselves."""
        return self._files.examples()


def passage_pool(name: str) -> PassagePool:
    """The collection that `pool:FILE` names.

    Raises:
        UsageError: there is no such file.
    """
    path = Path(name.removeprefix(POOL_PREFIX)).expanduser()
    if not name.removeprefix(POOL_PREFIX) or not path.exists():
        raise UsageError(f"{name}: no such file; expected {POOL_PREFIX}FILE with training examples")
    return PassagePool(path.resolve())
