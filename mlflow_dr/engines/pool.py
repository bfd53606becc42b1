"""Handing out shards to workers in other processes, on this machine or elsewhere.

Each worker has one request at a time. The shard of a worker that is lost goes to the next one that
is free, and a new worker takes the place of the lost one; the others go on meanwhile.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from mlflow_dr.devices import resolve_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import SHARDS_PER_WORKER, Batches, Result, Work
from mlflow_dr.engines.worker import Answer
from mlflow_dr.errors import UnavailableError
from mlflow_dr.stores.token_table import TokenTable

log = logging.getLogger(__name__)

MOST_LOSSES = 3  # of workers: while they do the same shard, or for each device before any is done
HELLO, LOAD, BEGIN, DO = "hello", "load", "begin", "do"

Handle = TypeVar("Handle")


class Lost(NamedTuple):
    """A worker has ended before it answered; why, as far as is known."""

    reason: str


@dataclass(eq=False)
class _Member(Generic[Handle]):
    """A worker as the engine sees it.

    Attributes:
        handle: how it is reached.
        request: what it is doing; its first answer is to nothing but its start.
        shard: the number of the pass and of the shard that it is doing.
        is_ready: whether it has answered at all.
        encoder: the number of the encoder that it has loaded; 0 for none.
        begun: the number of the pass for which it has the work.
        has_table: whether it has that pass's token table.
    """

    handle: Handle
    request: str = HELLO
    shard: tuple[int, int] = (0, 0)
    is_ready: bool = False
    encoder: int = 0
    begun: int = 0
    has_table: bool = False


class WorkerPool(ABC, Generic[Handle]):
    """An engine whose workers are other processes; see `Engine`.

    Args:
        device: the device of each worker, or of the first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._members: list[_Member[Handle]] = []
        self._encoder = 0  # how many were loaded
        self._pass = 0  # how many calls of `map` there were
        self._saved: Any = None
        self._losses = 0  # since a shard was done

    @property
    def n_shards(self) -> int:
        """Into how many shards a plan should be split."""
        return SHARDS_PER_WORKER * max(1, self.count())

    def resolve_dtype(self, dtype: str) -> str:
        """See `Engine.resolve_dtype`."""
        return resolve_dtype(dtype, self.device)

    def load(self, encoder: Encoder, dtype: str) -> None:
        """See `Engine.load`; workers that are busy load it before their next shard."""
        self._saved = self.save(encoder, dtype)
        self._encoder += 1
        for member in self._members:
            self._send_encoder(member)

    def map(
        self,
        work: Work[Result],
        table: TokenTable,
        shards: Sequence[Batches],
        progress: Callable[[int], object],
    ) -> Iterator[Result]:
        """See `Engine.map`; progress is shown shard by shard."""
        self._pass += 1
        shared = self.share((work, table.reference))
        waiting = deque(range(len(shards)))
        left, lost = len(shards), Counter[int]()
        while left:
            self._hire()
            for member in self._members:
                self._request(member, shared, table, shards, waiting)
            results: list[Result] = []
            for member, answer in self._answers():
                is_current = member.request == DO and member.shard[0] == self._pass
                index = member.shard[1]
                if isinstance(answer, Lost):
                    self._replace(member, answer)
                    if is_current:
                        waiting.appendleft(index)
                        lost[index] += 1
                        _check_losses(lost[index], MOST_LOSSES, answer)
                    continue
                self._note(member, answer)
                if is_current:
                    results.append(answer.value)
                    progress(sum(map(len, shards[index])))
                    self._losses = 0
            left -= len(results)
            for member in self._members:  # before results are merged, which takes a while
                self._request(member, shared, table, shards, waiting)
            yield from results

    def close(self) -> None:
        """End the workers."""
        for member in self._members:
            self.stop(member.handle)
        self._members = []

    def _hire(self) -> None:
        """Have as many workers as there are devices now."""
        count = self.count()
        while len(self._members) < count:
            self._members.append(_Member(self.start()))
        for member in [member for member in self._members if not member.is_ready][::-1]:
            if len(self._members) > count:  # it waits for a device that is gone
                self._members.remove(member)
                self.stop(member.handle)

    def _request(
        self,
        member: _Member[Handle],
        shared: Any,
        table: TokenTable,
        shards: Sequence[Batches],
        waiting: deque[int],
    ) -> None:
        """Give a worker that is free its next request, if there is any."""
        self._send_encoder(member)
        if member.request:
            return
        if waiting and member.begun != self._pass:
            member.request, member.shard = BEGIN, (self._pass, 0)
            self.send(member.handle, BEGIN, shared)
        elif waiting:
            index = waiting.popleft()
            member.request, member.shard = DO, (self._pass, index)
            tokens = None
            if not member.has_table:
                tokens = self.share(table.part(np.concatenate(shards[index])))
            self.send(member.handle, DO, shards[index], tokens)

    def await_answers(self) -> None:
        """Start workers, and wait until some have answered, or for some seconds."""
        self._hire()
        for member, answer in self._answers():
            if isinstance(answer, Lost):
                self._replace(member, answer)
            else:
                self._note(member, answer)

    def _send_encoder(self, member: _Member[Handle]) -> None:
        """Let a worker that is free load the encoder, if it has another one."""
        if not member.request and member.encoder != self._encoder:
            member.request, member.shard = LOAD, (self._encoder, 0)
            self.send(member.handle, LOAD, self._saved)

    def _answers(self) -> list[tuple[_Member[Handle], Answer | Lost]]:
        """The next answers, at least one unless it is time to look for new devices."""
        busy = [member for member in self._members if member.request]
        answers = self.wait([member.handle for member in busy])
        return [(busy[number], answer) for number, answer in answers]

    def _note(self, member: _Member[Handle], answer: Answer) -> None:
        """What an answer tells of a worker.

        Raises:
            Exception: what the worker raised, unless it is about work that was given up since.
        """
        request, number = member.request, member.shard[0]
        member.request = ""
        if request == HELLO:
            self.greet(answer)
            member.is_ready = True
            return
        is_current = number == (self._encoder if request == LOAD else self._pass)
        if answer.error is not None:
            if is_current:
                raise answer.error
        elif request == LOAD:
            member.encoder = number
        elif request == BEGIN:
            member.begun, member.has_table = number, answer.value

    def _replace(self, member: _Member[Handle], lost: Lost) -> None:
        """Let a lost worker go.

        Raises:
            UnavailableError: workers end again and again.
        """
        log.warning("a worker was lost (%s); another one takes over", lost.reason)
        self._members.remove(member)
        self.stop(member.handle)
        self._losses += 1
        _check_losses(self._losses, MOST_LOSSES * max(1, self.count()), lost)

    @abstractmethod
    def count(self) -> int:
        """How many workers there should be now."""

    @abstractmethod
    def start(self) -> Handle:
        """Start a worker, which answers when it is ready."""

    @abstractmethod
    def stop(self, handle: Handle) -> None:
        """End a worker, which may have ended already."""

    @abstractmethod
    def save(self, encoder: Encoder, dtype: str) -> Any:
        """What workers load an encoder from."""

    @abstractmethod
    def share(self, value: Any) -> Any:
        """What several requests send of a value."""

    @abstractmethod
    def send(self, handle: Handle, request: str, *arguments: Any) -> None:
        """Send a request: the name of a method of `ShardWorker` and its arguments."""

    @abstractmethod
    def wait(self, handles: Sequence[Handle]) -> list[tuple[int, Answer | Lost]]:
        """Wait for answers, each with the number of its handle; none after some seconds."""

    def greet(self, answer: Answer) -> None:
        """Check the first answer of a worker.

        Raises:
            Exception: what the worker raised.
        """
        if answer.error is not None:
            raise answer.error


def _check_losses(losses: int, most: int, lost: Lost) -> None:
    if losses >= most:
        raise UnavailableError(
            f"workers end again and again ({losses} times: {lost.reason}); memory may be too small"
        )
