"""Collections of ir_datasets, read by ir_datasets itself from a home that the tests fill."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlflow_dr.collection.irds import IrDataset
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.errors import DataError, MissingExtraError, UsageError


class AbstractDoc(NamedTuple):
    doc_id: str
    title: str
    abstract: str

    def default_text(self) -> str:
        return f"{self.title} {self.abstract}"


class UrlDoc(NamedTuple):
    doc_id: str
    url: str


class TitleQuery(NamedTuple):
    query_id: str
    title: str
    narrative: str

    def default_text(self) -> str:
        return self.title


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty home of ir_datasets, which settles its home when it is imported."""
    home = tmp_path_factory.mktemp("ir_datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IR_DATASETS_HOME", str(home))
        for variable in ("IR_DATASETS_DL_TRIES", "IR_DATASETS_DL_TIMEOUT"):
            patch.setenv(variable, "1")
        patch.setenv("IR_DATASETS_DL_DISABLE_PBAR", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        for name in _imported():
            patch.delitem(sys.modules, name)
        yield home
        for name in _imported():
            del sys.modules[name]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def vaswani(home: Path) -> IrDataset:
    _write(
        home / "vaswani/docs.txt", "1\ncompact memories\n   /\n2\nan electronic analogue\n   /\n"
    )
    _write(home / "vaswani/queries.txt", "1\nMEMORIES OF DATA\n/\n2\nCOMPUTERS\n/\n")
    _write(home / "vaswani/qrels.txt", "1\n 1 2\n   /\n2\n 2\n   /\n")
    return IrDataset("vaswani")


@pytest.fixture
def msmarco(home: Path) -> Path:
    folder = home / "msmarco-passage"
    _write(folder / "irds_version.txt", "v2")
    _write(folder / "collection.tsv", "0\tsuccess\n1\tthe Manhattan project\n2\ta third\n")
    _write(folder / "dev/small/queries.tsv", "300\twho built it\n301\tunjudged\n")
    _write(folder / "dev/small/qrels", "300\t0\t1\t1\n")
    _write(folder / "train/queries.tsv", "7\tone\n8\ttwo\n9\tthree\n")
    _write(folder / "train/qrels", "7\t0\t2\t1\n7\t0\t0\t1\n8\t0\t1\t0\n9\t0\t1\t1\n")
    return folder


@pytest.fixture
def scifact(home: Path) -> None:
    (home / "beir/scifact").mkdir(parents=True, exist_ok=True)
    records = [{"_id": "4983", "title": "Microstructure", "text": "of white matter"}]
    with zipfile.ZipFile(home / "beir/scifact/source.zip", "w") as archive:
        archive.writestr("scifact/corpus.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        archive.writestr("scifact/queries.jsonl", '{"_id": "1", "text": "is it?"}\n')
        for split in ("train", "test"):
            archive.writestr(
                f"scifact/qrels/{split}.tsv", "query-id\tcorpus-id\tscore\n1\t4983\t1\n"
            )


class Register:
    """Registers a dataset of TSV files under an id that lasts as long as the test."""

    def __init__(self, folder: Path) -> None:
        import ir_datasets

        self.folder = folder
        self._registry = ir_datasets.registry
        self.registered: list[str] = []

    def __call__(
        self,
        docs: str,
        queries: str = "q\twhy\n",
        qrels: str = "q 0 d 1\n",
        subtopics: bool = False,
        **classes: Any,
    ) -> IrDataset:
        from ir_datasets.formats import (
            GenericDoc,
            GenericQuery,
            TrecQrels,
            TrecSubQrels,
            TsvDocs,
            TsvQueries,
        )
        from ir_datasets.util import LocalDownload

        file = {"docs": docs, "queries": queries, "qrels": qrels}
        local = {name: LocalDownload(_write(self.folder / name, file[name])) for name in file}
        return self.parts(
            TsvDocs(local["docs"], doc_cls=classes.get("doc", GenericDoc)),
            TsvQueries(local["queries"], query_cls=classes.get("query", GenericQuery)),
            (TrecSubQrels if subtopics else TrecQrels)(local["qrels"], {}),
        )

    def train(self, **files: str) -> IrDataset:
        """A training set with any of docpairs, qrels and scoreddocs."""
        from ir_datasets.formats import (
            TrecQrels,
            TrecScoredDocs,
            TsvDocPairs,
            TsvDocs,
            TsvQueries,
        )
        from ir_datasets.util import LocalDownload

        kinds: dict[str, Any] = {
            "docs": TsvDocs,
            "queries": TsvQueries,
            "docpairs": TsvDocPairs,
            "qrels": lambda file: TrecQrels(file, {}),
            "scoreddocs": TrecScoredDocs,
        }
        docs = "0\tzero\n1\tfirst\n2\tsecond\n3\tthird\n"
        files = {"docs": docs, "queries": "7\tone\n8\ttwo\n", **files}
        parts = [
            kinds[name](LocalDownload(_write(self.folder / name, content)))
            for name, content in files.items()
        ]
        return self.parts(*parts, split="train")

    def parts(self, *parts: Any, split: str = "test") -> IrDataset:
        from ir_datasets import Dataset

        name = f"registered/{len(self.registered)}/{split}"
        self._registry.register(name, Dataset(*parts))
        self.registered.append(name)
        return IrDataset(name)


@pytest.fixture
def register(home: Path, tmp_path: Path) -> Iterator[Register]:
    register = Register(tmp_path)
    yield register
    for name in register.registered:
        del register._registry._registered[name]


@pytest.fixture
def served() -> Iterator[str]:
    """The address of a server that answers everything with `1<tab>a passage`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PASSAGE_LINE)))
            self.end_headers()
            self.wfile.write(PASSAGE_LINE)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


PASSAGE_LINE = b"1\ta passage\n"


def test_an_id_with_judgements_is_one_split(vaswani: IrDataset) -> None:
    assert vaswani.name == "irds:vaswani"
    assert "ir_datasets vaswani" in vaswani.source
    assert vaswani.splits == ["vaswani"]
    topics = vaswani.topics("vaswani")
    assert [query.text.strip() for query in topics.queries] == ["MEMORIES OF DATA", "COMPUTERS"]
    assert topics.qrels == {"1": {"1": 1, "2": 1}, "2": {"2": 1}}
    assert [passage.text.strip() for passage in vaswani.corpus().passages([0, 1])] == [
        "compact memories",
        "an electronic analogue",
    ]


def test_members_with_judgements_are_the_splits_of_an_id_without(msmarco: Path) -> None:
    collection = IrDataset("msmarco-passage")
    assert {"train", "dev/small", "trec-dl-2019/judged"} <= set(collection.splits)
    assert "eval" not in collection.splits  # it has no judgements
    topics = collection.topics("dev/small")
    assert topics.queries == [Query("300", "who built it")]
    assert topics.qrels == {"300": {"1": 1}}


def test_members_over_other_passages_are_no_splits(home: Path) -> None:
    splits = IrDataset("cord19").splits
    assert "trec-covid" in splits
    assert "fulltext/trec-covid" not in splits


def test_a_judged_train_member_gives_examples(msmarco: Path) -> None:
    examples = IrDataset("msmarco-passage").examples()
    assert len(examples) == 2  # query 8 has no relevant passage
    assert examples[0].query.text == "one"
    texts = [passage.text for passage in examples.passages.passages(examples[0].positives)]
    assert texts == ["a third", "success"]
    assert examples.passages[int(examples[1].positives[0])].id == "1"


def test_docpairs_are_examples_grouped_by_query(
    register: Register, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = "8\t1\t2\n7\t0\t2\n7\t0\t2\n7\t0\t3\n7\t1\t2\n8\t1\t1\n9\t0\t1\n7\t0\tgone\n"
    collection = register.train(docpairs=pairs)
    examples = collection.examples()
    found = {
        examples[index].query.id: (
            examples[index].positives.tolist(),
            examples[index].negatives.tolist(),
        )
        for index in range(len(examples))
    }
    assert found == {"8": ([1], [2]), "7": ([0, 1], [2, 3])}
    assert examples[0].query == Query("8", "two")
    assert examples.passages.digest == collection.corpus().digest
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "1 records without a query (such as irds:registered/0/train: query '9')" in warning
    assert "1 passages that the corpus lacks (such as 'gone')" in warning
    assert "1 negatives that are also positives of their query (such as query '8')" in warning
    assert "twice" not in warning  # pairs repeat passages by their nature


def test_docpairs_are_read_once(register: Register) -> None:
    collection = register.train(docpairs="7\t0\t2\n")
    first = collection.examples()
    (register.folder / "docpairs").unlink()
    again = IrDataset(collection.name.removeprefix("irds:")).examples()
    assert again.digest == first.digest
    assert len(again) == 1


def test_malformed_docpairs_are_an_error(register: Register) -> None:
    with pytest.raises(DataError, match=r"registered/0/train: the docpairs cannot be read"):
        register.train(docpairs="7\t0\n").examples()


def test_scoreddocs_that_are_not_relevant_are_the_negatives(
    register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    examples = register.train(
        qrels="7 0 0 1\n7 0 3 0\n8 0 1 1\n",
        scoreddocs="7 Q0 0 1 9.5 x\n7 Q0 3 2 9.0 x\n7 Q0 2 3 8.0 x\n9 Q0 1 1 1.0 x\n",
    ).examples()
    assert [examples[i].query.id for i in range(len(examples))] == ["7", "8"]
    assert (examples[0].positives.tolist(), examples[0].negatives.tolist()) == ([0], [3, 2])
    assert examples[1].negatives.tolist() == []  # it has no candidates
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]  # as expected of them


def test_ids_that_share_passages_share_one_cached_corpus(msmarco: Path, cache: Path) -> None:
    first = IrDataset("msmarco-passage").corpus()
    (msmarco / "collection.tsv").unlink()
    assert IrDataset("msmarco-passage/train").corpus().digest == first.digest
    assert len(list((cache / "corpora").glob("*/corpus.arrow"))) == 1


def test_title_and_text_fields_are_kept_apart(scifact: None) -> None:
    collection = IrDataset("beir/scifact")
    assert sorted(collection.splits) == ["test", "train"]
    assert IrDataset("beir/scifact/test").splits == ["test"]
    assert collection.corpus()[0] == Passage("4983", "Microstructure", "of white matter")


def test_without_a_text_field_the_default_text_is_taken_less_its_title(register: Register) -> None:
    collection = register("d\tOn wings\tof bees\n", doc=AbstractDoc)
    assert collection.corpus()[0] == Passage("d", "On wings", "of bees")


def test_a_query_without_a_text_field_gives_its_default_text(register: Register) -> None:
    collection = register("d\ta passage\n", queries="q\twings\tsay all\n", query=TitleQuery)
    assert collection.topics("test").queries[0].text == "wings"


def test_answers_of_queries_are_kept(register: Register) -> None:
    from ir_datasets.datasets.dpr_w100 import DprW100Queries
    from ir_datasets.formats import TrecQrels, TsvDocs
    from ir_datasets.util import LocalDownload

    files = {
        "docs": "p\ta liner\n",
        "queries": "0\twhich ship\tliner\ta tug\n1\twhy\n",
        "qrels": "0 0 p 2\n1 0 p 2\n",
    }
    docs, queries, qrels = (
        LocalDownload(_write(register.folder / name, text)) for name, text in files.items()
    )
    collection = register.parts(TsvDocs(docs), DprW100Queries(queries), TrecQrels(qrels, {}))
    expected = [Query("0", "which ship", ("liner", "a tug")), Query("1", "why")]
    assert collection.topics("test").queries == expected


class AnsweredQuery(NamedTuple):
    query_id: str
    text: str
    answers: str


def test_answers_that_are_not_a_list_are_left_out(register: Register) -> None:
    collection = register("d\ttext\n", queries="q\twhy\tso\n", query=AnsweredQuery)
    assert collection.topics("test").queries == [Query("q", "why")]


@pytest.mark.parametrize("relevance", [1 << 40, -32_768])
def test_a_relevance_that_trec_eval_cannot_count_is_an_error(
    register: Register, relevance: int
) -> None:
    collection = register("d\ttext\n", qrels=f"q 0 d {relevance}\n")
    with pytest.raises(DataError, match=rf"query 'q' and passage 'd' have relevance {relevance}; "):
        collection.topics("test")


def test_a_passage_judged_by_subtopic_keeps_the_highest_relevance(register: Register) -> None:
    collection = register("d\ta passage\n", qrels="q 1 d 0\nq 2 d 3\nq 3 d 1\n", subtopics=True)
    assert collection.topics("test").qrels == {"q": {"d": 3}}


def test_documents_without_any_text_are_an_error_that_names_their_fields(
    register: Register,
) -> None:
    with pytest.raises(DataError, match=r"UrlDoc has no text .* doc_id, url"):
        register("d\thttp://a\n", doc=UrlDoc).corpus()


def test_a_repeated_passage_id_is_an_error(register: Register) -> None:
    with pytest.raises(DataError, match="'d' is used twice"):
        register("d\tone\nd\ttwo\n").corpus()


def test_an_unknown_id_is_an_error_with_close_matches(home: Path) -> None:
    with pytest.raises(UsageError, match=r"'beir/scifat'.*did you mean 'beir/scifact'"):
        IrDataset("beir/scifat")


def test_a_family_without_passages_is_an_error_that_names_members(home: Path) -> None:
    with pytest.raises(UsageError, match=r"irds:beir has no passages.*irds:beir/arguana"):
        IrDataset("beir")


def test_an_id_without_judged_queries_is_an_error_that_names_members(home: Path) -> None:
    with pytest.raises(UsageError, match=r"no judged queries.*irds:msmarco-passage/eval/small"):
        _ = IrDataset("msmarco-passage/eval").splits


def test_an_unknown_split_is_an_error_that_lists_the_splits(vaswani: IrDataset) -> None:
    for ask in (lambda: vaswani.topics("dev"), vaswani.examples):
        with pytest.raises(UsageError, match=r"has no split '(dev|train)'; it has: vaswani"):
            ask()


def test_no_network_is_one_quiet_error_that_says_what_to_do(
    register: Register, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    collection = register.parts(_remote_docs(address, home, "x" * 32))
    with pytest.raises(DataError) as caught:
        collection.corpus()
    message = str(caught.value)
    assert f"{collection.name}: the passages cannot be read: the download from {address}" in message
    assert f"connect to the network, or put the files under {home} (IR_DATASETS_HOME)" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_large_download_that_fails_names_the_place_for_a_local_copy(home: Path) -> None:
    from ir_datasets.util import LocalDownload, RequestsDownload

    path = home / "downloads/0123"
    mirrors = [
        LocalDownload(path, f"symlink it here: {path}"),
        RequestsDownload("http://127.0.0.1:1/docs.tsv"),
        RequestsDownload("http://127.0.0.1:2/docs.tsv"),
    ]
    with pytest.raises(DataError) as caught:
        _reading_mirrors(home, mirrors)
    message = str(caught.value)
    assert "from 127.0.0.1:1 failed (ConnectionError); the download from 127.0.0.1:2" in message
    assert f"connect to the network, or symlink it here: {path}" in message
    assert "FileNotFoundError" not in message  # the local copy is a way out, not a failure


def test_a_file_that_only_a_person_can_fetch_is_an_error_with_the_instructions(
    home: Path,
) -> None:
    from ir_datasets.util import LocalDownload

    path = home / "disks/45"
    with pytest.raises(DataError) as caught:
        _reading_mirrors(home, [LocalDownload(path, f"Ask NIST.\nPut it at {path}")])
    assert str(caught.value).endswith(f"; Ask NIST. Put it at {path}")


def test_a_download_with_another_checksum_is_an_error(
    register: Register, home: Path, served: str
) -> None:
    collection = register.parts(_remote_docs(served, home, "0" * 32))
    with pytest.raises(
        DataError, match=r"Expected md5 hash to be 0+ but got .*upgrade ir_datasets"
    ):
        collection.corpus()


def test_a_download_is_quiet_and_its_terms_are_logged(
    register: Register,
    home: Path,
    served: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    md5 = hashlib.md5(PASSAGE_LINE).hexdigest()
    with caplog.at_level(logging.INFO):
        corpus = register.parts(_remote_docs(served, home, md5, dua="Agree to this")).corpus()
    assert corpus[0] == Passage("1", "", "a passage")
    assert [record.getMessage() for record in caplog.records] == ["ir_datasets: Agree to this"]
    assert capfd.readouterr() == ("", "")


def test_a_malformed_file_is_an_error_that_says_what_to_remove(
    register: Register, home: Path
) -> None:
    with pytest.raises(DataError, match=r"expected 2 fields, got 3; remove what is damaged under"):
        register("d\ta\tpassage\n").corpus()


def test_a_library_that_one_collection_needs_is_named(register: Register) -> None:
    from ir_datasets.formats import BaseDocs

    class Docs(BaseDocs):
        def docs_iter(self) -> Iterator[Any]:
            raise ImportError("Run 'pip install ir_datasets[car]'")

    with pytest.raises(MissingExtraError, match=r"registered/0/test.*ir_datasets\[car\]"):
        register.parts(Docs()).corpus()


def test_without_ir_datasets_what_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    with pytest.raises(MissingExtraError, match="pip install ir_datasets"):
        IrDataset("vaswani")


def test_a_home_that_cannot_be_made_is_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IR_DATASETS_HOME", str(_write(tmp_path / "file", "") / "home"))
    for name in _imported():
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match=r"file/home.*set IR_DATASETS_HOME"):
        IrDataset("vaswani")


def test_ir_datasets_gives_up_soon_unless_the_user_sets_its_patience(
    vaswani: IrDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IR_DATASETS_DL_TRIES")
    monkeypatch.setenv("IR_DATASETS_DL_TIMEOUT", "77")
    IrDataset("vaswani")
    assert os.environ["IR_DATASETS_DL_TRIES"] == "2"
    assert os.environ["IR_DATASETS_DL_TIMEOUT"] == "77"


def _remote_docs(address: str, home: Path, md5: str, dua: str | None = None) -> Any:
    from ir_datasets.formats import TsvDocs
    from ir_datasets.util import Download, RequestsDownload

    mirrors = [RequestsDownload(f"http://{address}/docs.tsv")]
    return TsvDocs(Download(mirrors, home / f"{md5}.tsv", expected_md5=md5, dua=dua))


def _reading_mirrors(home: Path, mirrors: list[Any]) -> None:
    from ir_datasets.util import Download

    from mlflow_dr.collection.irds import reading

    with reading("the passages"):
        Download(mirrors, home / "never-there").path()


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _imported() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "ir_datasets"]
