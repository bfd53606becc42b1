"""Asyncval's files: what is read, what every malformed line is answered with, and its faults."""

import gzip
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from transformers import AutoTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from mlflow_dr.collection.asyncval import (
    AsyncvalFiles,
    given_collection,
)
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.catalogue import Collection, open_collection
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.validation.dataset import CorpusTokens, EvalDataset
from mlflow_dr.validation.evaluate import evaluate_all
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig

Write = Callable[..., Path]
Tokens = Callable[[str], list[int]]

SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "diver", "pilot", "star")
PLACES = ("harbour", "wreck", "mast", "island", "channel", "horizon", "port")


def lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two files of passages, two sets of queries, and judgements of both in one file."""
    lines(tmp_path / "corpus/split00.json", [{"text_id": "p1", "text": "Cork swims."}])
    lines(tmp_path / "corpus/split01.jsonl", [{"text_id": "p2", "text": "Iron sinks."}])
    lines(tmp_path / "dev.query.json", [{"text_id": "q1", "text": "what swims"}])
    lines(tmp_path / "test.json", [{"text_id": "q2", "text": "what sinks"}])
    (tmp_path / "qrels.tsv").write_text("q1\t0\tp1\t1\nq2\t0\tp2\t1\n")
    return tmp_path


def opened(base: Path, queries: Sequence[str] = ("dev.query.json", "test.json")) -> AsyncvalFiles:
    return AsyncvalFiles(base / "corpus", [base / name for name in queries], [base / "qrels.tsv"])


def passages_of(collection: Collection) -> list[Passage]:
    corpus = collection.corpus()
    return corpus.passages(range(len(corpus)))


def records_of(folder: Path, file: str) -> Iterator[tuple[str, str]]:
    for line in (folder / file).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        yield record["_id"], f"{record.get('title', '')} {record['text']}".strip()


def converted(folder: Path, base: Path, tokens: Tokens | None = None) -> AsyncvalFiles:
    """A BEIR folder's collection in Asyncval's files: passages in two files, a file for each split.

    As Asyncval's own scripts do it: the title before the text, and token ids without special ones.
    """

    def record(key: str, text: str) -> dict[str, Any]:
        return {"text_id": key, "text": tokens(text) if tokens else text}

    passages = [record(*fields) for fields in records_of(folder, "corpus.jsonl")]
    middle = len(passages) // 2
    for number, part in enumerate((passages[:middle], passages[middle:])):
        lines(base / f"corpus/split{number:02d}.json", part)
    queries = dict(records_of(folder, "queries.jsonl"))
    judged: list[str] = []
    files = []
    for path in sorted((folder / "qrels").glob("*.tsv")):
        rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        judged += [f"{query_id}\t0\t{passage_id}\t{rel}\n" for query_id, passage_id, rel in rows]
        ids = dict.fromkeys(query_id for query_id, _, _ in rows)
        files.append(
            lines(
                base / f"{path.stem}.json",
                [record(i, queries[i]) for i in ids],
            )
        )
    (base / "qrels.txt").write_text("".join(judged))
    return AsyncvalFiles(base / "corpus", files, [base / "qrels.txt"])


def test_passages_in_the_order_of_the_files_and_a_split_for_each_query_file(
    base: Path,
) -> None:
    collection = opened(base)
    assert collection.splits == ["dev.query", "test"]
    assert passages_of(collection) == [
        Passage("p1", "", "Cork swims."),
        Passage("p2", "", "Iron sinks."),
    ]
    topics = collection.topics("test")
    assert topics.queries == [Query("q2", "what sinks")]
    assert topics.qrels == {"q2": {"p2": 1}}


def test_one_file_of_passages_packed_files_and_numbers_as_ids(base: Path) -> None:
    packed = base / "all.json.gz"
    packed.write_bytes(gzip.compress(b'{"text_id": 7, "text": "Cork", "more": 1}\n'))
    (base / "qrels.tsv").write_text("q1\t0\t7\t1\n")
    collection = AsyncvalFiles(packed, [base / "dev.query.json"], [base / "qrels.tsv"])
    assert passages_of(collection) == [Passage("7", "", "Cork")]
    assert collection.topics("dev.query").qrels == {"q1": {"7": 1}}


def test_text_that_is_tokenised(base: Path) -> None:
    lines(base / "corpus/split00.json", [{"text_id": "p1", "text": [2, 3]}])
    lines(base / "corpus/split01.jsonl", [{"text_id": "p2", "text": []}])
    lines(base / "dev.query.json", [{"text_id": "q1", "text": [4]}])
    collection = opened(base)
    assert passages_of(collection) == [Passage("p1", "", "", [2, 3]), Passage("p2", "", "", [])]
    topics = collection.topics("dev.query")
    assert topics.queries == [Query("q1", "", (), [4])]
    lines(base / "dev.query.json", [{"text_id": "q1", "text": [5]}])
    assert opened(base).topics("dev.query").digest != topics.digest


@pytest.mark.parametrize(
    "qrels",
    ["q1\t0\tp1\t1\n", "q1 Q0 p1 1\n", "q1\tp1\t1\n", "query-id\tcorpus-id\tscore\nq1 p1 1"],
)
def test_layouts_of_judgements(base: Path, qrels: str) -> None:
    (base / "qrels.tsv").write_text(qrels)
    assert opened(base, ["dev.query.json"]).topics("dev.query").qrels == {"q1": {"p1": 1}}


def test_judgements_for_each_query_file_in_their_order(base: Path) -> None:
    (base / "other.tsv").write_text("q2\t0\tp1\t2\n")
    queries = [base / "dev.query.json", base / "test.json"]
    collection = AsyncvalFiles(base / "corpus", queries, [base / "qrels.tsv", base / "other.tsv"])
    assert collection.topics("test").qrels == {"q2": {"p1": 2}}


def test_a_corpus_is_read_once_and_again_when_a_file_has_changed(
    base: Path, own_cache: Path
) -> None:
    first = opened(base).corpus().digest
    assert opened(base).corpus().digest == first
    assert len(list((own_cache / "corpora").glob("*/corpus.arrow"))) == 1
    lines(base / "corpus/split02.json", [{"text_id": "p3", "text": "More."}])
    assert opened(base).corpus().digest != first


GOOD = '{"text_id": "a", "text": "1"}\n'
MALFORMED = [
    pytest.param("{not json", "not JSON", id="not JSON"),
    pytest.param('["a"]', "expected 'object', got 'array'", id="no object"),
    pytest.param('{"_id": "b", "text": "t"}', "no 'text_id'; it has _id, text", id="no id"),
    pytest.param('{"text_id": "", "text": "t"}', "an id is empty", id="empty id"),
    pytest.param(
        '{"text_id": 1.5, "text": "t"}',
        "text_id: expected 'int | str', got 'float'",
        id="fraction as id",
    ),
    pytest.param('{"text_id": "b"}', "no 'text'; it has text_id", id="no text"),
    pytest.param('{"text_id": "b", "text": null}', "text: expected .* got 'null'", id="null text"),
    pytest.param(
        '{"text_id": "b", "text": ["t"]}', r"text\[0\]: expected 'int', got 'str'", id="words"
    ),
    pytest.param(
        '{"text_id": "b", "text": [1, -1]}', r"text\[1\]: expected 'int' >= 0", id="below 0"
    ),
    pytest.param(
        '{"text_id": "b", "text": [true]}', r"text\[0\]: expected 'int', got 'bool'", id="booleans"
    ),
    pytest.param('{"text_id": "b", "text": [1.0]}', "expected 'int', got 'float'", id="fractions"),
    pytest.param(
        '{"text_id": "b", "text": [2147483648]}', "expected 'int' <= 2147483647", id="too large"
    ),
    pytest.param('{"text_id": "b", "text": [1]}', "is token ids, those before it", id="mixed"),
    pytest.param('{"text_id": "a", "text": "2"}', "id 'a' is used twice; .*:1$", id="twice"),
]


@pytest.mark.parametrize(("line", "message"), MALFORMED)
def test_a_malformed_line_is_named(base: Path, line: str, message: str) -> None:
    for file, ask in (
        ("test.json", lambda: opened(base).topics("test")),
        ("corpus/split01.jsonl", lambda: opened(base).corpus()),
    ):
        (base / file).write_text(f"{GOOD}\n{line}\n")
        with pytest.raises(DataError, match=rf"{file}:3: .*{message}") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_an_id_that_another_file_has_used_names_both(base: Path) -> None:
    lines(base / "corpus/split01.jsonl", [{"text_id": "p1", "text": "again"}])
    with pytest.raises(DataError, match=r"split01\.jsonl:1: passage id 'p1' .*split00\.json:1$"):
        opened(base).corpus()


def test_missing_files_are_named(base: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: cannot be read"):
        AsyncvalFiles(base / "nowhere", [base / "test.json"], [base / "qrels.tsv"]).corpus()
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        AsyncvalFiles(base, [base / "nowhere.json"], [base / "qrels.tsv"]).topics("nowhere")
    (base / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: expected files of passages .*, there are none"):
        AsyncvalFiles(base / "empty", [base / "test.json"], [base / "qrels.tsv"]).corpus()
    (base / "empty/part.json").write_text("\n")
    with pytest.raises(DataError, match=r"part\.json: the corpus has no passages"):
        AsyncvalFiles(base / "empty", [base / "test.json"], [base / "qrels.tsv"]).corpus()


def test_unusable_queries_and_judgements_are_counted(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [
        {"text_id": "q1", "text": " "},
        {"text_id": "q3", "text": "what swims"},
        {"text_id": "q4", "text": "not judged"},
    ]
    lines(base / "dev.query.json", records)
    (base / "qrels.tsv").write_text("q1\t0\tp1\t1\nq3\t0\tp1\t1\nq3\t0\tp9\t1\nq5\t0\tp1\t1\n")
    assert opened(base, ["dev.query.json"]).topics("dev.query").qrels == {"q3": {"p1": 1}}
    log = caplog.text
    assert "1 judgements name passages that the corpus lacks (such as 'p9')" in log
    assert "1 judged queries are not in the query file (such as 'q5')" in log
    assert "1 judged queries have no text (such as 'q1')" in log
    assert "1 queries are not judged (such as 'q4')" in log


def test_a_tokenised_query_without_tokens_is_empty(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"text_id": "q1", "text": []}, {"text_id": "q2", "text": [3]}]
    lines(base / "dev.query.json", records)
    assert [query.id for query in opened(base, ["dev.query.json"]).topics("dev.query").queries] == [
        "q2"
    ]
    assert "1 judged queries have no text (such as 'q1')" in caplog.text


def test_no_remaining_judgement_is_an_error(base: Path) -> None:
    (base / "qrels.tsv").write_text("q1\t0\tp9\t1\n")
    with pytest.raises(DataError, match=r"qrels\.tsv for dev\.query\.json: no judgement is left"):
        opened(base).topics("dev.query")


def test_numbers_of_files_that_do_not_match(base: Path) -> None:
    query, qrels = base / "test.json", base / "qrels.tsv"
    with pytest.raises(UsageError, match="0 query files and 1 files of judgements"):
        AsyncvalFiles(base, [], [qrels])
    with pytest.raises(UsageError, match="1 query files and 2 files of judgements"):
        AsyncvalFiles(base, [query], [qrels, qrels])
    with pytest.raises(UsageError, match="two query files are called 'test'"):
        AsyncvalFiles(base, [query, base / "other/test.jsonl"], [qrels])


def test_training_and_unknown_splits_are_refused(base: Path) -> None:
    with pytest.raises(UsageError, match="no training examples"):
        opened(base).examples()
    with pytest.raises(UsageError, match=r"no split 'dev'; it has: dev\.query, test"):
        opened(base).topics("dev")


def test_another_process_opens_it_by_its_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the paths have in them, and in whatever folder that process is."""
    odd = base / "a b&c=d?e%20#f+g@é"
    odd.mkdir()
    for name in ("corpus", "dev.query.json", "qrels.tsv"):
        (base / name).rename(odd / name)
    monkeypatch.chdir(base)
    files = (Path(odd.name) / name for name in ("corpus", "dev.query.json", "qrels.tsv"))
    corpus, queries, qrels = files
    name = AsyncvalFiles(corpus, [queries], [qrels]).name
    assert unquote(name) == (
        f"asyncval:{odd}/corpus?queries={odd}/dev.query.json&qrels={odd}/qrels.tsv"
    )
    code = (
        "import sys; from mlflow_dr.collection.catalogue import open_collection\n"
        "found = open_collection(sys.argv[1])\n"
        "print(found.name, found.corpus().digest, found.topics('dev.query').digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd="/", capture_output=True, text=True, check=True
    )
    here = open_collection(name)
    assert done.stdout.split() == [*(name, here.corpus().digest, here.topics("dev.query").digest)]
    assert str(odd) in here.source


