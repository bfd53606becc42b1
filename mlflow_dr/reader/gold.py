"""The articles that questions were made from, by DPR's file of gold passages."""

from __future__ import annotations

from pathlib import Path

from mlflow_dr.collection.results import read_gold_passages


class GoldTitles:
    """The title of the article that a question was made from.

    Args:
        path: DPR's file of gold passages; None if there is none.

    Raises:
        DataError: the file is missing, damaged, or has another layout.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._questions: dict[str, str] = {}
        self._titles: dict[str, str] = {}
        for passage in read_gold_passages(path) if path else ():
            tokens = passage.question_tokens or passage.question
            self._questions[tokens] = passage.question
            self._titles[passage.question] = self._titles[tokens] = passage.title.lower()

    def original(self, question: str) -> str:
        """The question as it was asked, where results have its tokens between blanks."""
        return self._questions.get(question, question)

    def matches(self, question: str, title: str) -> bool:
        """Whether a title is the question's, in upper or lower case."""
        return self._titles.get(question) == title.lower()
