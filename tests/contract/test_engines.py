"""One suite over every engine: what it gives has the bits of a search in this process."""

import copy
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.devices import torch_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import cached_token_table
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines import pool
from mlflow_dr.engines.opening import open_engine
from mlflow_dr.engines.pool import WorkerPool
from mlflow_dr.errors import CheckpointError, UnavailableError
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.dense import SearchRequest, dense_search
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.retrieval.shard_search import EncodeShard, SearchShard
from mlflow_dr.stores.token_table import TokenTable, token_table

N_PASSAGES, N_QUERIES, DEPTH = 120, 7, 9


class Scene:
    """Passages, some of them twice, and queries."""

    def __init__(self, encoder: Encoder, texts: list[str]) -> None:
        rng = np.random.default_rng(1)
        words = " ".join(texts).split()
        passages = [" ".join(rng.choice(words, 1 + number % 11)) for number in range(100)]
        passages += passages[: N_PASSAGES - 100]
        self.encoder = encoder
        self.tokenizer = TextTokenizer.of(encoder)
        ids = self.tokenizer.passage_ids([Passage("", "", text) for text in passages])
        self.table: TokenTable = token_table(ids)
        self.cached = cached_token_table(
            "scene", [ids], lambda part: part, self.tokenizer.vocabulary_size, N_PASSAGES
        )
        queries = [Query(str(number), text) for number, text in enumerate(texts[:N_QUERIES])]
        within = np.arange(0, N_PASSAGES, 3)
        candidates = [rng.choice(N_PASSAGES, 5 * index % 13, False) for index in range(N_QUERIES)]
        self.requests = [
            SearchRequest(queries, DEPTH),
            SearchRequest(queries[2:], 3, within, extra_rows=candidates[2:]),
            SearchRequest(queries, 4, candidates=candidates),
        ]

    def search(
        self, engine: Any, dtype: str = "fp32", table: TokenTable | None = None
    ) -> list[SearchResult]:
        encoder = copy.deepcopy(self.encoder)
        if engine is None:
            encoder.to(dtype=torch_dtype(dtype))
        else:
            engine.load(encoder, dtype)
        ranks = np.arange(N_PASSAGES)[::-1].copy()
        table = table or self.table
        return dense_search(
            encoder, self.tokenizer, self.requests, table, ranks, quiet=True, engine=engine
        )


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of this process and of all workers, in all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def scene(
    make_tiny: Callable[..., Encoder],
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    shared_cache: Path,
) -> Scene:
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(shared_cache))
    monkeypatch.setitem(encode.TOKENS_PER_BATCH, "cpu", 40)
    return Scene(make_tiny(pooling="mean", normalize=True, query_prompt="find "), texts)