def test_a_name_may_be_typed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    typed = "asyncval:corpus?queries=dev.query.json&queries=test.json&qrels=qrels.tsv"
    assert open_collection(typed).name == opened(base).name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "asyncval:",
            "asyncval:corpus",
            "asyncval:?queries=a&qrels=b",
            "asyncval:c?queries=&qrels=b",
        ),
        *("asyncval:c?query=a&qrels=b", "asyncval:c?queries=a&", "asyncval:c?queries=a,qrels=b&x"),
    ],
)
def test_a_name_of_another_form(name: str) -> None:
    with pytest.raises(UsageError, match=r"expected asyncval:CANDIDATES\?queries=FILE&qrels=FILE"):
        open_collection(name)


def test_a_name_without_judgements() -> None:
    with pytest.raises(UsageError, match="1 query files and 0 files of judgements"):
        open_collection("asyncval:c?queries=a")


def test_a_dataset_is_given_by_name_or_by_files(base: Path) -> None:
    flags = ("dataset", "candidates", "queries", "qrels")
    corpus, query, qrels = base / "corpus", base / "test.json", base / "qrels.tsv"
    name = AsyncvalFiles(corpus, [query], [qrels]).name
    assert given_collection(None, ([], [], []), flags) == (None, ())
    assert given_collection("demo", ([], [], []), flags) == ("demo", ())
    assert given_collection(None, ([corpus], [query], [qrels]), flags) == (name, ["test"])
    with pytest.raises(UsageError, match=r"^here: give dataset, or .*; there is no queries, no qr"):
        given_collection(None, ([corpus], [], []), flags, "here: ")
    for wrong in (("demo", [corpus]), (None, [corpus, corpus])):
        with pytest.raises(UsageError, match=r"give dataset, or candidates \(once\), queries and"):
            given_collection(wrong[0], (wrong[1], [query], [qrels]), flags)


