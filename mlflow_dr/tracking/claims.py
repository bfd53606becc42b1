"""Claims: exactly one of several validators gets a checkpoint, and another takes over if it dies.

A claim is a write-once parameter of the LoggedModel, one for each attempt; the server refuses the
second writer. Its owner renews a heartbeat, which is a tag. A validator that sees no new heartbeat
for 60 s, by its own clock, may take the claim over with the next attempt. Times of two machines are
never compared, and validators share nothing but the tracking server.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from mlflow import MlflowClient

from mlflow_dr.errors import one_line
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_by_id
from mlflow_dr.tracking.client import short_timeouts, tracking_errors, write_once
from mlflow_dr.tracking.results import PREFIX

log = logging.getLogger(__name__)

RENEWED_EVERY = 10.0
GIVEN_BACK = "given back"
ATTEMPT = re.compile(r"[1-9][0-9]{0,8}")
START_TIME = 22 - 3  # of proc(5)'s fields, counted from the one after the name


@dataclass(frozen=True)
class Owner:
    """A validator, as others see it in its claims.

    Attributes:
        host: name of the machine.
        pid: process id there.
        room: the boot of the machine and its process namespace; within it process ids are unique.
        started: when it began, in clock ticks since the boot; process ids are reused after a while.
        token: unique to this owner.
    """

    host: str
    pid: int
    room: str
    started: int
    token: str

    @staticmethod
    def me() -> Owner:
        """This process."""
        pid = os.getpid()
        return Owner(platform.node(), pid, _room(), _started(pid) or 0, uuid.uuid4().hex)

    @staticmethod
    def parse(text: str) -> Owner | None:
        """The owner in a claim's value; None if the value is malformed."""
        try:
            return msgspec.json.decode(text, type=Owner)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"

    @property
    def is_dead(self) -> bool:
        """Whether it has certainly ended; only processes of the same machine can know this."""
        return bool(self.room) and self.room == _room() and _started(self.pid) != self.started


@dataclass(frozen=True)
class LatestClaim:
    """The latest claim of a validation of a checkpoint.

    Attributes:
        attempt: its number, from 1.
        owner: the validator that made it; None if its value is malformed.
        beat: the heartbeat's value; empty before the first.
        given_back: whether the owner has declared that it will not finish.
    """

    attempt: int
    owner: Owner | None
    beat: str
    given_back: bool


def latest_claim(checkpoint: Checkpoint, name: str) -> LatestClaim | None:
    """The latest claim of the validation `name` of a checkpoint; None if there is none."""
    prefix = _key(name, "")
    attempts = [
        int(number)
        for key in checkpoint.params
        if key.startswith(prefix) and ATTEMPT.fullmatch(number := key.removeprefix(prefix))
    ]
    if not attempts:
        return None
    attempt = max(attempts)
    owner = Owner.parse(checkpoint.params[_key(name, attempt)])
    beat = checkpoint.tags.get(_beat_key(name), "")
    given_back = beat == _beat(attempt, GIVEN_BACK)
    return LatestClaim(attempt, owner, beat, given_back)


