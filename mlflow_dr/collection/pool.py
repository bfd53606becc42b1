"""`pool:FILE`: the questions of a file of training examples, judged on the file's own passages.

DPR's development files are such: each question has its positives, and the passages of all questions
together are what is searched. It is cheap, and easier than the whole corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from mlflow_dr.collection.catalogue import POOL_PREFIX
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.examples import CachedExamples
from mlflow_dr.collection.interface import check_split
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.collection.training_files import TrainingFiles
from mlflow_dr.errors import UsageError

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