# What Asyncval does wrong with its inputs, by its number in the list of the peers' errors; the
# others are not about inputs.


@pytest.fixture
def folder(beir_folder: Write) -> Path:
    corpus: dict[str, Any] = {
        f"{subject}-{place}": (subject, f"the {subject} at the {place} " * (1 + len(place) % 3))
        for subject in SUBJECTS
        for place in PLACES
    }
    corpus["long"] = "the pilot counts the ships that pass the lighthouse at night " * 20
    queries = {"q1": "gull harbour", "q2": "which ship is at the island", "q3": "otter"}
    return beir_folder(
        corpus,
        {**queries, "q4": "the storm " * 40},
        dev={
            "q1": {"gull-harbour": 2, "gull-mast": 1, "star-port": 0},
            "q2": {"ship-island": 1},
        },
        test={"q3": {f"otter-{place}": 1 for place in PLACES}, "q4": {"long": 1}},
    )


def evaluated(
    encoder: Encoder,
    collection: Collection,
    measures: str = "RR@10 nDCG@10 R@20 AP@50",
    **more: Any,
) -> dict[str, Report]:
    settings = EvalConfig(parse_measures(measures), device="cpu", dtype="fp32", **more)
    searched = CorpusTokens(collection)
    asked = [(EvalDataset(collection, split, searched), settings) for split in collection.splits]
    return dict(zip(collection.splits, evaluate_all(encoder, asked, quiet=True), strict=True))


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True, query_max_length=12, passage_max_length=24)


