"""Every document store gives the same passages, in whichever process it is read."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import random
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import SCHEMA, Corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import DataError, MissingExtraError
from mlflow_dr.stores.store import STORES, DocumentStore, open_store
from mlflow_dr.stores.token_table import token_table, write_table

LIBRARIES = {"zstd": "zstandard", "lmdb": "lmdb", "lance": "lance"}
NAMES = [name for name in STORES.names() if find_spec(LIBRARIES.get(name, "numpy"))]
CANNOT_FORK = {"lance"}
IN_FORKS = ("fork", "another fork")
READS = 100

PASSAGES = [
    Passage("first", "", "a gull"),
    Passage("unicode-東京", "naïve \N{ROCKET}", "Ünïcödé 東京都 \N{GRINNING FACE}"),
    Passage("lines", "two\nlines", "tab\tand\r\nreturn\n"),
    Passage("controls", "\x00\x01", "\x00\x1f\x7f\x00"),
    Passage("empty", "", ""),
    Passage("title only", "ships", ""),
    Passage("long", "a", "wave " * 9000),
    *(
        Passage(f"p{row}", f"ship {row % 3}" * (row % 2), f"text {row} " * (row % 7))
        for row in range(40)
    ),
    Passage("last", "t", "the end"),
]
LAST = len(PASSAGES) - 1


def corpus_of(passages: list[Passage]) -> Corpus:
    columns = list(zip(*passages, strict=True))[:3]
    return Corpus(pa.table([pa.array(column) for column in columns], schema=SCHEMA))


def token_ids(passage: Passage) -> list[int]:
    return [ord(character) for character in passage.text[:20]]


def build(name: str, passages: list[Passage], directory: Path) -> DocumentStore:
    """A store in a directory that does not exist yet."""
    if name == "tokens":
        tables = [token_table([token_ids(passage) for passage in passages])]
        write_table(directory, tables, np.uint32, len(passages), "")
    else:
        directory.mkdir()
        STORES.get(name).build(corpus_of(passages), directory)
    return open_store(name, directory)


def expected(name: str, passage: Passage) -> Any:
    if name == "null":
        return Passage("", "", "")
    return token_ids(passage) if name == "tokens" else passage


def got(store: DocumentStore, rows: Any) -> Any:
    """What a store gives, as lists and passages; an error as its type and text."""
    try:
        found = store.get_many(rows)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return [item.tolist() if isinstance(item, np.ndarray) else item for item in found]


REQUESTS: dict[str, Any] = {
    "in the order asked, with repeats": [3, 1, LAST, 3, 0, 2, 3],
    "the first and the last": np.array([0, LAST]),
    "all": np.arange(len(PASSAGES), dtype=np.int32),
    "none": [],
    "one too many": [0, LAST + 1],
    "negative": [-1],
}


def answers(name: str, store: DocumentStore) -> dict[str, Any]:
    """What a store gives for each request, and the wrong passages among many."""
    found = {what: got(store, rows) for what, rows in REQUESTS.items()}
    chance, wrong = random.Random(mp.current_process().name), 0
    for _ in range(READS if isinstance(found["all"], list) else 0):
        rows = chance.choices(range(len(PASSAGES)), k=8)
        wrong += got(store, rows) != [expected(name, PASSAGES[row]) for row in rows]
    return {**found, "wrong": wrong}


def right_answers(name: str) -> dict[str, Any]:
    outside = f"a document store of {len(PASSAGES)} passages"
    return {
        **{
            what: [expected(name, PASSAGES[row]) for row in rows]
            for what, rows in REQUESTS.items()
            if what not in ("one too many", "negative")
        },
        "one too many": f"IndexError: row {LAST + 1} of {outside}",
        "negative": f"IndexError: row -1 of {outside}",
        "wrong": 0,
    }


def answer_all(stores: dict[str, DocumentStore], begin: Any, results: Any) -> None:
    """The answers of all stores, in another process."""
    begin.wait()
    results.put({name: answers(name, store) for name, store in stores.items()})


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DocumentStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {name: build(name, PASSAGES, folder / name.replace(":", "-")) for name in NAMES}


@pytest.fixture(scope="module")
def by_place(stores: dict[str, DocumentStore]) -> dict[str, dict[str, dict[str, Any]]]:
    """Place -> store -> its answers; two forked processes read at the same time.

    All stores were read here before the fork.
    """
    found = {"here": {name: answers(name, store) for name, store in stores.items()}}
    for method in ("fork", "spawn", "forkserver"):
        context = mp.get_context(method)
        places = IN_FORKS if method == "fork" else (method,)
        begin, queues = context.Barrier(len(places)), [context.SimpleQueue() for _ in places]
        processes = [
            context.Process(target=answer_all, args=(stores, begin, queue), name=place)
            for place, queue in zip(places, queues, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forks beside threads
            for process in processes:
                process.start()
        for place, queue in zip(places, queues, strict=True):
            found[place] = queue.get()
        for process in processes:
            process.join()
    return found


@pytest.mark.parametrize("place", ["here", *IN_FORKS, "spawn", "forkserver"])
@pytest.mark.parametrize("name", NAMES)
def test_a_store_answers_alike_wherever_it_is_read(
    by_place: dict[str, dict[str, dict[str, Any]]], name: str, place: str
) -> None:
    found = by_place[place][name]
    if name in CANNOT_FORK and place in IN_FORKS:
        assert "cannot be read by forked processes; start workers by spawn" in found["all"]
    else:
        assert found == right_answers(name)


@pytest.mark.parametrize("name", NAMES)
def test_several_threads_read_the_right_passages(
    stores: dict[str, DocumentStore], name: str
) -> None:
    rows = [[row, LAST - row, row] for row in range(len(PASSAGES))] * 5
    with ThreadPoolExecutor(4) as pool:
        for wanted, found in zip(rows, pool.map(lambda r: got(stores[name], r), rows), strict=True):
            assert found == [expected(name, PASSAGES[row]) for row in wanted]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_found_by_id(stores: dict[str, DocumentStore], name: str) -> None:
    if name == "tokens":
        pytest.skip("a token table has no ids")
    rows = stores[name].rows_of(["last", "first", "unicode-東京", "last"])
    assert rows.tolist() == [LAST, 0, 1, LAST]
    assert stores[name].rows_of([]).tolist() == []
    with pytest.raises(DataError, match="no passage has the id 'unknown'"):
        stores[name].rows_of(["first", "unknown"])


@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_sent_as_its_path(stores: dict[str, DocumentStore], name: str) -> None:
    stores[name].get_many([0])
    assert len(pickle.dumps(stores[name])) < 1000


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_the_files_can_be_read(
    stores: dict[str, DocumentStore], name: str, tmp_path: Path
) -> None:
    store = stores[name]
    for file in store.files():
        target = tmp_path / "copy" / file.relative_to(store.directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    with open_store(name, tmp_path / "copy") as copy:
        assert (len(copy), copy.holds) == (len(PASSAGES), store.holds)
        assert got(copy, [LAST, 0]) == [expected(name, PASSAGES[row]) for row in (LAST, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_was_cut_off_is_an_error(
    stores: dict[str, DocumentStore], name: str, tmp_path: Path
) -> None:
    shutil.copytree(stores[name].directory, tmp_path / "copy")
    for file in open_store(name, tmp_path / "copy").files():
        content = file.read_bytes()
        if content:
            file.write_bytes(content[:-1])
            with pytest.raises(DataError, match="not the undamaged files of a "):
                open_store(name, tmp_path / "copy").get_many([0])
        file.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_a_corpus_may_have_one_passage(name: str, tmp_path: Path) -> None:
    with build(name, PASSAGES[:1], tmp_path / "store") as store:
        assert got(store, [0, 0]) == [expected(name, PASSAGES[0])] * 2


@pytest.mark.parametrize(("name", "library"), LIBRARIES.items())
def test_a_missing_library_is_named_with_its_extra(
    name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf'pip install "mlflow_dr\[{name}\]"'):
        build(name, PASSAGES, tmp_path / "store")
