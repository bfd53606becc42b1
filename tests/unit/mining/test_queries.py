"""What is mined for, and what is never a negative."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import TOKENISED_SCHEMA, Corpus
from mlflow_dr.collection.records import Example, Query
from mlflow_dr.errors import DataError
from mlflow_dr.mining.rule import ExcludedPassages, MiningQueries, mining_queries


class Given:
    """Training examples from a list."""

    digest = "given"

    def __init__(self, passages: Corpus, examples: Iterable[tuple[Query, Sequence[int]]]) -> None:
        self.passages = passages
        none = np.empty(0, np.int64)
        self._examples = [Example(q, np.array(rows, np.int64), none) for q, rows in examples]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def corpus_of(*passages: tuple[str, str, str]) -> Corpus:
    ids, titles, texts = zip(*passages, strict=True)
    return Corpus(pa.table({"id": ids, "title": titles, "text": texts}))


@pytest.fixture
def corpus() -> Corpus:
    return corpus_of(
        ("p0", "Ports", "the harbour"),
        ("p1", "Ships", "the harbour "),  # p0's text
        ("p2", "Ports", "the ferry"),
        ("q2", "", "the pilot"),
        ("p4", "Kelp", ""),
        ("p5", "Kelp", " "),  # p4's, which is a title only
        ("p6", "", "Kelp"),
        ("p7", "Ports", "The harbour"),
    )


def excluded(corpus: Corpus, examples: Given, judged: Iterable[Example] = ()) -> list[list[int]]:
    found = ExcludedPassages(mining_queries(examples, corpus), corpus, judged)
    rows = list(range(len(corpus)))
    places = [found.mask(index, rows) for index in range(len(examples))]
    return [[row for row in rows if flags[row]] for flags in places]


def test_positives_and_passages_of_the_same_text(corpus: Corpus) -> None:
    examples = Given(corpus, [(Query("a", "one"), [0]), (Query("b", "two"), [2, 4])])
    assert excluded(corpus, examples) == [[0, 1], [2, 4, 5, 6]]


def test_positives_of_other_examples_with_the_same_id_or_text(corpus: Corpus) -> None:
    examples = Given(
        corpus,
        [
            (Query("a", "one"), [0]),
            (Query("b", "one "), [2]),
            (Query("b", "another"), [7]),
            (Query("c", "three"), [3]),
        ],
    )
    assert excluded(corpus, examples) == [[0, 1, 2], [0, 1, 2, 7], [2, 7], [3]]


def test_other_relevant_passages_are_excluded(corpus: Corpus) -> None:
    examples = Given(corpus, [(Query("a", "one"), [3]), (Query("b", "two"), [3])])
    judged = Given(corpus, [(Query("a", "one"), [2, 7]), (Query("z", "two"), [0])])
    assert excluded(corpus, examples, judged._examples) == [[2, 3, 7], [0, 1, 3]]


def test_the_passage_with_the_querys_own_id(corpus: Corpus) -> None:
    examples = Given(corpus, [(Query("q2", "one"), [2]), (Query("q3", "two"), [2])])
    assert excluded(corpus, examples) == [[2, 3], [2]]


def test_rows_in_any_order_and_number(corpus: Corpus) -> None:
    found = ExcludedPassages(
        mining_queries(Given(corpus, [(Query("a", "one"), [0])]), corpus), corpus, ()
    )
    assert found.mask(0, [7, 1, 2, 0]) == [False, True, False, True]
    assert found.mask(0, []) == []


def test_tokenised_texts_are_accepted() -> None:
    rows = [
        {"id": str(number), "title": "", "text": "", "tokens": tokens}
        for number, tokens in enumerate(([1, 2], [1, 2], [3]))
    ]
    corpus = Corpus(pa.Table.from_pylist(rows, TOKENISED_SCHEMA))
    examples = Given(corpus, [(Query("a", "", tokens=[5]), [0]), (Query("b", "", tokens=[6]), [2])])
    # both queries have no text, which does not make them the same query
    assert excluded(corpus, examples) == [[0, 1], [2]]


def test_positives_of_another_corpus_are_found_by_id(corpus: Corpus) -> None:
    inline = corpus_of(("p2", "", "other words"), ("new", "", "x"), ("p0", "", "y"))
    examples = Given(
        inline,
        [
            (Query("a", "one"), [2, 0]),
            (Query("b", "two"), [1]),
            (Query("c", "three"), [1, 2]),
            (Query("d", " "), [0]),
        ],
    )
    found = mining_queries(examples, corpus)
    assert [query.id for query in found.queries] == ["a", "c"]
    assert [rows.tolist() for rows in found.positives] == [[0, 2], [0]]
    assert (found.unknown, found.left_out) == (2, 2)


def test_an_equal_corpus_counts_as_the_same_corpus(corpus: Corpus) -> None:
    again = Corpus(corpus._table)
    found = mining_queries(Given(again, [(Query("a", "one"), [3])]), corpus)
    assert isinstance(found, MiningQueries)
    assert found.positives[0].tolist() == [3]


def test_no_queries_to_mine_for_is_an_error(corpus: Corpus) -> None:
    examples = Given(corpus_of(("new", "", "x")), [(Query("a", "one"), [0])])
    with pytest.raises(DataError, match="none of 1 training examples can be mined for"):
        mining_queries(examples, corpus)
