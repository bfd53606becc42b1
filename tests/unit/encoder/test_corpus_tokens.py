"""Token tables of a corpus and of training queries."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.encoder import token_table
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import corpus_tokens, query_tokens, subset_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(query_prompt="ship: ", passage_max_length=8)


@pytest.fixture
def corpus(texts: Sequence[str]) -> Corpus:
    titles = [f"title {number}" if number % 2 else "" for number in range(len(texts))]
    return Corpus(pa.table({"id": list("abcdefghij"), "title": titles, "text": list(texts)}))


class Asked(NamedTuple):
    """Examples of which only the queries count."""

    passages: Corpus
    count: int
    digest: str = "asked"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        query = Query(f"q{index}", f"which ship {index}")
        return Example(query, np.array([0]), np.empty(0, np.int64))


def tables_in(cache: Path) -> int:
    return sum(path.is_dir() for path in (cache / "tokens").iterdir())


def test_tables_have_the_tokenizers_ids(encoder: Encoder, corpus: Corpus) -> None:
    text_tokenizer = TextTokenizer.of(encoder)
    passages = corpus_tokens(corpus, text_tokenizer)
    expected = text_tokenizer.passage_ids(corpus.passages(range(len(corpus))))
    assert [passages[row].tolist() for row in range(len(passages))] == expected
    asked = Asked(corpus, 3)
    queries = query_tokens(asked, text_tokenizer)
    expected = text_tokenizer.query_ids([asked[index].query for index in range(3)])
    assert [queries[row].tolist() for row in range(len(queries))] == expected


def test_queries_are_read_in_batches(
    encoder: Encoder, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_table, "TEXTS_PER_BATCH", 4)
    text_tokenizer = TextTokenizer.of(encoder)
    asked = Asked(corpus, 10)
    queries = query_tokens(asked, text_tokenizer)
    expected = text_tokenizer.query_ids([asked[index].query for index in range(10)])
    assert [queries[row].tolist() for row in range(len(queries))] == expected


def test_equal_tokenizers_share_a_table(encoder: Encoder, corpus: Corpus, own_cache: Path) -> None:
    """Lengths and prompts of the other side make no difference; those of this side do."""

    def made(**changes: object) -> int:
        text_tokenizer = TextTokenizer(encoder.tokenizer, replace(encoder.settings, **changes))
        corpus_tokens(corpus, text_tokenizer)
        query_tokens(Asked(corpus, 3), text_tokenizer)
        return tables_in(own_cache)

    assert made() == 2
    assert made(pooling="mean", normalize=True) == 2
    assert made(query_max_length=5) == 3
    assert made(passage_max_length=5) == 4
    assert made(passage_prompt="ship: ") == 5
    assert made(query_prompt="") == 6
    assert made() == 6


def test_other_contents_have_another_table(
    encoder: Encoder, corpus: Corpus, own_cache: Path
) -> None:
    text_tokenizer = TextTokenizer.of(encoder)
    query_tokens(Asked(corpus, 3), text_tokenizer)
    assert len(query_tokens(Asked(corpus, 4, "others"), text_tokenizer)) == 4
    corpus_tokens(corpus, text_tokenizer)
    fewer = Corpus(pa.table({"id": ["a"], "title": [""], "text": ["a ship"]}))
    assert len(corpus_tokens(fewer, text_tokenizer)) == 1
    assert tables_in(own_cache) == 4


def test_a_subset_is_tokenised_alone(encoder: Encoder, corpus: Corpus, own_cache: Path) -> None:
    text_tokenizer = TextTokenizer.of(encoder)
    some = np.array([1, 4, 7])
    part = subset_tokens(corpus, some, text_tokenizer)
    assert len(part) == len(corpus)
    assert (part.lengths > 0).nonzero()[0].tolist() == some.tolist()
    whole = corpus_tokens(corpus, text_tokenizer)
    for row in some:
        assert part[row].tolist() == whole[row].tolist()
    backwards = some[::-1]
    for mine, theirs in zip(part.packed(backwards), whole.packed(backwards), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert tables_in(own_cache) == 2
    # the whole corpus has been tokenised by now: that is taken
    assert (subset_tokens(corpus, np.array([0]), text_tokenizer).lengths > 0).all()
    assert tables_in(own_cache) == 2


def test_most_of_a_corpus_is_tokenised_completely(encoder: Encoder, corpus: Corpus) -> None:
    text_tokenizer = TextTokenizer.of(encoder)
    assert (subset_tokens(corpus, np.arange(6), text_tokenizer).lengths > 0).all()


def in_parts(
    corpus: Corpus, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, fails_after: int
) -> list[int]:
    """Tokenise by parts of four passages; returns how many were tokenised, part by part."""
    tokenizer = TextTokenizer.of(encoder)
    tokenise, done = TextTokenizer.passage_ids, []

    def counted(self: TextTokenizer, passages: Sequence[Passage]) -> Sequence[Sequence[int]]:
        if len(done) == fails_after:
            raise KeyboardInterrupt
        done.append(len(passages))
        return tokenise(self, passages)

    with monkeypatch.context() as patch:
        patch.setattr(token_table, "PASSAGES_PER_PART", 4)
        patch.setattr(TextTokenizer, "passage_ids", counted)
        with pytest.raises(KeyboardInterrupt) if fails_after < 3 else nullcontext():
            table = corpus_tokens(corpus, tokenizer)
            expected = tokenise(tokenizer, corpus.passages(range(len(corpus))))
            assert [table[row].tolist() for row in range(len(table))] == expected
    return done


def test_the_parts_of_a_large_corpus_outlive_an_interruption(
    encoder: Encoder, corpus: Corpus, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_state = random.getstate()
    first = in_parts(corpus, encoder, monkeypatch, fails_after=2)
    assert tables_in(own_cache) == len(first) == 2
    second = in_parts(corpus, encoder, monkeypatch, fails_after=3)
    assert sorted(first + second) == [2, 4, 4]
    assert tables_in(own_cache) == 1  # the parts are removed
    assert in_parts(corpus, encoder, monkeypatch, fails_after=3) == []
    assert random.getstate() == random_state


def test_a_damaged_part_is_made_again(
    encoder: Encoder, corpus: Corpus, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_parts(corpus, encoder, monkeypatch, fails_after=2)
    ids = next((own_cache / "tokens").glob("*/ids.bin"))
    ids.write_bytes(ids.read_bytes()[:-2])
    assert len(in_parts(corpus, encoder, monkeypatch, fails_after=3)) == 2
