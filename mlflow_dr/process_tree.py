"""Memory, CPU time and disk reads of a process together with all processes below it.

Linux says in `/proc` how much of the memory is private and how much is page cache. Elsewhere psutil
gives the private memory alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil

log = logging.getLogger(__name__)

PROC = Path("/proc")
MEMORY_FIELDS = ("Pss_Anon", "Pss_File", "Pss_Shmem", "Locked")
# what reading a process raises that has ended, or is of another user
GONE = (psutil.Error, FileNotFoundError, ProcessLookupError, PermissionError)
CONTAINER = Path("/sys/fs/cgroup")
CONTAINER_MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Of control groups 2 and 1: the limit, what is used, and page cache that can be dropped."""
PAUSE = 2.0
SAMPLES_KEPT = 10_000
# the CPU time of reading, as a share of the time until it is read again; 0.5 % in all
MEMORY_SHARE = 1 / 250
OTHER_SHARE = 1 / 1000


class MemoryUse(NamedTuple):
    """Memory in bytes; a page that n processes share counts 1/n in each of them.

    Attributes:
        private: memory without a file behind it (Pss_Anon).
        file: page cache that is mapped (Pss_File).
        shmem: shared memory and files of a RAM disk that are mapped (Pss_Shmem).
        locked: memory that cannot be swapped out.
    """

    private: int = 0
    file: int = 0
    shmem: int = 0
    locked: int = 0


def tree(pid: int) -> list[int]:
    """A process and its descendants; processes that end meanwhile may be missing.

    Workers of a forkserver are children of the forkserver, and so are in the tree.

    Returns:
        Process ids, `pid` first; none if it has ended.
    """
    if not psutil.pid_exists(pid):
        return []
    own = str(os.getpid())
    if not (PROC / own / "task" / own / "children").exists():
        with suppress(*GONE):
            return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        return []
    found = [pid]
    for parent in found:
        found += _children(parent)
    return found


def files_in_use(folder: Path) -> dict[Path, int]:
    """The files below a folder that live processes have open or mapped -> one of these processes.

    Only Linux says this, and only of processes that this user may look into.
    """
    top = f"{folder.resolve()}/"
    found: dict[Path, int] = {}
    for process in PROC.glob("[0-9]*"):
        with suppress(*GONE, OSError):
            lines = (process / "maps").read_text(errors="replace").splitlines()
            names = [line.split(maxsplit=5)[-1] for line in lines if top in line]
            with suppress(*GONE, OSError):
                names += [str(link.readlink()) for link in (process / "fd").iterdir()]
            paths = [Path(name) for name in names if name.startswith(top)]
            found.update(dict.fromkeys(paths, int(process.name)))
    return found


def available_memory() -> int:
    """Bytes that this process can still have; a container may have less than the machine."""
    left: int = psutil.virtual_memory().available
    for limit_name, used_name, statistics, cached in CONTAINER_MEMORY:
        with suppress(OSError, ValueError):  # there is no such file, or no limit
            limit, used = (int((CONTAINER / name).read_text()) for name in (limit_name, used_name))
            left = min(left, limit - used + dict(_counts(CONTAINER / statistics)).get(cached, 0))
    return max(0, left)


def tree_memory(pid: int) -> MemoryUse:
    """The memory of a tree of processes, in bytes.

    This takes 20 to 30 ms of CPU time for each GB and process. Without Linux's `smaps_rollup` the
    private memory is psutil's USS, and the rest is 0.
    """
    return _sum_memory(tree(pid))


def tree_cpu(pid: int) -> float:
    """CPU seconds of a tree of processes so far, with those of ended children.

    An ended process whose parent has not waited for it, or has ended before it, is not counted.
    """
    return _cpu(tree(pid))


def tree_read_bytes(pid: int) -> int:
    """Bytes that a tree of processes has read from disk so far, as `tree_cpu` counts.

    Reads from the page cache are not counted. It is 0 where the system does not say.
    """
    return _read_bytes(tree(pid))


class TreeSample(NamedTuple):
    """What a `Sampler` has read at one time.

    Attributes:
        time: when, by `time.monotonic`.
        private: bytes of memory, as in `MemoryUse`; so are `file`, `shmem` and `locked`.
        cpu: CPU seconds so far.
        read_bytes: bytes read from disk so far.
        by_pages: whether memory was read by pages for this sample; otherwise it is an estimate.
    """

    time: float
    private: int
    file: int
    shmem: int
    locked: int
    cpu: float
    read_bytes: int
    by_pages: bool = False