class HeartbeatMonitor:
    """Measures for how long the heartbeat of each claim has not changed.

    Args:
        patience: seconds without a new heartbeat after which a claim is free again.
        longest_gap: the longest time between two polls that counts, in seconds; half the patience
            when None. While the server was away, the owner could not renew either.
        clock: gives seconds.
    """

    def __init__(
        self,
        patience: float,
        longest_gap: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience = patience
        self._longest_gap = patience / 2 if longest_gap is None else longest_gap
        self._clock = clock
        self._seen: dict[tuple[str, str], _Seen] = {}

    def is_free(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether no validator is working on it; call it at every poll of the server."""
        claim = latest_claim(checkpoint, name)
        if claim is None or claim.given_back or (claim.owner and claim.owner.is_dead):
            return True
        now, key = self._clock(), (checkpoint.model_id, name)
        before = self._seen.get(key)
        if before is None or before.value != (claim.attempt, claim.beat):
            self._seen[key] = _Seen((claim.attempt, claim.beat), now, 0.0)
            return False
        still = before.still + min(now - before.at, self._longest_gap)
        self._seen[key] = _Seen(before.value, now, still)
        return still >= self._patience

    def forget(self, checkpoint: Checkpoint, name: str) -> None:
        """Stop measuring a validation that is done."""
        self._seen.pop((checkpoint.model_id, name), None)


@dataclass(frozen=True)
class _Seen:
    value: tuple[int, str]
    at: float
    still: float


class Claims:
    """The claims of one process, renewed by a thread until they are dropped.

    Args:
        client: of the tracking server.
        owner: of the claims; this process when None.
        every: seconds between two renewals.
    """

    def __init__(
        self, client: MlflowClient, owner: Owner | None = None, every: float = RENEWED_EVERY
    ) -> None:
        self.owner = owner or Owner.me()
        self._client = client
        self._every = every
        self._mine: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._is_cut_off = False
        self._thread: threading.Thread | None = None

    def claim(self, checkpoint: Checkpoint, name: str) -> bool:
        """Try to get the validation `name` of a checkpoint.

        Returns:
            Whether it is ours now; if not, another validator was faster.

        Raises:
            TrackingError: the server does not answer.
        """
        before = latest_claim(checkpoint, name)
        attempt = before.attempt + 1 if before else 1
        key, value = _key(name, attempt), json.dumps(vars(self.owner))
        with tracking_errors(f"claiming step {checkpoint.step}"):
            try:
                write_once(self._client, checkpoint.model_id, key, value)
            except Exception:
                # another validator was faster, or the answer to our request was lost: read it back
                stored = checkpoint_by_id(self._client, checkpoint.model_id).params.get(key)
                if stored is None:
                    raise
                if stored != value:
                    return False
        with self._lock:
            self._mine[checkpoint.model_id, name] = attempt
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)
                self._thread.start()
        if before is not None:
            log.info("step %d is taken over from %s", checkpoint.step, before.owner)
        return True

    def drop(self, checkpoint: Checkpoint, *names: str, finished: bool) -> None:
        """Stop renewing claims, and give them back if the work is not finished."""
        with self._lock:
            keys = [(checkpoint.model_id, name) for name in names]
            dropped = {key: self._mine.pop(key) for key in keys if key in self._mine}
        if not finished:
            self._say(dropped, GIVEN_BACK)

    def close(self) -> None:
        """Give all claims back."""
        self._closed.set()
        with self._lock:
            left, self._mine = self._mine, {}
        self._say(left, GIVEN_BACK)

    def _renew(self) -> None:
        number = 0
        while not self._closed.wait(self._every):
            number += 1
            with self._lock:
                mine = dict(self._mine)
            self._say(mine, number)

    def _say(self, claims: Mapping[tuple[str, str], int], what: Any) -> None:
        """Write the heartbeats of several claims, with one request for each model."""
        by_model: dict[str, dict[str, str]] = {}
        for (model_id, name), attempt in claims.items():
            by_model.setdefault(model_id, {})[_beat_key(name)] = _beat(attempt, what)
        for model_id, tags in by_model.items():
            self._tag(model_id, tags)

    def _tag(self, model_id: str, tags: Mapping[str, str]) -> None:
        try:
            with short_timeouts():
                self._client.set_logged_model_tags(model_id, dict(tags))
        except Exception as error:  # noqa: BLE001 - at worst another validator repeats it
            if not self._is_cut_off:
                why = one_line(error)
                log.warning("the claim of models:/%s was not renewed: %s", model_id, why)
            self._is_cut_off = True
        else:
            self._is_cut_off = False


def _key(name: str, attempt: int | str) -> str:
    return f"{PREFIX}{name}.claim.{attempt}"


def _beat_key(name: str) -> str:
    return f"{PREFIX}{name}.heartbeat"


def _beat(attempt: int, what: Any) -> str:
    return f"{attempt}: {what}"


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[START_TIME])


@cache
def _room() -> str:
    """Identifies the processes that can see each other's ids; empty if that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return ""
    return f"{boot}/{namespace}"
