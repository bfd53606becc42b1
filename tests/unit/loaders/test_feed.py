"""Batches are the same from processes, workers and threads, and each says what it took."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.tokenize import TextTokenizer, load_tokenizer
from mlflow_dr.loaders.cell import Workload
from mlflow_dr.loaders.feed import PARTS, Batches, Feed, Loading, batch_loader
from mlflow_dr.stores.store import open_store

ROWS = np.random.default_rng(3).integers(40, size=50)
INLINE = Loading(0, False, "fork", 2, False)
THREADS = Loading(3, True, "fork", 2, False)
PROCESSES = Loading(2, False, "fork", 2, False)


def text_of(row: int) -> str:
    return " ".join(["ship", "harbour"][: 1 + row % 2] * (1 + row // 2))


def feed_of(workload: Workload, payload: str, workers: int = 0) -> Feed:
    store = open_store("lookup", Path(workload.directory))
    tokenizer = None
    if payload == "ids":
        config = EncoderConfig(passage_max_length=workload.max_length)
        tokenizer = TextTokenizer(load_tokenizer(workload.tokenizer), config)
    return Feed(store, payload, tokenizer, 0, workload.max_length, workers)


def all_of(loader: Any) -> list[Any]:
    return [
        {name: values.tolist() for name, values in batch.items()}
        if isinstance(batch, dict)
        else batch
        for batch in loader
    ]


@pytest.mark.parametrize("payload", ["lookup", "text", "ids"])
def test_workers_give_the_batches_that_are_made_without_them(
    workload: Workload, payload: str
) -> None:
    alone = all_of(batch_loader(feed_of(workload, payload), Batches(ROWS, 8), INLINE))
    assert len(alone) == 6
    for loading in (THREADS, PROCESSES):
        feed = feed_of(workload, payload, loading.workers)
        loader = batch_loader(feed, Batches(ROWS, 8), loading)
        assert all_of(loader) == alone
        assert all_of(loader) == alone  # in another epoch, too


def test_each_payload_is_that_of_the_rows(workload: Workload) -> None:
    rows = [3, 0, 3, 39]
    texts = [text_of(row) for row in rows]
    count, size = feed_of(workload, "lookup").batch(rows, 0)
    assert (count, size) == (4, sum(map(len, texts)))
    assert feed_of(workload, "text").batch(rows, 0) == texts
    batch = feed_of(workload, "ids").batch(rows, 0)
    config = EncoderConfig(passage_max_length=workload.max_length)
    tokenizer = TextTokenizer(load_tokenizer(workload.tokenizer), config)
    expected = tokenizer.passage_ids([Passage("", "", text) for text in texts])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    assert lengths == [len(ids) for ids in expected]
    assert batch["input_ids"].shape == (4, workload.max_length)
    for ids, found in zip(expected, batch["input_ids"].tolist(), strict=True):
        assert found == ids + [0] * (workload.max_length - len(ids))


def test_a_token_table_gives_the_token_ids_that_are_made_of_texts(
    workload: Workload, tmp_path: Path
) -> None:
    rows = list(range(40))
    late = feed_of(workload, "ids").batch(rows, 0)
    lengths = late["attention_mask"].sum(dim=1)
    np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(lengths.numpy())]))
    ids = late["input_ids"][late["attention_mask"].bool()]
    (tmp_path / "ids.bin").write_bytes(ids.numpy().astype(np.uint16).tobytes())
    store = open_store("tokens", tmp_path)
    batch = Feed(store, "ids", None, 0, workload.max_length, 0).batch(rows, 0)
    assert all(batch[name].equal(late[name]) for name in ("input_ids", "attention_mask"))
    assert batch["input_ids"].dtype == late["input_ids"].dtype
    assert Feed(store, "lookup", None, 0, 16, 0).batch(rows, 0) == (40, len(ids))


@pytest.mark.parametrize("loading", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_workers_write_down_the_cpu_time_of_each_part(workload: Workload, loading: Loading) -> None:
    feed = feed_of(workload, "ids", loading.workers)
    iterator = iter(batch_loader(feed, Batches(ROWS, 8), loading))
    for _ in range(6):
        next(iterator)
    times = feed.times()
    assert (times.parts > 0).all()
    assert times.parts.shape == (len(PARTS),)
    assert times.parts.sum() < times.cpu
    assert 0 < times.start_cpu < times.cpu
    assert times.ready <= time.monotonic()


def test_an_epoch_ends_with_the_rows_or_with_the_time(workload: Workload) -> None:
    batches = Batches(ROWS, 8)
    assert list(batches) == ROWS[:48].reshape(6, 8).tolist()
    assert (batches.handed_out, batches.complete) == (6, True)
    for loading in (INLINE, THREADS, PROCESSES):
        loader = batch_loader(feed_of(workload, "lookup", loading.workers), batches, loading)
        batches.deadline = float("inf")
        iterator = iter(loader)
        next(iterator)
        batches.deadline = 0.0
        assert 1 + len(list(iterator)) == batches.handed_out < 7
        assert batches.complete


def test_what_goes_wrong_in_a_thread_reaches_the_consumer(workload: Workload) -> None:
    loader = batch_loader(feed_of(workload, "text", 3), Batches(ROWS + 40, 8), THREADS)
    with pytest.raises(IndexError, match=r"row [4-7][0-9] of"):
        list(loader)
