"""The engine that encodes on a Ray cluster: one actor for each device.

Actors stay warm from one encoder to the next. They hold nothing that others need: encoders, work
and tokens are objects of the process that started them.
"""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from mlflow_dr.devices import AUTO, dtype_name, resolve_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.pool import Lost, WorkerPool
from mlflow_dr.engines.worker import Answer, ShardWorker, write_encoder
from mlflow_dr.errors import MissingExtraError, UnavailableError, UsageError, one_line, quoted
from mlflow_dr.version import VERSION

ADDRESS = "RAY_ADDRESS"
HOST_AND_PORT = re.compile(r"[^/:]+:[0-9]+|\[[^/]+\]:[0-9]+")
SECONDS_BETWEEN_LOOKS = 2.0  # for nodes that have come or gone
SECONDS_TO_START = 180.0  # until a first actor has found its place and imported its modules
SECONDS_TO_ANSWER = 10.0  # of the head node
PASSED_ON = ("HF_HUB_OFFLINE", "MLFLOW_DR_CACHE", "TOKENIZERS_PARALLELISM")
"""Environment variables that an actor gets."""


class Greeting(NamedTuple):
    """The first answer of an actor.

    Attributes:
        version: of mlflow_dr.
        host: the name of its machine.
        dtype: the number format that `auto` is there.
    """

    version: str
    host: str
    dtype: str


class ShardActor:
    """A `ShardWorker` as an actor.

    Args:
        environment: variables to set.
        device: `cpu` or `cuda`.
    """

    def __init__(self, environment: dict[str, str], device: str) -> None:
        os.environ.update(environment)
        self._device = torch.device(device)
        self._worker = ShardWorker(self._device, threads=1)

    def greet(self) -> Answer:
        """Tell what is installed here."""
        return Answer(Greeting(VERSION, socket.gethostname(), resolve_dtype(AUTO, self._device)))

    def answer(self, request: str, *arguments: Any) -> Answer:
        """See `ShardWorker.answer`."""
        return self._worker.answer(request, *arguments)


@dataclass(eq=False)
class RayWorker:
    """An actor, and the answer that it owes.

    Attributes:
        actor: Ray's handle.
        answer: Ray's reference to the answer.
        started: by this process's clock, in seconds.
        is_ready: whether it has answered before.
    """

    actor: Any
    answer: Any
    started: float
    is_ready: bool = False


