"""Figures of a tree of processes, read from real processes."""

import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlflow_dr import process_tree
from mlflow_dr.process_tree import (
    Sampler,
    available_memory,
    tree,
    tree_cpu,
    tree_memory,
    tree_read_bytes,
)

MB = 2**20
ON_LINUX = Path("/proc/self/smaps_rollup").exists()
linux = pytest.mark.skipif(not ON_LINUX, reason="needs Linux's /proc")

# has a child, says both ids, and ends when its input does
PARENT = """
import subprocess, sys
data = bytearray(int(sys.argv[1]))
command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
child = subprocess.Popen(command, stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def parent_and_child(size: int = 0) -> Iterator[tuple[int, int]]:
    command = [sys.executable, "-c", PARENT, str(size)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        yield parent.pid, int(parent.stdout.readline())
        parent.communicate("")


@pytest.fixture(params=["proc", "psutil"])
def proc(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with Linux's files, once as on a system without them."""
    if request.param == "psutil":
        monkeypatch.setattr(process_tree, "PROC", tmp_path)
    elif not ON_LINUX:
        pytest.skip("needs Linux's /proc")
    return request.param


def test_a_tree_has_the_descendants_of_a_process(proc: str) -> None:
    with parent_and_child() as (parent, child):
        assert tree(parent) == [parent, child]
        assert {parent, child} <= set(tree(os.getpid()))
        assert tree(os.getpid())[0] == os.getpid()


def test_the_private_memory_of_a_child_is_in_the_tree(proc: str) -> None:
    with parent_and_child(size=64 * MB) as (parent, _):
        assert 64 * MB < tree_memory(parent).private < 128 * MB
        assert tree_memory(os.getpid()).private > tree_memory(parent).private


def test_a_process_that_has_ended_has_no_figures(proc: str) -> None:
    with parent_and_child() as (parent, _):
        pass
    assert tree(parent) == []
    assert tree_memory(parent) == (0, 0, 0, 0)
    assert tree_cpu(parent) == tree_read_bytes(parent) == 0


@linux
def test_mapped_files_and_shared_memory_are_not_private(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(32 * MB))
    before = tree_memory(os.getpid())
    with (
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        mmap.mmap(-1, 16 * MB) as shared,  # MAP_SHARED, which Linux keeps as a file
    ):
        sum(mapped[:: mmap.PAGESIZE])
        shared.write(b"1" * 16 * MB)
        after = tree_memory(os.getpid())
    assert after.file + after.shmem - before.file - before.shmem >= 47 * MB
    assert after.shmem - before.shmem >= 15 * MB
    assert after.private - before.private < 8 * MB


@linux
def test_memory_that_forked_processes_share_counts_once() -> None:
    code = (
        "import os, sys\n"
        "data = b'1' * (64 << 20)\n"
        "ready, wrote = os.pipe()\n"
        "if os.fork():\n"
        "    print(os.getpid(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert len(tree(pid)) == 2
        assert 64 * MB < tree_memory(pid).private < 100 * MB
        parent.communicate("")


def test_the_cpu_time_of_ended_children_is_kept() -> None:
    before = tree_cpu(os.getpid())
    code = "import time\nwhile time.process_time() < 0.2: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tree_cpu(os.getpid()) - before >= 0.19


def _work(sender: object) -> None:
    sender.send(os.getpid())
    sender.recv()


@linux
def test_workers_of_a_forkserver_are_in_the_tree() -> None:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_work, args=(theirs,))
    worker.start()
    assert ours.recv() in tree(os.getpid())
    ours.send(None)
    worker.join()


def samples_of(sampler: Sampler, enough: int) -> None:
    while len(sampler.samples) < enough:
        threading.Event().wait(0.001)


def test_a_sampler_follows_memory_and_cpu_time(proc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_tree, "OTHER_SHARE", 1)
    with Sampler(pause=0.001) as sampler:
        assert sampler.first() is not None
        # not from malloc, which would first use what this process has left free
        data = mmap.mmap(-1, 32 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for offset in range(0, len(data), mmap.PAGESIZE):
            data[offset] = 1
        samples_of(sampler, len(sampler.samples) + 2)
        last = sampler.latest
    assert last is not None
    first = sampler.samples[0]
    assert first == sampler.first()
    assert first.by_pages
    assert last.time > first.time
    assert last.cpu >= first.cpu > 0
    assert sampler.cpu_s > 0
    if proc == "proc":
        assert last.private - first.private > 30 * MB
    data.close()


def test_a_closed_sampler_takes_no_more_samples() -> None:
    sampler = Sampler(pause=3600)
    samples_of(sampler, 1)
    sampler.close()
    for thread in threading.enumerate():
        if thread.name == "process tree sampler":
            thread.join()
    assert len(sampler.samples) == 1


def test_an_error_ends_a_sampler_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(pid: int) -> list[int]:
        raise OSError("too many open files")

    monkeypatch.setattr(process_tree, "tree", fail)
    with Sampler(pause=3600) as sampler:
        assert sampler.first() is None
    assert sampler.latest is None
    assert "are not measured any more: too many open files" in caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"memory.max": "max", "memory.current": "5"}, None),
        ({"memory.max": "9000", "memory.current": "5000"}, None),
        (
            {
                "memory.max": "9000\n",
                "memory.current": "5000\n",
                "memory.stat": "anon 7\ninactive_file 1500\n",
            },
            5500,
        ),
        (
            {
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.usage_in_bytes": "9500",
                "memory/memory.stat": "cache 8\ntotal_inactive_file 100",
            },
            0,
        ),
    ],
)
def test_the_memory_that_a_container_has_left(
    files: dict[str, str],
    expected: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(process_tree, "CONTAINER", tmp_path)
    found = available_memory()
    assert found == expected if expected is not None else found > MB
