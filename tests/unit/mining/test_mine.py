"""Mining as a whole, against sentence-transformers' `mine_hard_negatives` and plain counting."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlflow_dr
from mlflow_dr.collection.catalogue import open_examples
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, DataError, UsageError
from mlflow_dr.mining import mine as module
from mlflow_dr.mining.mine import MiningConfig, mine
from mlflow_dr.mining.rule import Rule
from mlflow_dr.retrieval.bm25 import Bm25Retriever, Bm25Settings

Folder = Callable[..., Path]
SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "diver")
PLACES = ("harbour", "wreck", "mast", "island", "channel")


@pytest.fixture
def folder(beir_folder: Folder) -> Path:
    """30 passages, each about a subject at a place, and a query for each of them."""
    pairs = [(subject, place) for subject in SUBJECTS for place in PLACES]
    corpus = {f"p-{s}-{p}": (s, f"a {s} was seen at the {p} in {len(s)} hours") for s, p in pairs}
    queries = {f"q-{s}-{p}": f"when was the {s} at the {p}?" for s, p in pairs}
    return beir_folder(corpus, queries, train={q: {f"p{q[1:]}": 1} for q in queries})


def configured(
    folder: Path,
    output: Path,
    rule: Rule | None = None,
    bm25: Bm25Settings | None = None,
    **others: Any,
) -> MiningConfig:
    settings = {**vars(rule or Rule()), **vars(bm25 or Bm25Settings())}
    return MiningConfig(dataset=str(folder), output=output, **settings, **others)


def mined(folder: Path, output: str = "mined.jsonl", **others: Any) -> list[dict[str, Any]]:
    rule = others.pop("rule", Rule(5, 20))
    path = folder.parent / output
    mine(configured(folder, path, rule, force=True, device="cpu", dtype="fp32", **others))
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def test_each_query_has_a_line_with_tevatrons_field_names(folder: Path) -> None:
    lines = mined(folder)
    assert len(lines) == 30
    assert list(lines[0]) == [
        *("query_id", "query_text", "positive_document_ids", "negative_document_ids"),
        *("positive_scores", "negative_scores"),
    ]
    first = lines[0]
    assert first["query_id"] == "q-gull-harbour"
    assert first["query_text"] == "when was the gull at the harbour?"
    assert first["positive_document_ids"] == ["p-gull-harbour"]
    # what shares a word; the positive, which shares two, is first in the ranking
    assert len(first["negative_document_ids"]) == 5
    assert all(
        "gull" in document_id or "harbour" in document_id
        for document_id in first["negative_document_ids"]
    )
    assert first["positive_scores"][0] > first["negative_scores"][0]
    assert first["negative_scores"] == sorted(first["negative_scores"], reverse=True)


def test_training_reads_the_mined_file(folder: Path) -> None:
    lines = mined(folder, "mined.jsonl.gz")
    corpus = mlflow_dr.open_collection(str(folder)).corpus()
    examples = open_examples(folder.parent / "mined.jsonl.gz", lambda: corpus)
    assert len(examples) == 30
    for index, line in enumerate(lines):
        example = examples[index]
        assert example.query[:2] == (line["query_id"], line["query_text"])
        found = [passage.id for passage in examples.passages.passages(example.negatives)]
        assert found == line["negative_document_ids"]
        expected = line["positive_scores"] + line["negative_scores"]
        np.testing.assert_allclose(example.scores, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Rule(5, 25), {"range_max": 25}),
        (Rule(4, 12, range_min=5), {"range_min": 5, "range_max": 12}),
        (Rule(4, 25, margin=0.05), {"range_max": 25, "absolute_margin": 0.05}),
        (Rule(4, 25, relative_margin=0.2), {"range_max": 25, "relative_margin": 0.2}),
        (Rule(4, 25, max_score=0.6), {"range_max": 25, "max_score": 0.6}),
        (Rule(2, 25, min_score=0.3), {"range_max": 25, "min_score": 0.3}),
    ],
)
def test_negatives_of_an_encoder_equal_those_of_sentence_transformers(
    folder: Path, minilm: Path, ours: Rule, theirs: dict[str, Any], tmp_path: Path
) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    records = map(json.loads, (folder / "corpus.jsonl").read_text().splitlines())
    texts = {record["_id"]: f"{record['title']} {record['text']}" for record in records}
    lines = mined(folder, miner=str(minilm), rule=ours)
    pairs = {
        "query": [line["query_text"] for line in lines],
        "positive": [texts[line["positive_document_ids"][0]] for line in lines],
    }
    expected = mine_hard_negatives(
        Dataset.from_dict(pairs),
        SentenceTransformer(str(minilm), device="cpu"),
        corpus=list(texts.values()),
        num_negatives=ours.negatives,
        output_format="labeled-list",
        output_scores=True,
        verbose=False,
        **theirs,
    )
    by_query = {row["query"]: row for row in expected}
    compared = 0
    for line in lines:
        scores = line["positive_scores"] + line["negative_scores"]
        row = by_query.get(line["query_text"])
        if row is None:
            assert not line["negative_document_ids"]
            continue
        np.testing.assert_allclose(row["scores"], scores, atol=1e-5)
        found = [texts[document_id] for document_id in line["negative_document_ids"]]
        if min(np.diff(sorted(scores)), default=1.0) > 1e-5:  # rounding decides nothing
            assert row["positive"][1:] == found
            compared += 1
    assert compared >= 10
    assert any(line["negative_document_ids"] for line in lines)


def test_the_margin_is_measured_from_the_lowest_scored_positive(beir_folder: Folder) -> None:
    corpus = {"p1": "gull", "p2": "gull mast", "p3": "the gull at the mast of a ship"}
    folder = beir_folder(corpus, {"q": "gull mast"}, train={"q": {"p1": 1, "p2": 2}})
    (free,) = mined(folder, rule=Rule(1, 1))
    (held,) = mined(folder, rule=Rule(1, 1, margin=0.0))
    assert free["negative_document_ids"] == ["p3"]
    assert min(free["positive_scores"]) < free["negative_scores"][0] < max(free["positive_scores"])
    assert held["negative_document_ids"] == []


def test_passages_that_hold_an_answer_are_excluded(folder: Path) -> None:
    _add_answers(folder, lambda query: ["4 hours"] if "ship" in query else [])
    lines = mined(folder)
    assert all(("answers" in line) == ("ship" in line["query_id"]) for line in lines)
    assert lines[5]["answers"] == ["4 hours"]
    # four letters, four hours: what is said of ships and gulls
    negatives = {line["query_id"]: line["negative_document_ids"] for line in lines}
    ships = [
        document_id for query in negatives if "ship" in query for document_id in negatives[query]
    ]
    assert ships
    assert not any("gull" in document_id or "ship" in document_id for document_id in ships)
    kept = mined(folder, exclude_answers=False)
    assert any("ship" in document_id for document_id in kept[5]["negative_document_ids"])
    assert kept[5]["answers"] == ["4 hours"]


def test_answers_that_are_regular_expressions(folder: Path) -> None:
    _add_answers(folder, lambda query: [r"[4]\s+hours?"] if "ship" in query else [])
    as_strings, as_patterns = mined(folder), mined(folder, match="regex")
    assert any("ship" in document_id for document_id in as_strings[5]["negative_document_ids"])
    ships = [line for line in as_patterns if "ship" in line["query_id"]]
    negatives = [document_id for line in ships for document_id in line["negative_document_ids"]]
    assert negatives
    assert not any("gull" in document_id or "ship" in document_id for document_id in negatives)


def test_an_invalid_regular_expression_is_reported_and_excludes_no_passage(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CuratedTREC has such; DPR passes over them."""
    _add_answers(folder, lambda query: ["("] if "ship" in query else [])
    lines = mined(folder, match="regex")
    assert lines[5]["negative_document_ids"] == mined(folder)[5]["negative_document_ids"]
    assert (
        "5 answers are not regular expressions, so that no passage holds them (such as query "
        "'q-ship-harbour', '(': missing ) at position 1)"
    ) in caplog.text