class Sampler:
    """Reads the figures of a tree of processes in a thread of its own, from now until `close`.

    CPU time, disk reads and RssAnon are read every `pause` seconds. Memory by pages takes longer,
    so it is read so rarely that the thread takes at most 0.5 % of one core. In between, `private`
    is the last such figure plus what RssAnon of the same processes has grown by since.

    No error of the thread reaches other threads.

    Args:
        pid: the process on top; None for this one.
        pause: seconds between two samples.
        memory_share: CPU time of reading memory by pages, as a share of the time until it is read
            again.

    Attributes:
        samples: the last 10,000 samples, the oldest first.
        cpu_s: CPU seconds that the thread has taken.
    """

    def __init__(
        self, pid: int | None = None, pause: float = PAUSE, memory_share: float = MEMORY_SHARE
    ) -> None:
        self.samples: deque[TreeSample] = deque(maxlen=SAMPLES_KEPT)
        self.cpu_s = 0.0
        self._pid = os.getpid() if pid is None else pid
        self._pause = pause
        self._memory_share = memory_share
        self._begun = threading.Event()
        self._closed = threading.Event()
        self._memory = MemoryUse()
        self._anon: dict[int, int] = {}
        self._memory_due = 0.0
        threading.Thread(target=self._run, name="process tree sampler", daemon=True).start()

    @property
    def latest(self) -> TreeSample | None:
        """The last sample; None before the first one."""
        return self.samples[-1] if self.samples else None

    def first(self) -> TreeSample | None:
        """Wait for the first sample, in which memory is read by pages; None after an error."""
        self._begun.wait()
        return self.samples[0] if self.samples else None

    def close(self) -> None:
        """End the thread; this does not wait for what it is just reading."""
        self._closed.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                pids = tree(self._pid)
                by_pages = self._read_memory_if_due(pids)
                began = time.thread_time()
                self._sample(pids, by_pages)
                self.cpu_s = time.thread_time()
                self._begun.set()
                pause = max(self._pause, (self.cpu_s - began) / OTHER_SHARE)
                self._closed.wait(pause)
        except Exception as error:  # noqa: BLE001 - figures are not worth the training
            log.warning("memory and disk reads are not measured any more: %s", error)
        finally:
            self._begun.set()

    def _read_memory_if_due(self, pids: Sequence[int]) -> bool:
        now = time.monotonic()
        if now < self._memory_due:
            return False
        began = time.thread_time()
        anon = _private_rss(pids)
        self._memory = _sum_memory(pid for pid in pids if not self._closed.is_set())
        self._anon = anon
        self._memory_due = now + (time.thread_time() - began) / self._memory_share
        return True

    def _sample(self, pids: Sequence[int], by_pages: bool) -> None:
        anon = _private_rss(pids)
        grown = sum(anon[pid] - self._anon[pid] for pid in anon.keys() & self._anon.keys())
        private = max(0, self._memory.private + grown)
        memory = self._memory._replace(private=private)
        if not self._closed.is_set():
            now, cpu, read = time.monotonic(), _cpu(pids), _read_bytes(pids)
            self.samples.append(TreeSample(now, *memory, cpu, read, by_pages))


def _children(pid: int) -> list[int]:
    """The children of one process by Linux's lists, 50 times as fast as psutil."""
    children: list[int] = []
    with suppress(*GONE):
        for thread in (PROC / str(pid) / "task").iterdir():
            with suppress(*GONE):
                children += map(int, (thread / "children").read_bytes().split())
    return children


def _sum_memory(pids: Iterable[int]) -> MemoryUse:
    total = MemoryUse()
    for pid in pids:
        with suppress(*GONE):
            total = MemoryUse(*map(sum, zip(total, _memory(pid), strict=True)))
    return total


def _memory(pid: int) -> MemoryUse:
    try:
        rollup = dict(_sizes(PROC / str(pid) / "smaps_rollup"))
    except FileNotFoundError:
        rollup = {}
    if MEMORY_FIELDS[0] not in rollup:
        return MemoryUse(private=psutil.Process(pid).memory_full_info().uss)
    return MemoryUse(*(rollup.get(name, 0) for name in MEMORY_FIELDS))


def _private_rss(pids: Iterable[int]) -> dict[int, int]:
    """RssAnon of each process: private memory, with what it shares with its parent since a fork."""
    anon: dict[int, int] = {}
    for pid in pids:
        with suppress(*GONE):
            anon[pid] = dict(_sizes(PROC / str(pid) / "status")).get("RssAnon", 0)
    return anon


def _sizes(path: Path) -> Iterator[tuple[str, int]]:
    """The lines `name: number kB` of a file, in bytes."""
    for line in path.read_text("utf-8", "replace").splitlines():
        if line.endswith(" kB"):
            name, _, size = line[:-3].partition(":")
            yield name, int(size) * 1024


def _counts(path: Path) -> Iterator[tuple[str, int]]:
    """Names and numbers of a file that has one of each in a line."""
    for line in path.read_text().splitlines():
        name, _, number = line.partition(" ")
        yield name, int(number)


def _cpu(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        with suppress(*GONE):
            total += sum(psutil.Process(pid).cpu_times()[:4])  # user, system, those of children
    return total


def _read_bytes(pids: Iterable[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(*GONE, AttributeError):  # macOS does not count them
            total += psutil.Process(pid).io_counters().read_bytes
    return total
