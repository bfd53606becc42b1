"""Training examples from relevance judgements."""

from __future__ import annotations

import numpy as np

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Topics
from mlflow_dr.errors import DataError
from mlflow_dr.files import digest_of


class JudgedExamples:
    """Training examples from relevance judgements: the positives are the relevant passages."""

    def __init__(self, topics: Topics, corpus: Corpus) -> None:
        self._corpus = corpus
        pairs = [
            (position, passage_id)
            for position, query in enumerate(topics.queries)
            for passage_id, relevance in topics.qrels[query.id].items()
            if relevance > 0
        ]
        if not pairs:
            raise DataError("the train split has no relevant passage; there is nothing to train on")
        positions = np.array([position for position, _ in pairs])
        self._rows = corpus.rows_of([passage_id for _, passage_id in pairs])
        kept, starts = np.unique(positions, return_index=True)
        self._queries = [topics.queries[position] for position in kept]
        self._starts = [*starts.tolist(), len(pairs)]
        texts = (query.text for query in self._queries)
        self.digest = digest_of(corpus.digest, *self._rows, *self._starts, *texts)

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> Example:
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        return Example(self._queries[index], self._corpus.passages(rows), ())
