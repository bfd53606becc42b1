"""Collections for question answering: passages, and questions with answers instead of judgements.

Layout: Karpukhin et al., Dense Passage Retrieval for Open-Domain Question Answering, EMNLP 2020.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mlflow_dr.collection.catalogue import Examples, check_split
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.downloads import fetched
from mlflow_dr.collection.locations import absolute, quoted_path, unquoted_path
from mlflow_dr.collection.questions import read_questions
from mlflow_dr.collection.records import Topics
from mlflow_dr.collection.training_files import (
    TrainingFiles,
    corpus_of_file,
    has_training_files,
    passages_beside,
)
from mlflow_dr.errors import DataError, UsageError

log = logging.getLogger(__name__)

PREFIX = "dpr:"
SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".tsv", ".csv", ".jsonl", ".json") for packed in ("", ".gz")
)
QUESTIONS = re.compile(r"qas|\.qa\.|(^|[._-])qa([._-]|$)", re.IGNORECASE)
SPLITS = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "test": "test"}

File = Callable[[], Path]
"""The path of a file, which is fetched first where that is needed."""


class QuestionCollection:
    """Passages, and a split of questions with answers for each file of questions.

    Args:
        name: what `open_collection` opens again.
        source: where it comes from, as text for people.
        passages: the file of passages.
        questions: the file of questions of each split.
        training: the file or folder of training examples, if there is one.
    """

    def __init__(
        self,
        name: str,
        source: str,
        passages: File,
        questions: Mapping[str, File],
        training: File | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.splits: Sequence[str] = list(questions)
        self._passages = passages
        self._questions = questions
        self._training = training

    def corpus(self) -> Corpus:
        """The passages.

        Raises:
            DataError: a malformed line or a repeated id, with file:line.
        """
        return self._corpus

    def passages_file(self) -> Path:
        """The file of passages; it is fetched first where that is needed."""
        return self._passages()

    @property
    def has_examples(self) -> bool:
        """Whether there are training examples."""
        return self._training is not None

    @cached_property
    def _corpus(self) -> Corpus:
        return corpus_of_file(self._passages())

    def topics(self, split: str) -> Topics:
        """The questions of a split, without judgements; a warning counts those without text.

        Raises:
            UsageError: there is no such split.
            DataError: the file of questions is malformed, with file:line.
        """
        check_split(self, split)
        path = self._questions[split]()
        queries = read_questions(path)
        kept = [query for query in queries if query.text.strip()]
        if not kept:
            raise DataError(f"{path}: none of {len(queries)} questions has text")
        if len(kept) < len(queries):
            log.warning("%s: left out: %d questions have no text", path, len(queries) - len(kept))
        if unanswered := [query.text for query in kept if not query.answers]:
            log.warning(
                "%s: %d questions have no answers, so that no passage holds one (such as %r)",
                *(path, len(unanswered), unanswered[0]),
            )
        return Topics(kept, {})

    def examples(self) -> Examples:
        """The training examples.

        Raises:
            UsageError: the collection has none.
            DataError: a malformed record, with file:line.
        """
        if self._training is None:
            raise UsageError(
                f"{self.name} has questions and passages and no training examples; training needs "
                "another dataset, or --train_dir"
            )
        return TrainingFiles(self._training(), self.corpus).examples()


def question_files(folder: Path) -> list[Path]:
    """The files of questions in a folder, by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.endswith(SUFFIXES) and QUESTIONS.search(path.name) and path.is_file()
    )


def question_folder(folder: Path) -> QuestionCollection:
    """The collection of a folder with DPR's table of passages and files of questions.

    Raises:
        DataError: it has several tables of passages, or none.
    """
    passages = passages_beside(folder)
    if passages is None:
        raise DataError(f"{folder}: no psgs*.tsv there; a collection needs passages")
    training = (lambda: folder) if has_training_files(folder) else None
    questions = _by_split(question_files(folder))
    source = f"folder {folder}"
    return QuestionCollection(str(folder), source, lambda: passages, questions, training)


