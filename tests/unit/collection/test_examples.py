"""Training examples made once from raw records: rows, what is left out, digests, processes."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import mlflow_dr.collection.examples as examples_module
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import CachedExamples, cached_examples
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Example, Passage, Query
from mlflow_dr.errors import DataError

LINER, TUG, BARGE = (
    Passage("p1", "Ships", "a liner"),
    Passage("p2", "", "a tug"),
    Passage("p3", "", "a barge"),
)


@pytest.fixture
def corpus() -> Corpus:
    return cached_corpus("ships", [TUG, LINER, BARGE])


def raw(
    positives: Iterable[Passage | str],
    negatives: Iterable[Passage | str] = (),
    query: Query = Query("q", "which ship"),  # noqa: B008 (a NamedTuple)
    location: str = "file:1",
    **scores: list[float],
) -> RawExample:
    return RawExample(location, query, list(positives), list(negatives), **scores)  # type: ignore[arg-type]


def made(*records: RawExample, corpus: Corpus | None = None, key: str = "key") -> CachedExamples:
    return cached_examples(key, records, "the source", corpus)


def ids(examples: CachedExamples, rows: np.ndarray) -> list[str]:
    return [passage.id for passage in examples.passages.passages(rows)]


def shown(examples: CachedExamples) -> list[tuple[str, list[str], list[str]]]:
    every = [examples[index] for index in range(len(examples))]
    return [
        (example.query.id, ids(examples, example.positives), ids(examples, example.negatives))
        for example in every
    ]


def warning(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    return record.getMessage()


def test_an_example_has_query_rows_and_their_types() -> None:
    query = Query("q7", "é?", ("yes", "no"))
    examples = made(raw([LINER], [TUG, BARGE], query))
    example = examples[0]
    assert isinstance(example, Example)
    assert example.query == query
    assert (example.positives.dtype, example.negatives.dtype) == (np.int64, np.int64)
    assert (example.positives.tolist(), example.negatives.tolist()) == ([0], [1, 2])
    assert example.scores is None
    assert example.query.tokens is None
    assert examples.passages.passages([0, 1, 2]) == [LINER, TUG, BARGE]


@pytest.mark.parametrize("index", [-1, 1])
def test_an_index_that_does_not_exist(index: int) -> None:
    with pytest.raises(IndexError, match=f"example {index} of 1"):
        made(raw([LINER]))[index]


def test_examples_of_many_batches_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        raw([Passage(f"p{n}", "", f"text {n}")], query=Query(f"q{n}", f"query {n}", (str(n),)))
        for n in range(25)
    ]
    whole = made(*records, key="one batch")
    monkeypatch.setattr(examples_module, "EXAMPLES_PER_BATCH", 4)
    cut = made(*records, key="batches of four")
    assert [cut[n].query for n in range(25)] == [record.query for record in records]
    assert shown(cut) == shown(whole) == [(f"q{n}", [f"p{n}"], []) for n in range(25)]
    assert cut.digest == whole.digest


def test_a_passage_of_several_queries_is_one_row() -> None:
    examples = made(raw([LINER], [TUG]), raw([TUG], [LINER]))
    assert len(examples.passages) == 2
    assert shown(examples) == [("q", ["p1"], ["p2"]), ("q", ["p2"], ["p1"])]


def test_passages_without_id_are_known_by_their_content() -> None:
    liner, tug = Passage("", "Ships", "a liner"), Passage("", "Ships a", "liner")
    examples = made(raw([liner], [tug]), raw([liner]))
    assert len(examples.passages) == 2
    assert examples[1].positives.tolist() == examples[0].positives.tolist()
    names = examples.passages.ids.to_pylist()
    assert len(set(names)) == 2
    assert all(names)
    again = made(raw([tug], [liner]), key="other order").passages.ids.to_pylist()
    assert again == names[::-1]


def test_two_texts_with_one_id_are_two_passages(caplog: pytest.LogCaptureFixture) -> None:
    """DPR trains on the text that the file has, whatever the id."""
    other = LINER._replace(text="another liner")
    examples = made(raw([LINER], [other]), raw([other]), raw([LINER]))
    positives, negatives = examples[0].positives, examples[0].negatives
    assert examples.passages.passages(positives) == [LINER]
    assert [passage.text for passage in examples.passages.passages(negatives)] == ["another liner"]
    assert examples[1].positives.tolist() == negatives.tolist()
    assert examples[2].positives.tolist() == positives.tolist()
    assert len(examples.passages) == 2
    assert len(set(examples.passages.ids.to_pylist())) == 2
    assert not caplog.records


def test_ids_are_rows_of_the_given_corpus(corpus: Corpus) -> None:
    examples = made(raw(["p1"], ["p3", "p2"]), corpus=corpus)
    assert examples.passages is corpus
    assert (examples[0].positives.tolist(), examples[0].negatives.tolist()) == ([1], [2, 0])


def test_ids_are_looked_up_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    rows_of = Corpus.rows_of

    def counted(self: Corpus, wanted: list[str]) -> np.ndarray:
        asked.append(wanted)
        return rows_of(self, wanted)

    monkeypatch.setattr(Corpus, "rows_of", counted)
    monkeypatch.setattr(examples_module, "EXAMPLES_PER_BATCH", 1)
    made(raw(["p1"], ["p2"]), raw(["p2"], ["p1"]), raw(["p1"]), corpus=corpus)
    assert asked == [["p1", "p2"]]


def test_unknown_ids_are_left_out_with_one_warning_at_every_opening(
    corpus: Corpus, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        raw(["p1", "gone"], ["lost", "p2"]),
        raw(["gone"], ["p2", "p3"], query=Query("q2", "t")),
        raw(["p3"], ["gone", "p1"], query=Query("q3", "t")),
    ]
    for _ in range(2):
        caplog.clear()
        examples = made(*records, corpus=corpus)
        assert shown(examples) == [("q", ["p1"], ["p2"]), ("q3", ["p3"], ["p1"])]
        message = warning(caplog)
        assert message.startswith("the source: left out: ")
        assert "4 passages that the corpus lacks (such as 'gone')" in message
        assert "1 records without a usable positive passage (such as file:1)" in message


def test_negatives_that_are_positives_and_repeats_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = made(raw([LINER, TUG, LINER], [TUG, BARGE, BARGE, LINER]), raw([TUG], [LINER]))
    assert shown(examples) == [("q", ["p1", "p2"], ["p3"]), ("q", ["p2"], ["p1"])]
    message = warning(caplog)
    assert "2 negatives that are also positives of their query (such as query 'q')" in message
    assert "2 passages listed twice for one query (such as query 'q')" in message


@pytest.mark.parametrize("text", ["", " \t"])
def test_records_without_query_or_positive_are_left_out_and_located(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    examples = made(
        raw([LINER], query=Query("a", text), location="f:1"),
        raw([], [TUG], location="f:2"),
        raw([Passage("e", " ", "")], location="f:3"),
        raw([BARGE], [Passage("e", "", text)], location="f:4"),
    )
    assert shown(examples) == [("q", ["p3"], [])]
    assert len(examples.passages) == 1  # of unused records none is kept
    message = warning(caplog)
    assert "1 records without a query (such as f:1)" in message
    assert "2 records without a usable positive passage (such as f:2)" in message
    assert "2 passages without text (such as f:3)" in message


def test_nothing_is_warned_about_when_everything_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made(raw([LINER], [TUG]))
    assert not caplog.records


def test_no_usable_record_is_an_error_every_time(own_cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match=r"the source: none of 1 records .*: 1 records without"):
            made(raw([]))
        with pytest.raises(DataError, match="none of 0 records can be trained on: the source is"):
            made(key="empty")
    assert {path.suffix for path in (own_cache / "examples").iterdir()} == {".lock"}


def test_two_records_of_one_query_stay_two_examples() -> None:
    examples = made(raw([LINER], [TUG]), raw([LINER], [BARGE]), raw([LINER], [TUG]))
    assert shown(examples) == [
        ("q", ["p1"], ["p2"]),
        ("q", ["p1"], ["p3"]),
        ("q", ["p1"], ["p2"]),
    ]


def test_scores_are_those_of_positives_then_negatives() -> None:
    examples = made(
        raw([LINER, TUG], [BARGE], positive_scores=[3.5, 2], negative_scores=[-1]),
        raw([TUG], [LINER]),
        raw([TUG], positive_scores=[7]),
    )
    assert examples[0].scores is not None
    assert examples[0].scores.dtype == np.float32
    assert examples[0].scores.tolist() == [3.5, 2, -1]
    assert examples[1].scores is None
    assert examples[2].scores is not None
    assert examples[2].scores.tolist() == [7]


def test_scores_go_with_the_passages_that_are_left(corpus: Corpus) -> None:
    record = raw(
        ["gone", "p1"],
        ["p1", "p2", "lost", "p3", "p2"],
        positive_scores=[9, 8],
        negative_scores=[7, 6, 5, 4, 3],
    )
    example = made(record, corpus=corpus)[0]
    assert example.scores is not None
    assert example.scores.tolist() == [8, 6, 4]


def test_scores_of_some_passages_only_are_left_out_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    examples = made(raw([LINER], [TUG], positive_scores=[1.0], negative_scores=[math.nan]))
    assert examples[0].scores is None
    assert "1 records with a teacher's scores for some of their passages only" in warning(caplog)


def test_tokenised_examples_have_tokens_and_no_text() -> None:
    passages = [Passage("", "", "", [5, 6]), Passage("", "", "", [5, 6, 7])]
    examples = made(
        raw(passages[:1], passages[1:], Query("0", "", (), [1, 2])),
        raw(passages[1:], passages[:1], Query("1", "", (), [3])),
    )
    assert examples[0].query.tokens == [1, 2]
    assert examples[0].query.text == ""
    assert examples.passages.tokenised
    assert len(examples.passages) == 2
    assert [examples.passages[row].tokens for row in (0, 1)] == [[5, 6], [5, 6, 7]]


def test_text_among_token_ids_is_an_error_that_names_the_record() -> None:
    tokens = Passage("", "", "", [5])
    with pytest.raises(DataError, match="file:2: a passage of text among passages of token ids"):
        made(raw([tokens]), raw([LINER], location="file:2"))
    with pytest.raises(DataError, match="file:2: a passage of token ids among passages of text"):
        made(raw([LINER]), raw([tokens], location="file:2"))


def test_records_are_read_once_for_a_key(corpus: Corpus) -> None:
    made(raw([LINER]))
    again = cached_examples("key", (pytest.fail("read") for _ in range(1)), "the source")
    assert shown(again) == [("q", ["p1"], [])]
    assert shown(made(raw([TUG]), key="another")) == [("q", ["p2"], [])]
    # another corpus has other rows
    by_id = made(raw(["p1"]), corpus=corpus, key="by id")
    turned = cached_corpus("turned", [BARGE, TUG, LINER])
    assert (
        by_id[0].positives[0],
        made(raw(["p1"]), corpus=turned, key="by id")[0].positives[0],
    ) == (1, 2)


def test_the_digest_names_the_contents() -> None:
    base = raw([LINER], [TUG, BARGE], positive_scores=[1.0], negative_scores=[2.0, 3.0])
    tokens = Query("q", "which ship", (), [1])
    variants = [
        [base],
        [base, base],
        [base._replace(query=Query("r", "which ship"))],
        [base._replace(query=Query("q", "which boat"))],
        [base._replace(query=Query("q", "which ship", ("a",)))],
        [base._replace(query=Query("q", "which ship", ("a", "")))],
        [base._replace(query=tokens)],
        [base._replace(negatives=[BARGE, TUG])],
        [base._replace(positives=[LINER._replace(text="a yacht")])],
        [base._replace(positive_scores=[2.0])],
        [base._replace(positive_scores=[], negative_scores=[])],
    ]
    digests = [made(*records, key=str(n)).digest for n, records in enumerate(variants)]
    assert len(set(digests)) == len(variants)
    assert made(base, key="again").digest == digests[0]
    assert all(len(digest) <= 36 for digest in digests)


def test_an_error_while_reading_leaves_nothing(own_cache: Path) -> None:
    def breaks_off() -> Iterable[RawExample]:
        yield raw([LINER])
        raise DataError("cut off")

    with pytest.raises(DataError, match="cut off"):
        cached_examples("key", breaks_off(), "the source")
    assert [path.suffix for path in (own_cache / "examples").iterdir()] == [".lock"]
    assert len(made(raw([LINER]))) == 1


def test_another_process_gets_the_same_examples_by_their_path(corpus: Corpus) -> None:
    for examples in (made(raw([LINER], [TUG])), made(raw(["p1"], ["p2"]), corpus=corpus)):
        sent = pickle.dumps(examples)
        again = pickle.loads(sent)
        assert shown(again) == shown(examples)
        assert again.digest == examples.digest
        assert len(sent) < 1000


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_read_what_this_process_reads(context: str) -> None:
    from torch.utils.data import DataLoader

    records = [
        raw([Passage(f"p{n}", "", f"t{n}")], [LINER], Query(f"q{n}", f"t{n}")) for n in range(40)
    ]
    examples = made(*records)
    here = shown(examples)  # read before the fork, so that nothing may depend on a file's offset
    loader = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=4,
        num_workers=2,
        multiprocessing_context=context,
        collate_fn=list,
    )
    found = [example for batch in loader for example in batch]
    assert [
        (example.query.id, ids(examples, example.positives), ids(examples, example.negatives))
        for example in found
    ] == here


def test_reading_an_example_takes_microseconds() -> None:
    negatives = [Passage(f"n{n}", "", f"negative {n}") for n in range(100)]
    examples = made(*(raw([LINER], negatives, Query(str(n), "t")) for n in range(300)))

    def seconds() -> float:
        start = time.process_time()
        for index in range(len(examples)):
            examples[index]
        return (time.process_time() - start) / len(examples)

    assert min(seconds() for _ in range(5)) < 100e-6  # 5 microseconds on an idle core