class RayEngine(WorkerPool[RayWorker]):
    """Does the work in actors of a Ray cluster; see `Engine`.

    Without `RAY_ADDRESS` a cluster of this machine is started, and ended by `close`.

    Args:
        device: `cuda` for an actor on each GPU, `cpu` for one on each core, or `auto`: GPUs if the
            cluster has any.

    Raises:
        MissingExtraError: Ray is not installed.
        UnavailableError: the cluster cannot be reached.
        UsageError: another device, or the cluster has another version of Ray or Python.
    """

    def __init__(self, device: str = AUTO) -> None:
        if device not in (AUTO, "cpu", "cuda"):
            raise UsageError(
                f"device {quoted(device)}: with --engine ray it is auto, cpu or cuda, and Ray "
                "chooses the devices"
            )
        self._ray = _ray()
        self._is_own = _connect(self._ray)
        self._address = self._ray.get_runtime_context().gcs_address
        resources = self._ray.cluster_resources()
        if device == AUTO:
            device = "cuda" if resources.get("GPU") else "cpu"
        super().__init__(torch.device(device))
        needs = {"num_cpus": 1, "num_gpus": int(device == "cuda")}
        self._resources = {name for name in ("CPU", "GPU") if needs[f"num_{name.lower()}s"]}
        self._actor = self._ray.remote(**needs, max_restarts=0)(ShardActor)
        self._count, self._counted_at = 0, -float("inf")
        self._answered_at = time.monotonic()
        self._dtype = ""

    def count(self) -> int:
        """See `WorkerPool.count`; at least one, so that a cluster that grows on demand does.

        Raises:
            UnavailableError: the head node does not answer.
        """
        now = time.monotonic()
        if now >= self._counted_at + SECONDS_BETWEEN_LOOKS:
            self._counted_at = now
            if self._head_answers():
                there = self._ray.cluster_resources()
                self._count = max(1, min(int(there.get(name, 0)) for name in self._resources))
        return self._count

    def resolve_dtype(self, dtype: str) -> str:
        """See `Engine.resolve_dtype`; of `auto`, the first actor knows."""
        dtype = dtype_name(dtype)
        if dtype != AUTO:
            return dtype if self.device.type == "cuda" else resolve_dtype(dtype, self.device)
        while not self._dtype:
            self.await_answers()
        return self._dtype

    def greet(self, answer: Answer) -> None:
        """See `WorkerPool.greet`.

        Raises:
            UsageError: the node has another version of mlflow_dr.
        """
        super().greet(answer)
        greeting: Greeting = answer.value
        if greeting.version != VERSION:
            raise UsageError(
                f"the Ray node {greeting.host} has mlflow_dr {greeting.version}, and this machine "
                f"has {VERSION}; install the same version on all nodes"
            )
        self._dtype = self._dtype or greeting.dtype

    def start(self) -> RayWorker:
        """See `WorkerPool.start`."""
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        actor = self._actor.remote(environment, self.device.type)
        return RayWorker(actor, actor.greet.remote(), time.monotonic())

    def stop(self, handle: RayWorker) -> None:
        """See `WorkerPool.stop`."""
        with suppress(Exception):  # it may be gone already
            self._ray.kill(handle.actor)

    def close(self) -> None:
        """End the actors, and a cluster that was started here."""
        super().close()
        if self._is_own:
            self._ray.shutdown()

    def save(self, encoder: Encoder, dtype: str) -> Any:
        """See `WorkerPool.save`; Ray brings the bytes to each node once."""
        buffer = io.BytesIO()
        write_encoder(encoder, dtype, buffer)
        return self._ray.put(np.frombuffer(buffer.getbuffer(), np.uint8))

    def share(self, value: Any) -> Any:
        """See `WorkerPool.share`."""
        return self._ray.put(value)

    def send(self, handle: RayWorker, request: str, *arguments: Any) -> None:
        """See `WorkerPool.send`."""
        handle.answer = handle.actor.answer.remote(request, *arguments)

    def wait(self, handles: Sequence[RayWorker]) -> list[tuple[int, Answer | Lost]]:
        """See `WorkerPool.wait`.

        Raises:
            UnavailableError: no actor has found a place.
        """
        if not handles:
            return []
        numbers = {handle.answer: number for number, handle in enumerate(handles)}
        references = list(numbers)
        ready, _ = self._ray.wait(references, timeout=SECONDS_BETWEEN_LOOKS)
        if ready:  # others may be, too
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        else:
            self._check_places(handles)
        answers: list[tuple[int, Answer | Lost]] = []
        for reference in ready:
            handle = handles[numbers[reference]]
            answer = self._received(reference)
            handle.is_ready = handle.is_ready or isinstance(answer, Answer)
            answers.append((numbers[reference], answer))
        return answers

    def _received(self, reference: Any) -> Answer | Lost:
        errors = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(reference)
        except errors.RayTaskError as error:
            return Answer(error=error.cause if isinstance(error.cause, Exception) else error)
        except errors.RayError as error:
            if missing := _missing_module(str(error)):
                raise UsageError(
                    f"a Ray node has no module {missing!r}; install mlflow_dr and what it needs on "
                    "all nodes"
                ) from error
            return Lost(one_line(error).partition(" class_name:")[0])
        return answer

    def _head_answers(self) -> bool:
        """Whether the head node is there; Ray itself ends this process a while after it is lost.

        Raises:
            UnavailableError: it has not answered for some seconds.
        """
        try:
            _knock(self._address)
        except OSError as error:
            if time.monotonic() > self._answered_at + SECONDS_TO_ANSWER:
                raise UnavailableError(
                    f"the head node of the Ray cluster at {self._address} does not answer "
                    f"({one_line(error)}); start the cluster and this command again",
                    lasting=True,
                ) from error
            return False
        self._answered_at = time.monotonic()
        return True

    def _check_places(self, handles: Sequence[RayWorker]) -> None:
        """Give up if no actor has answered for long."""
        if any(handle.is_ready for handle in handles):
            return
        if time.monotonic() > min(handle.started for handle in handles) + SECONDS_TO_START:
            free = self._ray.available_resources()
            needed = " and ".join(f"1 {name}" for name in sorted(self._resources))
            are_free = " and ".join(f"{free.get(name, 0):g} {name}" for name in self._resources)
            raise UnavailableError(
                f"no Ray actor has started for {SECONDS_TO_START:.0f} s: each needs {needed}, and "
                f"{are_free} are free; add nodes, or end what occupies them (`ray status`)"
            )


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError('Ray is not installed: pip install "mlflow_dr[ray]"') from error
    return ray


def _connect(ray: Any) -> bool:
    """Connect to the cluster; returns whether this made the connection.

    Raises:
        UnavailableError: there is none at the address, or it does not let this process in.
        UsageError: it has another version of Ray or of Python.
    """
    if ray.is_initialized():
        return False
    address = os.environ.get(ADDRESS)
    options: dict[str, Any] = (
        {"address": address}
        if address
        else {
            "address": "local",
            "num_cpus": max(torch.get_num_threads(), torch.cuda.device_count()),
            "include_dashboard": False,
        }
    )
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address and HOST_AND_PORT.fullmatch(address):
        try:
            _knock(address)
        except OSError as error:
            raise _no_cluster(address, error) from error
    try:
        with _handlers_kept(), _quiet():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.AuthenticationError, ConnectionError) as error:
        if "find any running Ray instance" in str(error):  # RAY_ADDRESS=auto
            raise _no_cluster(address, error) from error
        raise UnavailableError(
            f"the Ray cluster at {address} does not let this process in; if it has a token, set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on its head node",
            lasting=True,
        ) from error
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"Ray cannot be used: {one_line(error)}") from error
    except OSError as error:
        if "AF_UNIX" in str(error):
            raise UsageError(f"{one_line(error)}; set RAY_TMPDIR to a shorter path") from error
        raise _no_cluster(address, error) from error
    return True


def _no_cluster(address: str | None, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"there is no Ray cluster at {ADDRESS}={address}: {one_line(error)}; start one by `ray "
        f"start --head`, or unset {ADDRESS} for one of this machine",
        lasting=True,
    )


def _knock(address: str) -> None:
    """Check that something listens at `host:port`, for which Ray itself takes a minute.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what Ray's C++ part writes about each of its attempts to connect; errors tell it."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put signal handlers back, which Ray replaces by its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            with suppress(ValueError):  # only the main thread may
                signal.signal(number, handler)


def _missing_module(text: str) -> str:
    """The module that an actor could not import; empty if its error is another one."""
    _, found, rest = text.partition("No module named '")
    return rest.partition("'")[0] if found else ""
