"""Tevatron's repositories, read by the hub's own libraries from a cache that the tests fill."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlflow_dr.collection import hub as hub_module
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.hub import HubCollection, hub_collection, msmarco_passage
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, UsageError

EXAMPLES = "Tevatron/msmarco-passage"
CORPUS = "Tevatron/msmarco-passage-corpus"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

PASSAGES = [
    {"docid": "0", "title": "-", "text": "success of the project"},
    {"docid": "1", "title": None, "text": "the Manhattan project"},
    {"docid": "2", "title": "Essay", "text": "a third"},
]
TRAIN = [
    {
        "query_id": "7",
        "query": "one",
        "positive_passages": [PASSAGES[0]],
        "negative_passages": [PASSAGES[1], PASSAGES[2]],
    },
    {
        "query_id": "8",
        "query": "two",
        "positive_passages": [PASSAGES[1], PASSAGES[2]],
        "negative_passages": [],
    },
]


class HubCache:
    """A cache of the hub, in its own layout: blobs aside, `refs/main` and one snapshot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, repo: str, name: str, rows: list[dict[str, Any]] | bytes) -> Path:
        repository = self._folder / f"datasets--{repo.replace('/', '--')}"
        file = repository / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(COMMIT)
        if isinstance(rows, bytes):
            file.write_bytes(rows)
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            file.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        return file


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """An empty cache, without network; both libraries settle theirs when they are imported."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "cache"))
    return HubCache(tmp_path / "hub")


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home of ir_datasets with the unpacked files of `msmarco-passage/dev/small`."""
    folder = tmp_path / "ir_datasets/msmarco-passage/dev/small"
    folder.mkdir(parents=True)
    (folder / "queries.tsv").write_text("300\twho built it\n301\tunjudged\n")
    (folder / "qrels").write_text("300\t0\t1\t1\n")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "ir_datasets"))
    for variable in ("IR_DATASETS_DL_TRIES", "IR_DATASETS_DL_TIMEOUT"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("IR_DATASETS_DL_DISABLE_PBAR", "true")
    imported = [name for name in sys.modules if name.split(".")[0] == "ir_datasets"]
    for name in imported:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "ir_datasets"]:
        del sys.modules[name]