@pytest.fixture
def bare(encoder: Encoder) -> Tokens:
    return lambda text: encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("tokenised", [False, True])
def test_measures_are_those_of_the_collection_in_beirs_layout(
    tokenised: bool, folder: Path, tmp_path: Path, encoder: Encoder, bare: Tokens
) -> None:
    collection = converted(folder, tmp_path / "asyncval", bare if tokenised else None)
    expected, found = (evaluated(encoder, dataset) for dataset in (BeirFolder(folder), collection))
    assert list(found) == ["dev", "test"]
    for split, report in expected.items():
        assert found[split].measures == pytest.approx(report.measures, abs=1e-6)
        assert found[split].per_query.keys() == report.per_query.keys()
        assert any(0 < value < 1 for value in report.measures.values())


def test_a_depth_beyond_the_corpus_finds_no_passage_twice(
    base: Path, make_tiny: Callable[..., Encoder]
) -> None:
    report = evaluated(make_tiny(), opened(base), "RR@10", depth=100)["test"]
    ((query_id, found),) = report.ranking.items()
    assert (query_id, sorted(pid for pid, _ in found)) == ("q2", ["p1", "p2"])
    assert all(abs(score) < 1e6 for _, score in found)


def test_a_passage_below_the_tenth_rank_adds_nothing_to_rr_10(
    folder: Path, tmp_path: Path, encoder: Encoder
) -> None:
    collection = converted(folder, tmp_path / "asyncval")
    before = evaluated(encoder, collection, depth=100)["dev"]
    eleventh = before.ranking["q2"][10][0]
    (tmp_path / "asyncval/qrels.txt").write_text(f"q2\t0\t{eleventh}\t1\nq3\t0\tlong\t1\n")
    after = evaluated(encoder, collection, "RR@10 RR@11", depth=100)["dev"]
    assert after.measures == {"mrr@10": 0.0, "mrr@11": pytest.approx(1 / 11)}


