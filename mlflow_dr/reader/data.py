"""The reader's data in Arrow: each passage once, and questions with the rows of their passages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlflow_dr.collection.results import ResultPassage
from mlflow_dr.errors import DataError
from mlflow_dr.mapped_file import MappedFile
from mlflow_dr.progress import progress_bar
from mlflow_dr.reader.sequences import SequenceBuilder

TOKENS = pa.list_(pa.int32())
PASSAGES = pa.schema(
    [
        ("id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("title_tokens", TOKENS),
        ("tokens", TOKENS),
    ]
)
QUESTIONS = pa.schema(
    [
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("tokens", TOKENS),
        ("passages", pa.list_(pa.int32())),
        ("spans", pa.list_(pa.list_(pa.int32()))),
    ]
)
PASSAGES_FILE, QUESTIONS_FILE = "passages.arrow", "questions.arrow"
ROWS_AT_A_TIME = 2048


class QuestionPassages(NamedTuple):
    """A question with its passages.

    Attributes:
        question: its text.
        answers: those that count as right.
        passages: positives first; all of them in the retriever's order, if there are no positives.
        spans: the places of answers in each positive: first and last token of the passage.
    """

    question: str
    answers: Sequence[str]
    passages: Sequence[ResultPassage]
    spans: Sequence[Sequence[tuple[int, int]]]


class ReaderQuestion(NamedTuple):
    """A question as the reader's data has it.

    Attributes:
        question: its text.
        answers: those that count as right.
        tokens: its token ids, without special tokens, `(length,) int32`.
        positives: rows of passages with spans, `(n_positives,) int32`.
        others: rows of the other passages, in the retriever's order, `(n_others,) int32`.
        spans: first and last token of each answer in each positive, `(n_spans, 2) int32`.
    """

    question: str
    answers: list[str]
    tokens: np.ndarray
    positives: np.ndarray
    others: np.ndarray
    spans: list[np.ndarray]


class PassageText(NamedTuple):
    """A passage as the retriever's results have it."""

    id: str
    title: str
    text: str


class ReaderData:
    """Questions with their passages and token ids, mapped from disk.

    Args:
        directory: what `write_reader_data` wrote.
        builder: made the token ids.
    """

    def __init__(self, directory: Path, builder: SequenceBuilder) -> None:
        self.builder = builder
        self._questions = _Rows(directory / QUESTIONS_FILE)
        self._passages = _Rows(directory / PASSAGES_FILE)

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def n_passages(self) -> int:
        """Number of different passages."""
        return len(self._passages)

    def texts(self) -> list[str]:
        """The texts of the questions."""
        return [self._questions.value("question", index) for index in range(len(self))]

    def __getitem__(self, index: int) -> ReaderQuestion:
        values = self._questions
        rows = values.numbers("passages", index)
        spans = [np.array(flat, np.int32).reshape(-1, 2) for flat in values.value("spans", index)]
        return ReaderQuestion(
            values.value("question", index),
            values.value("answers", index),
            values.numbers("tokens", index),
            rows[: len(spans)],
            rows[len(spans) :],
            spans,
        )

    def passage(self, row: int) -> PassageText:
        """The text of a passage."""
        return PassageText(*(self._passages.value(name, row) for name in PassageText._fields))

    def length(self, question: ReaderQuestion, row: int) -> int:
        """Number of tokens of a sequence."""
        return self.offset(question, row) + len(self._passages.numbers("tokens", row))

    def offset(self, question: ReaderQuestion, row: int) -> int:
        """Number of tokens before the passage."""
        return len(self._head(question, row))

    def sequence(self, question: ReaderQuestion, row: int) -> tuple[np.ndarray, int]:
        """Token ids of a question with one of its passages, `(length,) int32`, and the offset.

        The offset is the number of tokens before the passage.
        """
        head = self._head(question, row)
        tokens = self._passages.numbers("tokens", row)
        return np.concatenate([np.array(head, np.int32), tokens]), len(head)

    def _head(self, question: ReaderQuestion, row: int) -> list[int]:
        title = self._passages.numbers("title_tokens", row)
        return self.builder.head(question.tokens.tolist(), title.tolist())


