"""The corpus: rows, passages, digest, and the order of equal scores."""

import gzip
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection import corpus as module
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.corpus import SCHEMA, Corpus, cached_corpus
from mlflow_dr.collection.records import Passage

PASSAGES = [Passage(f"p{n}", f"Title {n}" if n % 3 else "", f"text é {n}") for n in range(25)]


def corpus_of(passages: Sequence[Passage], rows_per_chunk: int = 1000) -> Corpus:
    groups = [passages[i : i + rows_per_chunk] for i in range(0, len(passages), rows_per_chunk)]
    tables = [
        pa.table([list(c) for c in list(zip(*group, strict=True))[:3]], schema=SCHEMA)
        for group in groups
    ]
    return Corpus(pa.concat_tables(tables))


@pytest.fixture(params=[1, 7, 1000])
def corpus(request: pytest.FixtureRequest) -> Corpus:
    return corpus_of(PASSAGES, request.param)


def test_every_row_is_its_passage(corpus: Corpus) -> None:
    assert len(corpus) == 25
    assert [corpus[row] for row in range(25)] == PASSAGES
    assert [passage for batch in corpus.batches() for passage in batch] == PASSAGES
    assert corpus.ids.to_pylist() == [passage.id for passage in PASSAGES]


@pytest.mark.parametrize("row", [-1, 25])
def test_a_row_that_does_not_exist(corpus: Corpus, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of a corpus of 25 passages"):
        corpus[row]


def test_passages_keep_order_and_repeats(corpus: Corpus) -> None:
    rows = [20, 3, 3, 0, 24, 20]
    assert corpus.passages(np.array(rows)) == [PASSAGES[row] for row in rows]


def test_rows_of_keeps_order_and_repeats_and_marks_missing_ids(corpus: Corpus) -> None:
    rows = corpus.rows_of(["p20", "p3", "none", "p3", "", "p0"])
    assert rows.dtype == np.int64
    assert rows.tolist() == [20, 3, -1, 3, -1, 0]
    assert corpus.rows_of([]).tolist() == []


def test_the_digest_does_not_depend_on_chunks(own_cache: Path) -> None:
    digests = {corpus_of(PASSAGES, size).digest for size in (1, 7, 1000)}
    digests.add(cached_corpus("key", iter(PASSAGES)).digest)
    assert len(digests) == 1


def test_the_digest_does_not_depend_on_the_size_of_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 4)
    small = cached_corpus("small", iter(PASSAGES))
    assert small.digest == corpus_of(PASSAGES).digest
    assert [small[row] for row in range(25)] == PASSAGES


def test_the_digest_does_not_depend_on_packing(beir_folder: Callable[..., Path]) -> None:
    content = {p.id: (p.title, p.text) for p in PASSAGES}
    plain = beir_folder(content, {"q": "t"}, folder="plain", dev={"q": {"p1": 1}})
    packed = beir_folder(content, {"q": "t"}, folder="packed", dev={"q": {"p1": 1}})
    data = (packed / "corpus.jsonl").read_bytes()
    (packed / "corpus.jsonl.gz").write_bytes(gzip.compress(data))
    (packed / "corpus.jsonl").unlink()
    assert BeirFolder(plain).corpus().digest == BeirFolder(packed).corpus().digest


def test_the_digest_of_a_corpus_of_text_never_changes() -> None:
    """Token tables, validations and runs in MLflow are known by it."""
    assert corpus_of(PASSAGES).digest == "2862c54a877ede28"


def test_a_corpus_of_tokens_has_them_wherever_it_is_read() -> None:
    passages = [Passage("a", "", "", [5, 7]), Passage("b", "", "", [2**31 - 1])]
    corpus = cached_corpus("tokens", passages)
    assert corpus.tokenised
    assert [corpus[0], corpus[1]] == passages
    assert corpus.passages([1, 0]) == passages[::-1]
    assert next(corpus.batches()) == passages
    assert not corpus_of(PASSAGES).tokenised


def test_the_digest_covers_tokens() -> None:
    variants = [
        [[5, 7], [9]],
        [[5], [7, 9]],
        [[5, 7], [8]],
        [None, None],
    ]
    digests = {
        cached_corpus(str(v), [Passage(str(n), "", "", t) for n, t in enumerate(v)]).digest
        for v in variants
    }
    assert len(digests) == len(variants)


@pytest.mark.parametrize("cached", [True, False])
def test_another_process_gets_the_same_corpus(cached: bool) -> None:
    corpus = cached_corpus("key", iter(PASSAGES * 1)) if cached else corpus_of(PASSAGES)
    sent = pickle.dumps(corpus)
    again = pickle.loads(sent)
    assert [again[row] for row in range(25)] == PASSAGES
    assert again.digest == corpus.digest
    if cached:  # a path, not the passages
        assert len(sent) < 500


@pytest.mark.parametrize(
    "changed",
    [
        [Passage("a", "x", "yz"), Passage("b", "", "w")],
        [Passage("a", "", "xyz"), Passage("b", "", "w")],
        [Passage("a", "xy", "zw"), Passage("b", "", "")],
        [Passage("ab", "xy", "z"), Passage("", "", "w")],
        [Passage("b", "", "w"), Passage("a", "xy", "z")],
        [Passage("a", "xy", "z")],
    ],
    ids=["text to title", "title to text", "between passages", "between ids", "order", "fewer"],
)
def test_the_digest_changes_with_the_contents(changed: list[Passage]) -> None:
    original = [Passage("a", "xy", "z"), Passage("b", "", "w")]
    assert corpus_of(original).digest == corpus_of(list(original)).digest
    assert corpus_of(changed).digest != corpus_of(original).digest


@pytest.mark.parametrize("rows_per_chunk", [2, 1000])
def test_equal_scores_are_ordered_by_descending_bytes_of_the_id(rows_per_chunk: int) -> None:
    # by UTF-16 "\uff5e" comes after "\U0001f600", by bytes before it
    ids = ["2", "10", "1", "a", "A", "é", "字", "\uff5e", "\U0001f600", "a\u0301", "ab", "z"]
    ranks = corpus_of([Passage(i, "", "") for i in ids], rows_per_chunk).tie_ranks()
    assert ranks.dtype == np.int64
    by_rank = [ids[row] for row in np.argsort(ranks)]
    assert by_rank == sorted(ids, key=str.encode, reverse=True)


def test_a_corpus_under_a_known_key_is_not_read_again() -> None:
    cached_corpus("key", iter(PASSAGES))
    again = cached_corpus("key", (pytest.fail("read again") for _ in range(1)))
    assert again[24] == PASSAGES[24]
    assert len(cached_corpus("another key", iter(PASSAGES[:3]))) == 3


def test_an_error_while_reading_leaves_nothing(own_cache: Path) -> None:
    def breaks_off():  # type: ignore[no-untyped-def]
        yield from PASSAGES
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cached_corpus("key", breaks_off())
    assert [path.suffix for path in (own_cache / "corpora").iterdir()] == [".lock"]
    assert len(cached_corpus("key", iter(PASSAGES))) == 25
