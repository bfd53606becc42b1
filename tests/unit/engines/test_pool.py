"""Handing out shards while workers come and go."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import split_shards
from mlflow_dr.engines.pool import Lost, WorkerPool
from mlflow_dr.engines.worker import Answer
from mlflow_dr.errors import CheckpointError, UnavailableError
from mlflow_dr.stores.token_table import TokenTable, token_table

SHARDS = split_shards([np.arange(start, start + 2) for start in range(0, 24, 2)], 12)
TABLE = token_table([[5]] * 24)


class Handle:
    """A worker without a process: its requests wait until it is let answer."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.has_place = True
        self.answers: deque[Answer | Lost] = deque([Answer()])
        self.done: list[list[int]] = []


class Scripted(WorkerPool[Handle]):
    """Workers that answer one after the other, each time that the engine waits."""

    def __init__(self, count: int) -> None:
        super().__init__(torch.device("cpu"))
        self.wanted = count
        self.started: list[Handle] = []
        self.places: list[bool] = []
        self.before_wait: Callable[[], None] = lambda: None

    def count(self) -> int:
        return self.wanted

    def start(self) -> Handle:
        handle = Handle(len(self.started))
        handle.has_place = self.places.pop(0) if self.places else True
        self.started.append(handle)
        return handle

    def stop(self, handle: Handle) -> None:
        handle.answers.clear()

    def save(self, encoder: Encoder, dtype: str) -> Any:
        return dtype

    def share(self, value: Any) -> Any:
        return value

    def send(self, handle: Handle, request: str, *arguments: Any) -> None:
        if request == "do":
            rows = np.concatenate(arguments[0]).tolist()
            handle.done.append(rows)
            handle.answers.append(Answer(rows))
        else:
            handle.answers.append(Answer(value=True))

    def wait(self, handles: Sequence[Handle]) -> list[tuple[int, Answer | Lost]]:
        self.before_wait()
        ready = [number for number, one in enumerate(handles) if one.answers and one.has_place]
        return [(number, handles[number].answers.popleft()) for number in ready]


def work(encoder: Encoder, table: TokenTable, batches: Iterable[np.ndarray]) -> Any:
    raise AssertionError("the scripted workers do it")


def rows_of(results: Iterator[Any]) -> list[int]:
    return sorted(row for rows in results for row in rows)


def run(engine: Scripted) -> list[int]:
    return rows_of(engine.map(work, TABLE, SHARDS, lambda _: None))


def test_all_shards_are_done_once_by_all_workers() -> None:
    engine = Scripted(3)
    assert run(engine) == list(range(24))
    assert [len(handle.done) for handle in engine.started] == [4, 4, 4]
    assert engine.n_shards == 24


def test_a_worker_that_is_lost_is_replaced_and_its_shard_is_done_by_another() -> None:
    engine = Scripted(2)

    def lose() -> None:
        first = engine.started[0]
        if len(first.done) == 2 and first.answers and isinstance(first.answers[0], Answer):
            first.answers[0] = Lost("SIGKILL")

    engine.before_wait = lose
    assert run(engine) == list(range(24))
    assert len(engine.started) == 3
    assert engine.started[2].done


def test_others_go_on_while_the_new_worker_starts() -> None:
    engine = Scripted(2)
    engine.places = [True, False]
    assert run(engine) == list(range(24))
    assert [len(handle.done) for handle in engine.started] == [12, 0]


def test_a_device_that_comes_during_a_pass_takes_part_in_it() -> None:
    engine = Scripted(1)

    def come() -> None:
        engine.wanted = 2 if engine.started[0].done else 1

    engine.before_wait = come
    assert run(engine) == list(range(24))
    assert len(engine.started) == 2
    assert engine.started[1].done


def test_a_worker_that_waits_for_a_device_that_is_gone_is_given_up() -> None:
    engine = Scripted(2)
    engine.places = [True, False]
    run(engine)
    engine.wanted = 1
    run(engine)
    assert [member.handle.number for member in engine._members] == [0]


def test_answers_to_a_pass_that_was_broken_off_are_not_those_of_the_next() -> None:
    engine = Scripted(2)
    broken_off = engine.map(work, TABLE, SHARDS, lambda _: None)
    next(broken_off)
    broken_off.close()
    half = SHARDS[:6]
    results = rows_of(engine.map(work, TABLE, half, lambda _: None))
    assert results == sorted(np.concatenate([batch for shard in half for batch in shard]).tolist())


def test_a_new_encoder_reaches_each_worker_before_its_next_shard() -> None:
    engine = Scripted(2)
    run(engine)
    engine.load(None, "fp32")  # type: ignore[arg-type]
    run(engine)
    assert [member.encoder for member in engine._members] == [1, 1]


def test_an_error_of_the_work_is_raised_as_it_is() -> None:
    engine = Scripted(2)

    def fail() -> None:
        for handle in engine.started:
            if handle.done and handle.answers:
                handle.answers[0] = Answer(error=CheckpointError("NaN"))

    engine.before_wait = fail
    with pytest.raises(CheckpointError, match="NaN"):
        run(engine)


def test_a_shard_that_ends_every_worker_is_given_up() -> None:
    engine = Scripted(2)

    def lose() -> None:
        for handle in engine.started:
            if handle.answers and handle.done and handle.done[-1] == [0, 1]:
                handle.answers[0] = Lost("SIGKILL")

    engine.before_wait = lose
    with pytest.raises(UnavailableError, match=r"again and again \(3 times: SIGKILL\)"):
        run(engine)
