"""DPR's files: training examples as a JSON array, and passages as a table (`psgs_w100.tsv`).

Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.jsonl import Id, answers_of, checked_id, first_id, state_of
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query, unique
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import LONGEST_LINE, bounded_lines, opened

COLUMNS = ["id", "text", "title"]


class DprPassage(msgspec.Struct):
    """A passage of a question; its `score` is not read, because it is not a teacher's."""

    text: str
    title: str | None = None
    passage_id: Id | None = None
    psg_id: Id | None = None
    id: Id | None = None


class DprRecord(msgspec.Struct):
    """A question with its passages.

    The hard negatives are the negatives; where a question has none, its `negative_ctxs` are, which
    is DPR's own fallback. Questions have no ids in this format: the record's index in the file is
    the id.
    """

    layout: ClassVar[str] = "DPR"
    fields: ClassVar[str] = "question, positive_ctxs"
    by_id: ClassVar[bool] = False

    positive_ctxs: list[DprPassage] | None
    question: str | None = None
    query_id: Id | None = None
    question_id: Id | None = None
    answers: list[str] | str | None = None
    hard_negative_ctxs: list[DprPassage] | None = None
    negative_ctxs: list[DprPassage] | None = None

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example; see `ExampleRecord`."""
        query = Query(
            first_id((self.query_id, self.question_id), location) or str(index),
            self.question or "",
            answers_of(self.answers),
        )
        positives = _passages(self.positive_ctxs, "positive_ctxs", location)
        negatives = _passages(self.hard_negative_ctxs, "hard_negative_ctxs", location)
        if not negatives:
            negatives = _passages(self.negative_ctxs, "negative_ctxs", location)
        return RawExample(location, query, positives, negatives)


class DprRecordWithOthers(DprRecord):
    """The same record; its `negative_ctxs` are also read, as negatives that are not hard."""

    layout: ClassVar[str] = "DPR others"

    def example(self, index: int, location: str) -> RawExample:
        """The record as a raw example with `others`."""
        others = _passages(self.negative_ctxs, "negative_ctxs", location)
        return DprRecord.example(self, index, location)._replace(others=others)


def _passages(passages: list[DprPassage] | None, field: str, location: str) -> list[Passage]:
    location = f"{location}: {field}"
    return [
        Passage(first_id((p.passage_id, p.psg_id, p.id), location), p.title or "", p.text)
        for p in passages or ()
    ]


def table_corpus(path: Path) -> Corpus:
    """The passages of a table `id, text, title`, read once and mapped from the user's cache.

    Raises:
        DataError: a malformed line or a repeated id, with file:line.
    """
    passages = unique("passage", lambda: _rows(path))
    return cached_corpus(f"passages:{state_of(path)}", passages, location=str(path))


def _rows(path: Path) -> Iterator[tuple[str, Passage]]:
    """The passages as DPR's own reader has them, each with the line on which it begins."""
    for location, row in tsv_rows(path):
        if row[0] == COLUMNS[0]:
            continue
        if len(row) != len(COLUMNS) or not row[0]:
            raise DataError(
                f"{location}: {len(row)} columns, the first of them {quoted(row[0])}; "
                f"expected {', '.join(COLUMNS)}, separated by tabs"
            )
        passage_id, text, title = row
        yield location, Passage(checked_id(passage_id, location), title, text)


def tsv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows of a table with tabs between its cells, each with the line on which it begins.

    A cell may be quoted (`"`), with doubled quotation marks and line ends in it.

    Raises:
        DataError: the file is missing or damaged, or a quotation mark is not closed.
    """
    csv.field_size_limit(LONGEST_LINE)
    last = 0
    with opened(path) as file:
        lines = (line.decode() for _, line in bounded_lines(path, file))
        rows = csv.reader(lines, delimiter="\t")
        try:
            for row in rows:
                first, last = last + 1, rows.line_num
                location = f"{path}:{first}"
                if last > first and any("\t" in cell and "\n" in cell for cell in row):
                    raise DataError(
                        f"{location}: a quotation mark is not closed on this line: the quoted text "
                        f'goes on to line {last}; double each " in the text (""), and quote it'
                    )
                if row:
                    yield location, row
        except csv.Error as error:
            raise DataError(
                f"{path}:{last + 1}: cannot be read ({error}); a quotation mark on this line may "
                "not be closed"
            ) from error
        except UnicodeDecodeError as error:
            line = rows.line_num + 1
            raise DataError(f"{path}:{line}: cannot be read ({error.reason})") from error
