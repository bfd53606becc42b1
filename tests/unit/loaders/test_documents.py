"""The passages that a study loads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.loaders.documents import (
    WORDS_PER_PASSAGE,
    check_stores,
    enlarged,
    tiny_encoder_directory,
    write_sampled_rows,
)
from mlflow_dr.stores.store import DocumentStore, open_store, store_directory


@pytest.fixture
def corpus() -> Corpus:
    passages = [Passage(f"p{n}", f"title {n}", f"gulls eat {n} fish") for n in range(20)]
    return cached_corpus("corpus of the loader study's tests", passages)


def test_generated_passages_follow_the_real_ones(corpus: Corpus) -> None:
    larger = enlarged(corpus, 50, seed=0)
    assert len(larger) == 50
    assert larger.passages(range(20)) == corpus.passages(range(20))
    assert len(set(larger.ids.to_pylist())) == 50
    words = larger[49].text.split()
    assert len(words) == WORDS_PER_PASSAGE
    assert set(words) <= {word for n in range(20) for word in corpus[n].text.split()}
    assert larger.digest == enlarged(corpus, 50, seed=0).digest
    assert larger.digest != enlarged(corpus, 50, seed=1).digest


def test_generated_ids_are_new_even_if_the_corpus_has_such_ids(corpus: Corpus) -> None:
    twice = enlarged(enlarged(corpus, 30, seed=0), 40, seed=0)
    assert len(set(twice.ids.to_pylist())) == 40


def test_nothing_is_generated_for_the_number_that_is_there(corpus: Corpus) -> None:
    assert enlarged(corpus, None, seed=0) is corpus
    assert enlarged(corpus, 20, seed=0) is corpus


def test_fewer_passages_than_there_are_are_refused(corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="the dataset has 20"):
        enlarged(corpus, 19, seed=0)


def test_passages_of_token_ids_are_refused() -> None:
    tokens = cached_corpus("tokens of the loader study", [Passage("p", "", "", [1, 2])])
    with pytest.raises(UsageError, match="token ids"):
        enlarged(tokens, None, seed=0)


def test_a_dataset_without_words_cannot_be_enlarged() -> None:
    empty = cached_corpus("no words in the loader study", [Passage("p", "", " ")])
    with pytest.raises(DataError, match="no words"):
        enlarged(empty, 10, seed=0)


def test_rows_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    rows = np.load(write_sampled_rows(tmp_path, 7, 100, seed=3))
    assert rows.dtype == np.int64
    assert set(rows.tolist()) == set(range(7))
    assert (np.load(write_sampled_rows(tmp_path, 7, 100, seed=3)) == rows).all()


def test_the_tiny_encoder_is_made_once(corpus: Corpus) -> None:
    directory = tiny_encoder_directory(corpus, 16)
    before = (directory / "model.safetensors").stat()
    assert tiny_encoder_directory(corpus, 16) == directory
    assert (directory / "model.safetensors").stat() == before


@dataclass
class WrongStore:
    """Reads from another store, and changes one passage."""

    store: DocumentStore
    holds: str = "text"

    def __len__(self) -> int:
        return len(self.store)

    def get_many(self, rows: list[int]) -> list[Passage]:
        found = self.store.get_many(rows)
        return [p._replace(text=p.text.upper()) if p.id == "p19" else p for p in found]


def test_a_store_with_other_texts_is_refused(corpus: Corpus) -> None:
    store = open_store("lookup", store_directory("lookup", corpus))
    check_stores({"lookup": store}, corpus, None, seed=0)
    with pytest.raises(DataError, match=r"store wrong: .* passage 'p19' \(row 19\)"):
        check_stores({"lookup": store, "wrong": WrongStore(store)}, corpus, None, seed=0)