def question_location(location: str) -> QuestionCollection:
    """The collection of a folder, or of a location `psgs_w100.tsv?queries=nq-dev.csv,nq-test.csv`.

    Passages without questions (`psgs_w100.tsv`) can be encoded, and have no split.
    Characters of a path that have a meaning there are written as in a URL (`%2C` for a comma).

    Raises:
        UsageError: the location is not of this form, or a file does not exist.
    """
    if absolute(Path(location)).is_dir():
        return question_folder(absolute(Path(location)))
    passages_text, mark, listed = location.partition("?")
    if passages_text and not mark:
        return _passages_alone(absolute(unquoted_path(passages_text)))
    parts = [part.partition("=") for part in listed.split("&")]
    files = [name for key, _, names in parts if key == "queries" for name in names.split(",")]
    if not passages_text or any(key != "queries" for key, _, _ in parts) or not all(files):
        raise UsageError(
            f"dataset {PREFIX + location!r}: expected {PREFIX}PASSAGES?queries=FILE[,FILE], or a "
            "folder with psgs*.tsv and files of questions (*qas*)"
        )
    passages = absolute(unquoted_path(passages_text))
    paths = [absolute(unquoted_path(name)) for name in files]
    if missing := [path for path in (passages, *paths) if not path.is_file()]:
        raise UsageError(f"{missing[0]}: no such file")
    queries = ",".join(map(quoted_path, paths))
    name = f"{PREFIX}{quoted_path(passages)}?queries={queries}"
    source = f"passages {passages}; questions {', '.join(map(str, paths))}"
    return QuestionCollection(name, source, lambda: passages, _by_split(paths))


def _passages_alone(passages: Path) -> QuestionCollection:
    if not passages.is_file():
        raise UsageError(f"{passages}: no such file")
    source = f"passages {passages}"
    return QuestionCollection(PREFIX + quoted_path(passages), source, lambda: passages, {})


def _by_split(files: Sequence[Path]) -> dict[str, File]:
    """The files by split: the usual one that each names (`nq-dev.qa.csv`), else their stems.

    Raises:
        UsageError: two files would be one split.
    """
    names = [_usual_split(_stem(path)) for path in files]
    if len(set(names)) < len(names) or None in names:
        names = [_stem(path) for path in files]
    by_split: dict[str, File] = {}
    for name, path in zip(names, files, strict=True):
        if str(name) in by_split:
            raise UsageError(
                f"two files of questions are called {name!r}, and a split has the name of its "
                "file; rename one of them"
            )
        by_split[str(name)] = lambda path=path: path  # type: ignore[misc]
    return by_split


def _usual_split(stem: str) -> str | None:
    found = {SPLITS[part] for part in re.split(r"[._-]", stem.lower()) if part in SPLITS}
    return found.pop() if len(found) == 1 else None


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    return path.name.removesuffix(suffix)


PASSAGES_URL = "https://dl.fbaipublicfiles.com/dpr/wikipedia_split/psgs_w100.tsv.gz"
FILES_URL = "https://dl.fbaipublicfiles.com/dpr/data/retriever/"


def published(name: str, questions: Sequence[str], training: str) -> QuestionCollection:
    """A data set as DPR publishes it, fetched when it is first read.

    Args:
        name: of the data set.
        questions: files of questions, under the names that they were published with.
        training: the file of training examples.
    """

    def file(url: str) -> File:
        return lambda: fetched(url)

    by_split = _by_split([Path(question) for question in questions])
    return QuestionCollection(
        name,
        f"DPR's published files {', '.join(questions)}, {training} and psgs_w100.tsv.gz",
        file(PASSAGES_URL),
        {
            split: file(FILES_URL + question)
            for split, question in zip(by_split, questions, strict=True)
        },
        file(FILES_URL + training),
    )


def nq() -> QuestionCollection:
    """Natural Questions with open-domain answers.

    Source: Kwiatkowski et al., Natural Questions: A Benchmark for Question Answering Research,
    TACL 2019; Lee et al., Latent Retrieval for Weakly Supervised Open Domain Question Answering,
    ACL 2019.
    """
    return published("nq", ("nq-dev.qa.csv", "nq-test.qa.csv"), "biencoder-nq-train.json.gz")


def trivia() -> QuestionCollection:
    """TriviaQA, unfiltered.

    Source: Joshi et al., TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading
    Comprehension, ACL 2017.
    """
    files = ("trivia-dev.qa.csv.gz", "trivia-test.qa.csv.gz")
    return published("trivia", files, "biencoder-trivia-train.json.gz")