def test_queries_of_other_sets_do_not_count(
    folder: Path, tmp_path: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    """Sets that share their judgements, and have ids in common, are measured as if alone."""
    together = converted(folder, tmp_path / "asyncval")
    base = tmp_path / "asyncval"
    with (base / "test.json").open("a") as file:
        file.write(json.dumps({"text_id": "q1", "text": "gull harbour"}) + "\n")
    found = evaluated(encoder, together)
    assert {key: set(report.per_query) for key, report in found.items()} == {
        "dev": {"q1", "q2"},
        "test": {"q1", "q3", "q4"},
    }
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for split in together.splits:
        alone = AsyncvalFiles(base / "corpus", [base / f"{split}.json"], [base / "qrels.txt"])
        assert evaluated(encoder, alone)[split].measures == pytest.approx(found[split].measures)
    assert "2 judged queries are not in the query file" in caplog.text


def test_stray_files_are_skipped(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = opened(base).corpus().digest
    (base / "corpus/README.md").write_text("no JSON")
    (base / "corpus/split02.json.tmp").write_text("{")
    (base / "corpus/.split00.json.swp.json").write_text("{")
    (base / "corpus/older.json").mkdir()
    with caplog.at_level(logging.INFO):
        assert opened(base).corpus().digest == digest
    assert "corpus: skipped 3 other files (such as README.md)" in caplog.text


def test_an_incomplete_corpus_is_refused(base: Path) -> None:
    link = base / "corpus/split02.jsonl"
    link.symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"split02\.jsonl: a link to gone\.jsonl, which does not"):
        opened(base).corpus()
    link.unlink()
    lines(base / "corpus/more-1-of-2.json", [{"text_id": "p3", "text": "Oil floats."}])
    with pytest.raises(DataError, match=r"more-0-of-2\.json is missing; there are 1 of 2"):
        opened(base).corpus()


def test_a_nul_character_in_a_file_name() -> None:
    with pytest.raises(UsageError, match="no file can have a NUL character in its name"):
        open_collection("asyncval:a%00b?queries=q.json&qrels=q.tsv")


def test_rows_give_the_requested_passages(folder: Path, tmp_path: Path, bare: Tokens) -> None:
    corpus = converted(folder, tmp_path / "asyncval", bare).corpus()
    ids = ["long", "gull-mast", "long", "nobody"]
    rows = corpus.rows_of(ids)
    assert rows[3] == -1
    assert [passage.id for passage in corpus.passages(rows[:3])] == ids[:3]


# Token ids as Asyncval's tokenizer makes them


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, 8, 32])
def test_ids_are_cut_and_framed_as_by_asyncvals_tokenizer(
    minilm: Path, length: int, side: str
) -> None:
    """Asyncval calls a slow tokenizer: `encode_plus(ids, truncation="only_first")`."""
    slow = BertTokenizerLegacy(str(minilm / "vocab.txt"), truncation_side=side)
    fast = AutoTokenizer.from_pretrained(minilm, truncation_side=side)
    config = EncoderConfig(query_max_length=length, passage_max_length=length)
    made = TextTokenizer(fast, config)
    text = "the tide tables are printed a year ahead by the port authority"
    bare = slow.convert_tokens_to_ids(slow.tokenize(text))
    rows = [[], bare[:1], bare[: length - 2], bare[: length - 1], bare]
    expected = [
        slow(row, max_length=length, truncation="only_first", padding=False)["input_ids"]
        if row
        else slow.build_inputs_with_special_tokens([])
        for row in rows
    ]
    assert made.query_ids([Query("q", "", (), row) for row in rows]) == expected
    assert made.passage_ids([Passage("p", "", "", row) for row in rows]) == expected
    assert len(expected[-1]) == min(length, len(bare) + 2)
    assert made.query_ids([Query("q", text)]) == expected[-1:]


def test_queries_of_text_and_of_token_ids_side_by_side(encoder: Encoder, bare: Tokens) -> None:
    """Two validations over one corpus put their queries together."""
    made = TextTokenizer.of(encoder)
    texts = ["the ship", "gulls at night", "storm"]
    queries = [Query("1", texts[0]), Query("2", "", (), bare(texts[1])), Query("3", texts[2])]
    assert made.query_ids(queries) == made.query_ids([Query("", text) for text in texts])


def test_token_ids_of_another_vocabulary_end_a_validation(
    base: Path, encoder: Encoder, bare: Tokens
) -> None:
    lines(base / "dev.query.json", [{"text_id": "q1", "text": [999_999]}])
    lines(base / "test.json", [{"text_id": "q2", "text": bare("what")}])
    with pytest.raises(DataError, match=r"token id 999999, but this tokenizer's ids end at"):
        evaluated(encoder, opened(base), "RR@10")