class _Rows:
    """The rows of an Arrow file, mapped from disk."""

    def __init__(self, path: Path) -> None:
        mapped = MappedFile(path)
        table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped.data))).read_all()
        self._batches = table.to_batches()
        self._starts = np.cumsum([0] + [len(batch) for batch in self._batches])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def value(self, name: str, row: int) -> Any:
        """A value of a column."""
        batch, place = self._place(row)
        return batch.column(name)[place].as_py()

    def numbers(self, name: str, row: int) -> np.ndarray:
        """A list of numbers, as a view of the file."""
        batch, place = self._place(row)
        values = batch.column(name)[place].values
        return values.to_numpy(zero_copy_only=False) if len(values) else np.empty(0, np.int32)

    def _place(self, row: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._batches[number], int(row - self._starts[number])


def write_reader_data(
    directory: Path, questions: Iterable[QuestionPassages], builder: SequenceBuilder, source: Path
) -> None:
    """Write questions and their passages into a new folder.

    Args:
        directory: the folder.
        questions: what to write.
        builder: makes token ids.
        source: the file that they are from, for messages.

    Raises:
        DataError: there are no questions.
    """
    directory.mkdir()
    rows: dict[bytes, int] = {}
    written = 0
    with (
        _BatchWriter(directory / PASSAGES_FILE, PASSAGES, builder, ("title", "text")) as passages,
        _BatchWriter(directory / QUESTIONS_FILE, QUESTIONS, builder, ("question",)) as kept,
        progress_bar(None, "preparing the reader's data", "questions") as bar,
    ):
        for question in questions:
            own = []
            for passage in question.passages:
                values = (str(passage.id), passage.title or "", passage.text)
                key = hashlib.blake2b("\0".join(values).encode(), digest_size=16).digest()
                if key not in rows:
                    rows[key] = len(rows)
                    passages.add(*values)
                own.append(rows[key])
            spans = [[token for span in some for token in span] for some in question.spans]
            kept.add(question.question, question.answers, own, spans)
            written += 1
            bar.update(1)
    if not written:
        raise DataError(
            f"{source}: no question has a passage in which an answer is found, or there are no "
            "questions; check `has_answer`, and that answers are in the text and not in the title"
        )


class _BatchWriter:
    """Writes rows some thousands at a time; columns of token ids are made of texts.

    Args:
        path: the Arrow file.
        schema: its columns.
        builder: makes token ids.
        texts: the columns whose tokens are written, in the order of the columns of tokens.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, builder: SequenceBuilder, texts: Sequence[str]
    ) -> None:
        self._schema = schema
        self._builder = builder
        tokens = [field.name for field in schema if field.name.endswith("tokens")]
        self._texts = dict(zip(tokens, texts, strict=True))
        self._given = [name for name in schema.names if name not in tokens]
        self._sink = pa.OSFile(str(path), "wb")
        self._file = pa.ipc.new_file(self._sink, schema)
        self._buffer: list[tuple[Any, ...]] = []

    def add(self, *values: Any) -> None:
        """Add a row: the values of the columns that are not tokens."""
        self._buffer.append(values)
        if len(self._buffer) == ROWS_AT_A_TIME:
            self._flush()

    def __enter__(self) -> _BatchWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._sink, self._file:
            if error is None and self._buffer:
                self._flush()

    def _flush(self) -> None:
        columns: dict[str, Any] = dict(
            zip(self._given, zip(*self._buffer, strict=True), strict=True)
        )
        for name, text in self._texts.items():
            columns[name] = self._builder.bare(columns[text])
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self._file.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._buffer.clear()