@pytest.fixture(scope="module", params=["local", "processes", "ray"])
def engine(request: pytest.FixtureRequest, shared_cache: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DR_CACHE", str(shared_cache))
        engine = {
            "local": lambda: open_engine(device="cpu"),
            "processes": lambda: open_engine(device="cpu,cpu"),
            "ray": lambda: request.getfixturevalue("ray_engine"),
        }[request.param]()
        if isinstance(engine, WorkerPool):
            engine.await_answers()  # starts workers, with that cache
        yield engine
        processes = [
            member.handle.process
            for member in getattr(engine, "_members", [])
            if hasattr(member.handle, "process")
        ]
        engine.close()
        assert not any(process.is_alive() for process in processes)


@pytest.fixture(scope="module")
def ray_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine on a Ray cluster of two cores, which is started here."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        patch.delenv("RAY_ADDRESS", raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        engine = open_engine("ray", "cpu")
        torch.set_num_threads(threads)
        yield engine


def workers(engine: Any) -> WorkerPool[Any]:
    """The engine, if it has workers that can be lost."""
    if not isinstance(engine, WorkerPool):
        pytest.skip("this process is its only worker")
    return engine


def kill(member: Any) -> None:
    if hasattr(member.handle, "process"):
        os.kill(member.handle.process.pid, signal.SIGKILL)
    else:
        import ray

        ray.kill(member.handle.actor)


def assert_equal(results: Sequence[SearchResult], expected: Sequence[SearchResult]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result.rows, wanted.rows)
        np.testing.assert_array_equal(result.scores, wanted.scores)
        for scores, others in zip(result.extra_scores, wanted.extra_scores, strict=True):
            np.testing.assert_array_equal(scores, others)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("is_cached", [True, False], ids=["mapped table", "table in memory"])
def test_rows_and_scores_have_the_bits_of_a_search_in_this_process(
    engine: Any, scene: Scene, dtype: str, is_cached: bool
) -> None:
    table = scene.cached if is_cached else scene.table
    assert_equal(scene.search(engine, dtype, table), scene.search(None, dtype))
    if isinstance(engine, WorkerPool):
        begun = [member for member in engine._members if member.begun == engine._pass]
        assert {member.has_table for member in begun} == {is_cached}


def test_a_second_encoder_takes_the_place_of_the_first(
    engine: Any, scene: Scene, make_untied_encoder: Callable[..., Encoder], texts: list[str]
) -> None:
    scene.search(engine)
    other = Scene(make_untied_encoder(), texts)
    assert_equal(other.search(engine), other.search(None))


def test_a_corpus_of_one_passage(engine: Any, scene: Scene) -> None:
    scene.requests = [SearchRequest(scene.requests[0].queries, DEPTH, np.array([5]))]
    (result,) = scene.search(engine)
    assert result.rows.tolist() == [[5]] * N_QUERIES


def test_nothing_to_search(engine: Any, scene: Scene) -> None:
    scene.requests = [SearchRequest(scene.requests[0].queries, DEPTH, np.array([], np.int64))]
    (result,) = scene.search(engine)
    assert result.rows.shape == (N_QUERIES, 0)


def test_progress_counts_each_passage_once(engine: Any, scene: Scene) -> None:
    counts: list[int] = []
    scene.search(engine)
    shards = [[np.arange(3), np.arange(5, 9)], [np.arange(20, 22)]]
    work = encode_work(scene)
    parts = list(engine.map(work, scene.table, shards, counts.append))
    assert sum(counts) == 9
    assert sorted(np.concatenate([rows for rows, _ in parts])) == [0, 1, 2, 5, 6, 7, 8, 20, 21]


def encode_work(scene: Scene) -> Any:
    return EncodeShard(scene.tokenizer.pad_id)


def test_an_encoder_that_gives_nan_is_refused_and_the_next_one_works(
    engine: Any, scene: Scene
) -> None:
    expected = scene.search(None)
    broken = copy.deepcopy(scene.encoder)
    weights = broken.backbone.get_input_embeddings().weight
    weights.data.fill_(float("nan"))
    scene.encoder, good = broken, scene.encoder
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        scene.search(engine)
    scene.encoder = good
    assert_equal(scene.search(engine), expected)


class Killing:
    """An engine that loses a worker in the middle of the corpus, while it is doing a shard."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.killed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def map(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        work, _, shards = arguments[:3]
        for number, result in enumerate(self._engine.map(*arguments, **options)):
            if number == len(shards) // 2 and isinstance(work, SearchShard):
                busy = [member for member in self._engine._members if member.request == "do"]
                kill(busy[0])
                self.killed += 1
            yield result


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_worker_that_is_lost_in_the_middle_changes_nothing(
    engine: Any, scene: Scene, dtype: str
) -> None:
    killing = Killing(workers(engine))
    assert_equal(scene.search(killing, dtype), scene.search(None, dtype))
    assert killing.killed


def test_a_worker_that_is_lost_while_it_is_idle_is_replaced(engine: Any, scene: Scene) -> None:
    scene.search(workers(engine))
    kill(engine._members[0])
    assert_equal(scene.search(engine), scene.search(None))


class Deadly:
    """Ends the process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


def test_workers_that_end_again_and_again_are_given_up(
    engine: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MOST_LOSSES", 1)
    with pytest.raises(UnavailableError, match="workers end again and again"):
        list(workers(engine).map(Deadly(), scene.table, [[np.arange(3)]], print))