def test_a_regular_expression_that_would_take_years(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.retrieval.answers.SECONDS_PER_MATCH", 0.05)
    _add_answers(folder, lambda query: [r"(.|..)+\b\B"] if query == "q-ship-mast" else [])
    with pytest.raises(DataError, match=r"query 'q-ship-mast': answer .* takes more than 0\.05 s"):
        mined(folder, match="regex")
    assert not (folder.parent / "mined.jsonl").exists()


CHINESE = {"p1": "\u6e21\u8239\u5728\u6e2f\u53e3", "p2": "\u98ce\u8f66\u5728\u5c71\u4e0a"}


def test_text_without_blanks_between_words(
    beir_folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    queries = {"q1": "\u6e21\u8239", "q2": "\u98ce\u8f66", "q3": "gull"}
    train = {"q1": {"p1": 1}, "q2": {"p2": 1}}
    corpus = {**CHINESE, "p3": "gull", "p4": "a gull"}
    folder = beir_folder(corpus, queries, train=train, more={**train, "q3": {"p3": 1}})
    with pytest.raises(DataError, match=r"no passage for any of 2 queries.*set apart") as error:
        mined(folder)
    assert len(str(error.value)) < 500
    assert not (folder.parent / "mined.jsonl").exists()
    (folder / "qrels/more.tsv").replace(folder / "qrels/train.tsv")
    assert [len(line["negative_document_ids"]) for line in mined(folder)] == [0, 0, 1]
    assert "BM25 found no passage for 2 of 3 queries: they get no negatives" in caplog.text


def test_no_negatives_at_all_log_a_warning_with_the_reasons(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not any(line["negative_document_ids"] for line in mined(folder, rule=Rule(min_score=99)))
    assert "no query has any negative (passages left out: " in caplog.text
    assert "outside the range of scores" in caplog.text


def _add_answers(folder: Path, answers: Callable[[str], list[str]]) -> None:
    path = folder / "queries.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps({**record, "answers": answers(record["_id"])}) for record in records]
    path.write_text("\n".join(lines) + "\n")


def test_the_logged_counts(folder: Path) -> None:
    extra = [{"_id": "q-none", "text": "xyzzy"}, {"_id": "q-few", "text": "seen where gulls"}]
    with (folder / "queries.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in extra)
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q-none\tp-gull-mast\t1\nq-few\tp-gull-mast\t1\n")
    path = folder.parent / "mined.jsonl"
    report = mine(configured(folder, path, Rule(20, 25)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counts = [len(line["negative_document_ids"]) for line in lines]
    assert report.queries == len(lines) == 32
    assert report.negatives == sum(counts)
    assert report.without == counts.count(0) == 1
    assert report.short == sum(0 < count < 20 for count in counts) == 30
    # every positive is found but xyzzy's
    assert report.left_out["positives or of the same text"] == 31
    assert 0 < report.seconds < 60
    summary = "\n".join(report.summary(20))
    assert f"32 queries with {sum(counts) / 32:.1f} negatives on average" in summary
    assert "fewer than 20 negatives: 30 queries; none: 1 queries" in summary
    assert lines[30] | {"positive_scores": []} == {
        "query_id": "q-none",
        "query_text": "xyzzy",
        "positive_document_ids": ["p-gull-mast"],
        "negative_document_ids": [],
        "positive_scores": [],
        "negative_scores": [],
    }


def test_the_judgements_may_know_more_positives_than_the_training_file(folder: Path) -> None:
    (line,) = [line for line in mined(folder) if line["query_id"] == "q-ship-mast"]
    hardest = line["negative_document_ids"][0]
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write(f"q-ship-mast\t{hardest}\t1\n")
    given = folder.parent / "given.jsonl"
    given.write_text(json.dumps(line) + "\n")
    (again,) = mined(folder, train_dir=str(given))
    assert again["positive_document_ids"] == line["positive_document_ids"]
    assert again["negative_document_ids"][:4] == line["negative_document_ids"][1:]
    assert hardest not in again["negative_document_ids"]


def test_equal_requests_write_equal_files(folder: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        mined(folder, name, rule=Rule(5, 20, sample="random", seed=7))
    directory = folder.parent
    content = (directory / "a.jsonl.gz").read_bytes()
    assert content == (directory / "b.jsonl.gz").read_bytes()
    assert content[4:8] == bytes(4)  # gzip's place for the time


def test_batches_of_queries_do_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mined(folder)
    monkeypatch.setattr("mlflow_dr.retrieval.bm25.QUERIES_PER_BATCH", 7)
    assert mined(folder) == whole


def test_the_search_depth_covers_the_rule_and_the_positives(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    search = Bm25Retriever.search

    def watched(self, corpus, queries, k, also):  # type: ignore[no-untyped-def]
        asked.append(k)
        return search(self, corpus, queries, k, also)

    monkeypatch.setattr(Bm25Retriever, "search", watched)
    mined(folder)
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.writelines(f"q-gull-mast\tp-{s}-{p}\t1\n" for s in SUBJECTS[1:] for p in PLACES)
    mined(folder)
    mined(folder, rule=Rule(5, 30))
    assert asked == [21, 40, 56]


def test_from_python_in_one_line(folder: Path) -> None:
    found = mlflow_dr.mine(folder, output=folder.parent / "m.jsonl", negatives=3, depth=10)
    assert found.negatives == 90


def test_other_terms_find_other_negatives(folder: Path) -> None:
    scores = [
        [line["negative_scores"] for line in mined(folder, bm25=settings)]
        for settings in (Bm25Settings(), Bm25Settings(k1=0.1), Bm25Settings(language="none"))
    ]
    assert scores[0] != scores[1] != scores[2] != scores[0]


def test_an_existing_file_is_kept(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "there.jsonl"
    path.write_text("precious")
    with pytest.raises(UsageError, match="exists already; --force replaces it"):
        mine(configured(folder, path))
    assert path.read_text() == "precious"
    mine(configured(folder, path, force=True))
    assert len(path.read_text().splitlines()) == 30


@pytest.mark.parametrize("name", ["", "nowhere/mined.jsonl"])
def test_an_output_path_that_cannot_be_written_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UsageError, match=r"is a folder|does not exist"):
        mine(configured(folder, tmp_path / name))


def test_an_interrupted_run_leaves_no_partial_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "room"
    directory.mkdir()
    (directory / "old.jsonl").write_text("precious")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_count", interrupted)
    for name in ("new.jsonl", "new.jsonl.gz", "old.jsonl"):
        with pytest.raises(KeyboardInterrupt):
            mine(configured(folder, directory / name, force=True))
    assert [path.name for path in directory.iterdir()] == ["old.jsonl"]
    assert (directory / "old.jsonl").read_text() == "precious"


def test_weights_with_nan(folder: Path, make_tiny: Callable[..., Encoder], tmp_path: Path) -> None:
    encoder = make_tiny()
    encoder.backbone.embeddings.word_embeddings.weight.data[:] = float("nan")
    save_encoder(tmp_path / "encoder", encoder)
    with pytest.raises(CheckpointError, match="30 of 30 query vectors"):
        mined(folder, miner=str(tmp_path / "encoder"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bm52", "cannot mine with 'bm52': did you mean bm25?"),
        ("./nowhere", r"cannot mine with './nowhere': ./nowhere: not a directory"),
    ],
)
def test_a_missing_encoder_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mined(folder, miner=name)


def test_a_collection_without_training_examples(beir_folder: Folder, tmp_path: Path) -> None:
    folder = beir_folder({"p": "a ship"}, {"q": "ship"}, folder="other", test={"q": {"p": 1}})
    with pytest.raises(UsageError, match="has no split 'train'; it has: test"):
        mined(folder)


def test_examples_of_another_collection(folder: Path, beir_folder: Folder) -> None:
    other = beir_folder({"x": "a ship"}, {"q": "ship"}, folder="other", train={"q": {"x": 1}})
    with pytest.raises(DataError, match="check that examples and corpus belong together"):
        mined(folder, train_dir=str(other))
