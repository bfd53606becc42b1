"""Document stores by name, their files in the cache, and what is refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import TOKENS, Corpus, cached_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.token_table import cached_token_table
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.stores import records
from mlflow_dr.stores.store import DocumentStore, open_store, store_directory

PASSAGES = [Passage(f"p{row}", "", f"ship {row}") for row in range(20)]


@pytest.fixture
def make_corpus(own_cache: Path) -> Callable[..., Corpus]:
    return lambda *passages: cached_corpus("key", passages or PASSAGES)


def opened(name: str, corpus: Corpus) -> DocumentStore:
    return open_store(name, store_directory(name, corpus))


def test_a_store_is_made_once(own_cache: Path, make_corpus: Callable[..., Corpus]) -> None:
    """And one for all ways to read the same files."""
    corpus = make_corpus()
    directories = {
        store_directory(name, corpus) for name in ("lookup", "lookup:pread", "memory", "lookup")
    }
    assert len(directories) == 1
    assert directories.pop().is_relative_to(own_cache / "stores")


def test_an_interrupted_build_leaves_no_files(
    own_cache: Path, make_corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus()
    monkeypatch.setattr(records, "SEPARATORS", [])
    with pytest.raises(DataError, match="use the store 'corpus'"):
        store_directory("lookup", corpus)
    assert [path.suffix for path in (own_cache / "stores").iterdir()] == [".lock"]


def test_an_unknown_store_is_named_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown document store 'lokup'; .*'lookup'.*memory"):
        open_store("lokup", tmp_path)


@pytest.mark.parametrize("name", ["lookup", "memory", "null"])
def test_a_corpus_of_token_ids_is_refused(name: str) -> None:
    columns: dict[str, Any] = {"id": ["a"], "title": [""], "text": [""]}
    table = pa.table({**columns, "tokens": pa.array([[1]], TOKENS.type)})
    with pytest.raises(UsageError, match="holds text, but this corpus has only token ids"):
        store_directory(name, Corpus(table))


def test_titles_may_have_the_usual_separator(make_corpus: Callable[..., Corpus]) -> None:
    odd = [Passage("a", "x\0y", "\0"), Passage("b", "\x01", "t\0\x01"), Passage("c", "", "u")]
    with opened("lookup", make_corpus(*odd)) as store:
        assert store.get_many([2, 1, 0]) == odd[::-1]


def test_rows_are_integers(make_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(TypeError, match="float64"):
        opened("null", make_corpus()).get_many(np.array([1.5]))


def test_the_null_store_reads_nothing(make_corpus: Callable[..., Corpus]) -> None:
    store = opened("null", make_corpus())
    assert store.get_many([3, 1]) == [Passage("", "", "")] * 2
    assert len(store) == 20


def test_a_closed_store_can_be_read_again(make_corpus: Callable[..., Corpus]) -> None:
    for name in ("lookup", "lookup:pread", "memory", "corpus", "null"):
        with opened(name, make_corpus()) as store:
            first = store.get_many([1])
            store.close()
            assert store.get_many([1]) == first


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match="not the undamaged files of a document store"):
        open_store("lookup", tmp_path).get_many([0])
    with pytest.raises(DataError, match="not the undamaged files"):
        len(open_store("lookup", tmp_path / "missing"))


def test_a_store_is_sent_as_its_path(make_corpus: Callable[..., Corpus]) -> None:
    store = opened("memory", make_corpus())
    store.get_many([0])
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert pickle.loads(sent).get_many([5]) == PASSAGES[5:6]


def test_the_store_of_a_cached_corpus_is_its_own_file(make_corpus: Callable[..., Corpus]) -> None:
    corpus = make_corpus()
    assert store_directory("corpus", corpus) == corpus.directory
    assert opened("corpus", corpus).get_many([7]) == PASSAGES[7:8]


def test_a_corpus_in_memory_is_written_for_its_store(own_cache: Path) -> None:
    """Also one of token ids."""
    texts: dict[str, Any] = {"id": ["a", "b"], "title": ["", "t"], "text": ["x", ""]}
    tokens = pa.array([[1], [2, 3]], TOKENS.type)
    for table in (pa.table(texts), pa.table({**texts, "tokens": tokens})):
        corpus = Corpus(table)
        store = opened("corpus", corpus)
        assert store.get_many([1, 0]) == corpus.passages([1, 0])
        assert store.rows_of(["b"]).tolist() == [1]


def test_a_token_table_is_the_store_of_its_directory(own_cache: Path) -> None:
    table = cached_token_table("key", [[b"ab", b"c"]], list, 256, total=2)
    assert table.directory is not None
    with open_store("tokens", table.directory) as store:
        assert [ids.tolist() for ids in store.get_many([1, 0])] == [[99], [97, 98]]
        assert store.holds == "tokens"
        with pytest.raises(UsageError, match="no passage ids; ask the corpus"):
            store.rows_of(["a"])


def test_a_corpus_alone_gives_no_tokens(make_corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(UsageError, match="'tokens' needs a tokenizer, too"):
        store_directory("tokens", make_corpus())
