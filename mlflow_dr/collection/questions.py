"""Files of questions with short answers: DPR's tables, JSON lines, KILT's and TriviaQA's records.

A table has a question and its answers, a Python list of strings, in each row, separated by a tab,
and no header. Layouts: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question
Answering, EMNLP 2020; Petroni et al., KILT: a Benchmark for Knowledge Intensive Language Tasks,
NAACL 2021; Joshi et al., TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading
Comprehension, ACL 2017.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlflow_dr.collection.dpr import tsv_rows
from mlflow_dr.collection.jsonl import Id, answers_of, checked_id, fields_of, first_id, read_records
from mlflow_dr.collection.records import Query, unique
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import opened

TABLES = (".tsv", ".csv", ".tsv.gz", ".csv.gz")
COLUMNS = 2
TRIVIA = re.compile(rb'\s*\{\s*"Data"\s*:\s*\[')
HEAD = 1024


class KiltOutput(msgspec.Struct):
    """One output of a KILT record; one without an answer only names pages."""

    answer: str | None = None


class QuestionRecord(msgspec.Struct):
    """A question with its answers, or KILT's `input` and `output`."""

    question: str | None = None
    input: str | None = None
    answers: list[str] | str | None = None
    answer: list[str] | str | None = None
    output: list[KiltOutput] | None = None
    id: Id | None = None
    question_id: Id | None = None
    query_id: Id | None = None

    def query(self, index: int, location: str) -> Query:
        """The question; without an id, its index in the file is the id.

        Raises:
            DataError: it has no question, or no field of answers.
        """
        text = self.input if self.question is None else self.question
        answers = self.answer if self.answers is None else self.answers
        if answers is None and self.output is not None:
            answers = [output.answer for output in self.output if output.answer is not None]
        if text is None or answers is None:
            given = {key: True for key, value in msgspec.structs.asdict(self).items() if value}
            raise DataError(
                f"{location}: expected question and answers, or KILT's input and output; of these "
                f"fields it has {fields_of(given)}"
            )
        query_id = first_id((self.id, self.question_id, self.query_id), location)
        return Query(query_id or str(index), text, tuple(dict.fromkeys(answers_of(answers))))


class TriviaAnswer(msgspec.Struct, rename="pascal"):
    """An answer with its other spellings."""

    value: str
    aliases: list[str] = []


class TriviaQuestion(msgspec.Struct, rename="pascal"):
    """A question of TriviaQA; those of its test set have no answer."""

    question: str
    question_id: str
    answer: TriviaAnswer | None = None


class TriviaFile(msgspec.Struct, rename="pascal"):
    """A file of TriviaQA."""

    data: list[TriviaQuestion]


def read_questions(path: Path) -> list[Query]:
    """The questions of a file with their answers, in order.

    Args:
        path: a table if its name ends in `.tsv` or `.csv`, else JSON lines, a JSON array, or a file
            of TriviaQA (`{"Data": [...]}`); each also as `.gz`.

    Raises:
        DataError: no such file, a malformed record, answers that are no list of strings, an id that
            is used twice, or no question at all.
    """

    def read() -> Iterator[tuple[str, Query]]:
        if path.name.endswith(TABLES):
            yield from _table_questions(path)
            return
        if _is_of_trivia(path):
            yield from _trivia_questions(path)
            return
        for index, (location, record) in enumerate(read_records(path, QuestionRecord)):
            yield location, record.query(index, location)

    queries = list(unique("question", read))
    if not queries:
        raise DataError(f"{path}: the file has no questions")
    return queries


def _table_questions(path: Path) -> Iterator[tuple[str, Query]]:
    for index, (location, row) in enumerate(tsv_rows(path)):
        if len(row) != COLUMNS:
            raise DataError(
                f"{location}: {len(row)} columns, the first of them {quoted(row[0])}; expected a "
                "question and a list of its answers, separated by a tab"
            )
        yield location, Query(str(index), row[0], parse_answers(row[1], location))


def _is_of_trivia(path: Path) -> bool:
    with opened(path) as file:
        return TRIVIA.match(file.read(HEAD)) is not None


def _trivia_questions(path: Path) -> Iterator[tuple[str, Query]]:
    with opened(path) as file:
        raw = file.read()
    try:
        records = msgspec.json.decode(raw, type=TriviaFile).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: no file of TriviaQA ({error})") from error
    for index, record in enumerate(records):
        answer = record.answer
        answers = [answer.value, *answer.aliases] if answer else []
        location = f"{path}: Data[{index}]"
        query_id = checked_id(record.question_id, location)
        yield location, Query(query_id, record.question, tuple(dict.fromkeys(answers)))


def parse_answers(text: str, location: str) -> tuple[str, ...]:
    """The strings of a Python list, such as `['1889', "Eiffel's tower"]`, each once.

    Raises:
        DataError: it is something else; code in it is not run.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise DataError(
            f"{location}: the answers {quoted(text)} are no list of strings; expected such as "
            "['1889', 'March 1889']"
        )
    return tuple(dict.fromkeys(value))
