"""Files of passages: JSON lines in BEIR's or Tevatron's field names, and DPR's table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.fields import check_id, identifier, optional_text, text
from mlflow_dr.collection.recordfiles import Record, json_lines, state_of
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import LONGEST_LINE, bounded_lines, opened

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