@pytest.fixture
def hub_without_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    _connect(monkeypatch, server.server_port)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_corpus_has_tevatrons_rows_under_our_names(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    corpus = msmarco_passage().corpus()
    assert next(corpus.batches()) == [
        Passage("0", "-", "success of the project"),
        Passage("1", "", "the Manhattan project"),
        Passage("2", "Essay", "a third"),
    ]
    assert corpus.rows_of(["2", "0"]).tolist() == [2, 0]


def test_the_corpus_is_mapped_from_disk(hub: HubCache) -> None:
    rows = [{"docid": str(number), "title": "", "text": "x" * 1000} for number in range(2000)]
    hub.put(CORPUS, "corpus.jsonl.gz", rows)
    before = pa.total_allocated_bytes()
    corpus = msmarco_passage().corpus()
    assert len(corpus) == 2000
    assert pa.total_allocated_bytes() - before < 100_000  # the texts alone are 2 MB


def test_equal_contents_have_equal_digests_whatever_the_format(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    same = [Passage(row["docid"], row["title"] or "", row["text"]) for row in PASSAGES]
    assert msmarco_passage().corpus().digest == cached_corpus("same", same).digest


def test_passages_are_checked_and_digested_once(
    hub: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    digest = msmarco_passage().corpus().digest
    monkeypatch.setattr(hub_module, "check_passages", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(Corpus, "digest", property(lambda corpus: corpus._digest))
    assert msmarco_passage().corpus().digest == digest


def test_a_file_that_was_replaced_is_read_again(hub: HubCache) -> None:
    """Commit, size and time stay the same.

    `datasets` alone would return the rows it read before.
    """
    file = hub.put(CORPUS, "corpus.jsonl", PASSAGES)
    before, state = msmarco_passage().corpus(), file.stat()
    time.sleep(0.02)  # longer than the clock of a file system needs to tick
    file.write_bytes(file.read_bytes().replace(b"project", b"PROJECT"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    after = msmarco_passage().corpus()
    assert [before[0].text, after[0].text] == ["success of the project", "success of the PROJECT"]
    assert before.digest != after.digest


def test_damaged_rows_in_the_cache_are_read_again(
    hub: HubCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put(CORPUS, "corpus.jsonl", PASSAGES)
    before = msmarco_passage().corpus()
    passages = next(before.batches())
    (rows,) = (tmp_path / "cache/hub").glob("*/*.arrow")
    rows.write_bytes(rows.read_bytes().replace(b"project", b"prospect"))
    after = msmarco_passage().corpus()
    assert (next(after.batches()), after.digest) == (passages, before.digest)
    assert [record for record in caplog.messages if "damaged" in record and "again" in record]


def test_whole_numbers_are_taken_as_ids(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl", [{"docid": 12, "title": None, "text": "a"}])
    passage = {"docid": 12, "title": None, "text": "a"}
    row = {"query_id": 3, "query": "q", "positive_passages": [passage], "negative_passages": []}
    hub.put(EXAMPLES, "train.jsonl", [row])
    collection = msmarco_passage()
    assert collection.corpus()[0] == Passage("12", "", "a")
    example = collection.examples()[0]
    assert example.query.id == "3"
    assert collection.examples().passages.passages(example.positives) == [Passage("12", "", "a")]


def test_the_judged_queries_are_those_of_ir_datasets(hub: HubCache, judged: None) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    collection = msmarco_passage()
    assert collection.splits == ["dev"]
    topics = collection.topics("dev")
    assert topics.queries == [Query("300", "who built it")]
    assert topics.qrels == {"300": {"1": 1}}


def test_an_example_has_its_query_positives_and_negatives(hub: HubCache) -> None:
    hub.put(EXAMPLES, "train.jsonl.gz", TRAIN)
    examples = msmarco_passage().examples()
    assert len(examples) == 2
    query, positives, negatives, scores = examples[0]
    assert query == Query("7", "one")
    assert examples.passages.passages(positives) == [Passage("0", "-", "success of the project")]
    assert [passage.id for passage in examples.passages.passages(negatives)] == ["1", "2"]
    assert scores is None
    assert [passage.id for passage in examples.passages.passages(examples[1].positives)] == [
        "1",
        "2",
    ]
    assert examples[1].negatives.tolist() == []
    with pytest.raises(IndexError):
        examples[2]


def test_rows_that_cannot_be_trained_on_are_left_out_and_counted_once(
    hub: HubCache, caplog: pytest.LogCaptureFixture
) -> None:
    unusable = [
        dict(TRAIN[0], query=None),
        dict(TRAIN[0], query=" "),
        dict(TRAIN[0], positive_passages=[]),
    ]
    hub.put(EXAMPLES, "train.jsonl.gz", [unusable[0], TRAIN[0], *unusable[1:], TRAIN[1]])
    examples = msmarco_passage().examples()
    assert [examples[index].query.id for index in range(len(examples))] == ["7", "8"]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "train.jsonl.gz): left out: 2 records without a query (such as" in warning
    assert "1 records without a usable positive passage (such as" in warning


def test_nothing_is_read_before_it_is_needed(hub: HubCache) -> None:
    collection = msmarco_passage()  # neither repository is there
    hub.put(EXAMPLES, "train.jsonl.gz", TRAIN)
    assert len(collection.examples()) == 2  # the corpus still is not
    with pytest.raises(DataError, match=CORPUS):
        collection.corpus()


def test_parquet_shards_are_read_in_order(hub: HubCache) -> None:
    for shard, row in enumerate(PASSAGES):
        hub.put("a/b", f"data/corpus-0000{shard}-of-00003.parquet", [row])
    assert _collection("a/b").corpus().ids.to_pylist() == ["0", "1", "2"]


def test_rows_in_two_formats_are_read_once(hub: HubCache) -> None:
    hub.put("a/b", "corpus.jsonl.gz", PASSAGES)
    hub.put("a/b", "corpus.parquet", PASSAGES)
    assert len(_collection("a/b").corpus()) == 3


def test_other_splits_files_are_not_read(hub: HubCache) -> None:
    hub.put(EXAMPLES, "train.jsonl.gz", TRAIN)
    hub.put(EXAMPLES, "dev.jsonl.gz", TRAIN)
    assert len(msmarco_passage().examples()) == 2


@pytest.mark.parametrize("ask", [HubCollection.corpus, HubCollection.examples])
def test_offline_without_a_cache_is_an_error_that_says_what_to_do(
    ask: Callable[[HubCollection], Any],
) -> None:
    repo = CORPUS if ask is HubCollection.corpus else EXAMPLES
    with pytest.raises(DataError) as caught:
        ask(msmarco_passage())
    message = str(caught.value)
    assert f"Hugging Face {repo}: incomplete in the cache" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert f"HF_HUB_CACHE to a cache that `hf download --repo-type dataset {repo}`" in message
    assert "\n" not in message


def test_no_network_without_a_cache_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    _connect(monkeypatch, port)
    with pytest.raises(DataError, match=r"the hub cannot be reached; connect to the network"):
        msmarco_passage().corpus()


def test_no_network_with_a_cache_reads_the_cache(
    hub: HubCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    _connect(monkeypatch, port)
    assert len(msmarco_passage().corpus()) == 3


def test_a_repository_that_does_not_exist_is_an_error(hub_without_the_repository: None) -> None:
    with pytest.raises(DataError, match=r"a/b: cannot be downloaded \(RepositoryNotFoundError"):
        _collection("a/b").corpus()


def test_a_repository_without_the_file_is_an_error_that_names_it(hub: HubCache) -> None:
    hub.put(CORPUS, "README.md", b"")
    with pytest.raises(DataError, match=rf"{CORPUS}: no corpus.jsonl.gz, .jsonl or .parquet in"):
        msmarco_passage().corpus()


def test_a_truncated_file_is_an_error_that_says_how_to_replace_it(hub: HubCache) -> None:
    file = hub.put(CORPUS, "corpus.jsonl.gz", PASSAGES)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"corpus.jsonl.gz\): cannot be read .*--force-download"):
        msmarco_passage().corpus()


@pytest.mark.parametrize("content", [b"", b'{"docid": "0", "tit\n'])
def test_a_file_that_is_no_json_lines_is_an_error(hub: HubCache, content: bytes) -> None:
    hub.put(CORPUS, "corpus.jsonl", content)
    with pytest.raises(DataError, match=r"corpus.jsonl\): cannot be read"):
        msmarco_passage().corpus()


def test_a_missing_column_of_the_corpus_is_an_error_that_names_the_columns(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", [{"_id": "0", "text": "a"}])
    expected = r"no column docid; it has _id, text, title, expected docid, title, text"
    with pytest.raises(DataError, match=expected):
        msmarco_passage().corpus()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"query": "one"}, r"train.jsonl.gz:1: a record with the fields query; .*DPR \("),
        (dict(TRAIN[0], query=1), r"gz:1: query: expected 'str \| null', got 'int'"),
        (dict(TRAIN[0], positive_passages="p"), "gz:1: positive_passages: expected .* got 'str'"),
        (
            dict(TRAIN[0], positive_passages=["p"]),
            r"positive_passages\[0\]: expected 'object', got 'str'",
        ),
        (dict(TRAIN[0], negative_passages=[{"docid": "n"}]), r"negative_passages\[0\]: no 'text'"),
        (
            dict(TRAIN[0], negative_passages=[dict(PASSAGES[0], text=2.5)]),
            r"negative_passages\[0\]\.text: expected 'str', got 'float'",
        ),
    ],
)
def test_examples_of_another_layout_are_an_error_that_names_the_column(
    hub: HubCache, row: dict[str, Any], expected: str
) -> None:
    hub.put(EXAMPLES, "train.jsonl.gz", [row])
    with pytest.raises(DataError, match=expected):
        msmarco_passage().examples()


def test_an_example_passage_without_text_is_an_error(hub: HubCache) -> None:
    negatives = [PASSAGES[0], dict(PASSAGES[1], text=None)]
    hub.put(EXAMPLES, "train.jsonl.gz", [dict(TRAIN[0], negative_passages=negatives)])
    with pytest.raises(
        DataError, match=r"negative_passages\[1\]\.text: expected 'str', got 'null'; if a file is"
    ):
        msmarco_passage().examples()


def test_no_row_to_train_on_is_an_error(hub: HubCache) -> None:
    hub.put(EXAMPLES, "train.jsonl.gz", [dict(TRAIN[0], positive_passages=[])])
    with pytest.raises(
        DataError, match=r"none of 1 records can be trained on: 1 records without a us"
    ):
        msmarco_passage().examples()


def test_repeated_passage_ids_are_an_error_every_time(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", [*PASSAGES, PASSAGES[1]])
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 passages repeat an id \(such as '1'\)"):
            msmarco_passage().corpus()


def test_a_passage_without_text_is_an_error(hub: HubCache) -> None:
    hub.put(CORPUS, "corpus.jsonl.gz", [*PASSAGES, {"docid": "3", "title": "", "text": None}])
    with pytest.raises(DataError, match="1 of 4 passages have no text"):
        msmarco_passage().corpus()


NQ = "Tevatron/wikipedia-nq"
JUDGED = {"query_id": "1", "query": "who", "answers": ["she"], "positive_passages": [PASSAGES[1]]}


def test_positives_of_the_dev_file_are_the_judgements(
    hub: HubCache, caplog: pytest.LogCaptureFixture
) -> None:
    gone = dict(PASSAGES[0], docid="gone")
    rows = [
        JUDGED,
        {**JUDGED, "query_id": "2", "positive_passages": [PASSAGES[0], gone]},
        {**JUDGED, "query_id": "3", "positive_passages": []},
    ]
    hub.put(NQ, "dev.jsonl.gz", rows)
    hub.put(NQ, "test.jsonl.gz", [{"query_id": "9", "query": "where", "answers": ["here"]}])
    hub.put(NQ, "validation.jsonl", [{**JUDGED, "positive_passages": []}])
    hub.put(f"{NQ}-corpus", "corpus.jsonl.gz", PASSAGES)
    collection = hub_collection(NQ)
    assert collection.splits == ["dev"]  # the others judge nothing
    topics = collection.topics("dev")
    assert topics.queries == [Query("1", "who", ("she",)), Query("2", "who", ("she",))]
    assert topics.qrels == {"1": {"1": 1}, "2": {"0": 1}}
    assert "1 judgements name passages that the corpus lacks (such as 'gone')" in caplog.text


def test_a_repository_without_judged_files_has_no_splits(hub: HubCache) -> None:
    hub.put(NQ, "train.jsonl.gz", TRAIN)
    assert hub_collection(NQ).splits == []


def test_a_damaged_dev_file_is_an_error(hub: HubCache) -> None:
    file = hub.put(NQ, "dev.jsonl.gz", [JUDGED])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"Hugging Face {NQ}: .*damaged.*--force-download"):
        _ = hub_collection(NQ).splits


def test_passages_of_the_examples_need_no_corpus_repository(hub: HubCache) -> None:
    hub.put(NQ, "train.jsonl.gz", [dict(TRAIN[0], answers=["a"]), TRAIN[1]])
    examples = hub_collection(NQ).examples()
    assert examples[0].query == Query("7", "one", ("a",))
    assert examples.passages.ids.to_pylist() == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["train.jsonl", "data/train-00000-of-00001.parquet"])
def test_examples_by_id_are_looked_up_in_the_corpus_repository(hub: HubCache, name: str) -> None:
    row = {
        "query_id": "7",
        "query_text": "one",
        "query_image": None,
        "positive_document_ids": ["2"],
        "negative_document_ids": ["0", "1"],
        "answer": None,
        "source": "nq",
    }
    hub.put("a/nq-new", name, [row])
    hub.put(
        "a/nq-corpus-new",
        "data/corpus-00000-of-00001.parquet",
        [{"docid": row["docid"], "text": row["text"], "image": None} for row in PASSAGES],
    )
    collection = hub_collection("a/nq-new")
    examples = collection.examples()
    assert (examples[0].positives.tolist(), examples[0].negatives.tolist()) == ([2], [0, 1])
    assert examples.passages is collection.corpus()
    assert examples.passages[2] == Passage("2", "", "a third")


def test_another_commit_is_read_anew(hub: HubCache, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(NQ, "train.jsonl", TRAIN)
    assert hub_collection(NQ).examples()[0].query.text == "one"
    monkeypatch.setitem(globals(), "COMMIT", "f" * 40)
    hub.put(NQ, "train.jsonl", [dict(TRAIN[0], query="new")])
    assert hub_collection(NQ).examples()[0].query.text == "new"


@pytest.mark.parametrize(
    "ask", [lambda collection: collection.examples(), lambda collection: collection.splits]
)
def test_an_unknown_repository_is_reported_as_a_missing_folder_too(
    ask: Callable[[Any], Any],
) -> None:
    with pytest.raises(
        DataError, match=r"HF_HUB_CACHE.*; there is no file or folder 'my/data' here"
    ):
        ask(hub_collection("my/data"))
    with pytest.raises(DataError) as caught:
        msmarco_passage().examples()
    assert "no file or folder" not in str(caught.value)


def test_an_unknown_split_is_an_error_that_lists_the_splits() -> None:
    with pytest.raises(UsageError, match="msmarco has no split 'test'; it has: dev"):
        msmarco_passage().topics("test")


def _collection(repo: str) -> HubCollection:
    return HubCollection("ours", examples=repo, corpus=repo, judged={})


def _connect(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Takes the hub to be at this port of this machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "corpus-00001-of-00002.parquet"])
def test_a_file_of_the_cache_whose_contents_are_gone(hub: HubCache, name: str) -> None:
    """The cache has links to contents that are kept elsewhere; half a corpus is no corpus."""
    if name.endswith("parquet"):
        hub.put(CORPUS, "corpus-00000-of-00002.parquet", PASSAGES[:2])
    link = hub.put(CORPUS, name, PASSAGES[2:])
    link.unlink()
    link.symlink_to("../../blobs/gone")
    with pytest.raises(DataError, match=rf"{CORPUS}: .*{name}: a link to .*gone.*hf download --"):
        HubCollection("mine", EXAMPLES, CORPUS, {"dev": "none"}).corpus()


def test_a_missing_file_of_a_numbered_series_is_named(hub: HubCache) -> None:
    hub.put(CORPUS, "data/corpus-00001-of-00002.parquet", PASSAGES)
    with pytest.raises(DataError, match=rf"{CORPUS}: .*corpus-00000-of-00002.parquet is missing"):
        HubCollection("mine", EXAMPLES, CORPUS, {"dev": "none"}).corpus()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([dict(PASSAGES[0], docid="0\x00tail")], r"id '0\\x00tail' has a NUL character"),
        ([PASSAGES[0], dict(PASSAGES[1], docid="0")], r"1 passages repeat an id \(such as '0'\)"),
    ],
)
def test_ids_that_are_ambiguous(hub: HubCache, rows: list[dict[str, Any]], message: str) -> None:
    hub.put(CORPUS, "corpus.jsonl", rows)
    with pytest.raises(DataError, match=message):
        HubCollection("mine", EXAMPLES, CORPUS, {"dev": "none"}).corpus()
