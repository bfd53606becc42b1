"""Entries of the cache: what is damaged is made again, and gives what an empty cache gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_dr.cache import CHECKED, CHECKSUMS, cache_entry, file_checksum, sound_entry
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.examples import cached_examples
from mlflow_dr.collection.raw_examples import RawExample
from mlflow_dr.collection.records import Passage, Query, Topics
from mlflow_dr.encoder.token_table import cached_token_table
from mlflow_dr.fidelity_study.study import cached_array, store_array
from mlflow_dr.retrieval.bm25 import bm25_index
from mlflow_dr.subsets.spec import SubsetTerm
from mlflow_dr.subsets.strategies import SubsetSources

PASSAGES = [
    Passage(f"p{n}", "Ports", f"a {w} sails")
    for n, w in enumerate(("liner", "tug", "barge", "tug tug"))
]
QUERY = Query("q", "which tug sails")


def corpus() -> list[Any]:
    made = cached_corpus("key", PASSAGES)
    return [made.digest, *made.passages(range(len(made)))]


def examples() -> list[Any]:
    raw = RawExample("file:1", QUERY, PASSAGES[:1], PASSAGES[1:], [0.5], [0.1, 0.2, 0.3])
    made = cached_examples("key", [raw], "the source")
    query, positives, negatives, scores = made[0]
    passages = made.passages.passages([*positives, *negatives])
    return [made.digest, query, list(passages), scores.tolist()]


def tokens() -> list[Any]:
    made = cached_token_table("key", [[b"ab", b"c"], [b"def"]], list, 256, total=3)
    return [made[row].tolist() for row in range(len(made))]


def bm25() -> list[Any]:
    found = bm25_index(_corpus()).search([QUERY], 2)
    return [found.rows.tolist(), found.scores.tolist()]


def top_passages() -> list[Any]:
    sources = SubsetSources(_corpus(), Topics([QUERY], {}))
    term = SubsetTerm("bm25", 2)
    return [rows.tolist() for rows in term.strategy.choose(term, sources)]


def fidelity() -> list[Any]:
    if cached_array("bm25@2 of step 4") is None:
        store_array("bm25@2 of step 4", np.array([0.5, 0.25]))
    values = cached_array("bm25@2 of step 4")
    return [] if values is None else values.tolist()


def _corpus() -> Corpus:
    return cached_corpus("key", PASSAGES)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"0")
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def exchanged(path: Path) -> None:
    """Overwrites the file with another one of its folder."""
    others = [other for other in path.parent.iterdir() if other != path and other.is_file()]
    shutil.copy(others[0], path)


def moved(path: Path) -> None:
    path.rename(path.with_name("other"))


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    """Opening it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


DAMAGES = (flipped, cut_off, emptied, exchanged, Path.unlink, moved, made_a_folder, made_a_pipe)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        ("corpora", corpus),
        ("examples", examples),
        ("tokens", tokens),
        ("bm25", bm25),
        ("top_passages", top_passages),
        ("fidelity", fidelity),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_a_damaged_entry_is_rebuilt_with_one_log_line(
    own_cache: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    use: Callable[[], list[Any]],
    damage: Callable[[Path], object],
) -> None:
    expected = use()
    (entry,) = [path for path in (own_cache / kind).iterdir() if path.is_dir()]
    names = files_of(entry)
    assert len(names) > 1
    for name in names:
        if damage in (cut_off, emptied) and name.stat().st_size == 0:
            continue
        damage(name)
        caplog.clear()
        assert use() == expected
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"{entry} in the cache is damaged" in line
        assert "made again" in line
        assert "\n" not in line
        assert files_of(entry) == names
        caplog.clear()
        assert use() == expected
        assert not caplog.records


def files_of(entry: Path) -> list[Path]:
    """Without the hidden one, which is no part of the entry."""
    files = (path for path in entry.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


@pytest.fixture
def make_entry() -> Callable[..., Path]:
    """Makes or opens an entry; its file says how many were made before it."""
    before = count()

    def write(partial: Path) -> None:
        partial.mkdir()
        (partial / "text").write_text(f"made {next(before)}")

    return lambda key="key", kind="kind": cache_entry(kind, key, write)


def text(entry: Path) -> str:
    return (entry / "text").read_text()


def test_an_undamaged_entry_is_not_read_again(
    make_entry: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert text(make_entry()) == text(make_entry()) == "made 0"
    monkeypatch.setattr("mlflow_dr.cache.file_checksum", lambda path: pytest.fail("read again"))
    assert text(make_entry()) == "made 0"
    assert sound_entry("kind", "key") == make_entry()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Forgets the entries that this process has opened, as a new process has not opened any."""
    return lambda: monkeypatch.setattr("mlflow_dr.cache._sound", {})


def test_another_process_does_not_read_it_again(
    make_entry: Callable[..., Path], forget: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_entry()
    forget()
    monkeypatch.setattr("mlflow_dr.cache.file_checksum", lambda path: pytest.fail("read again"))
    assert text(make_entry()) == "made 0"


@pytest.mark.parametrize("boot_id", ["another", None])
def test_after_a_start_of_the_machine_an_entry_is_read_once(
    make_entry: Callable[..., Path],
    forget: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    boot_id: str | None,
) -> None:
    """Without a name of the start, each process reads it."""
    make_entry()
    forget()
    if boot_id:
        (tmp_path / "boot_id").write_text(boot_id)
    monkeypatch.setattr("mlflow_dr.cache.BOOT_ID", tmp_path / "boot_id")
    read: list[Path] = []
    checksum = file_checksum
    monkeypatch.setattr("mlflow_dr.cache.file_checksum", lambda p: read.append(p) or checksum(p))
    for times in (1, 1) if boot_id else (1, 2):
        assert text(make_entry()) == "made 0"
        assert len(read) == times
        forget()


@pytest.mark.parametrize("damage", [flipped, cut_off, Path.unlink, moved])
def test_another_process_finds_damage(
    make_entry: Callable[..., Path],
    forget: Callable[[], object],
    damage: Callable[[Path], object],
) -> None:
    damage(make_entry() / "text")
    forget()
    assert text(make_entry()) == "made 1"


def test_a_cache_that_cannot_be_written_to_is_read(
    make_entry: Callable[..., Path], forget: Callable[[], object]
) -> None:
    """Root may write anywhere, so a folder is in the place of the file."""
    entry = make_entry()
    (entry / CHECKED).unlink()
    (entry / CHECKED).mkdir()
    forget()
    assert text(make_entry()) == "made 0"


def test_damage_to_an_entry_in_use_is_found(
    make_entry: Callable[..., Path],
) -> None:
    """Damage is found even when size and time are unchanged."""
    entry = make_entry()
    assert make_entry() == entry
    state = (entry / "text").stat()
    (entry / "text").unlink()
    (entry / "text").write_text("made 7")
    os.utime(entry / "text", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert sound_entry("kind", "key") is None
    assert text(make_entry()) == "made 1"


def test_a_process_keeps_a_damaged_file_that_it_has_mapped(make_entry: Callable[..., Path]) -> None:
    entry = make_entry()
    flipped(entry / "text")
    mapped = np.memmap(entry / "text", np.uint8, "r")
    before = bytes(mapped)
    assert text(make_entry()) == "made 1"
    assert bytes(mapped) == before


def test_a_damaged_entry_is_kept_if_it_cannot_be_rebuilt(make_entry: Callable[..., Path]) -> None:
    entry = make_entry()
    flipped(entry / "text")
    before = text(entry)

    def fails(partial: Path) -> None:
        partial.mkdir()
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        cache_entry("kind", "key", fails)
    assert text(entry) == before
    assert text(make_entry()) == "made 1"


def test_two_exchanged_entries_are_both_rebuilt(make_entry: Callable[..., Path]) -> None:
    first, other = make_entry("one"), make_entry("other")
    first.rename(first.with_name("aside"))
    other.rename(first)
    first.with_name("aside").rename(other)
    assert [text(make_entry("one")), text(make_entry("other"))] == ["made 2", "made 3"]


@pytest.mark.parametrize("added", ["more", "folder/more"])
def test_a_file_that_was_added_is_damage(make_entry: Callable[..., Path], added: str) -> None:
    """A folder of a collection has a file for each split."""
    path = make_entry() / added
    path.parent.mkdir(exist_ok=True)
    path.write_text("more")
    assert text(make_entry()) == "made 1"
    assert not path.exists()


def test_hidden_files_are_ignored(make_entry: Callable[..., Path]) -> None:
    (make_entry() / ".nfs0001").touch()
    assert text(make_entry()) == "made 0"


def test_a_file_in_the_place_of_an_entry_is_replaced(make_entry: Callable[..., Path]) -> None:
    entry = make_entry()
    shutil.rmtree(entry)
    entry.write_text("no folder")
    assert text(make_entry()) == "made 1"


def test_an_entry_without_checksums_is_not_trusted(make_entry: Callable[..., Path]) -> None:
    """An interrupted copy of a cache leaves such an entry."""
    (make_entry() / CHECKSUMS).unlink()
    assert sound_entry("kind", "key") is None
    assert text(make_entry()) == "made 1"


def test_an_entry_may_move_with_the_cache(
    make_entry: Callable[..., Path],
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_entry()
    shutil.copytree(own_cache, tmp_path / "copy")
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "copy"))
    assert make_entry().is_relative_to(tmp_path / "copy")
    assert text(make_entry()) == "made 0"


AT_ONCE = """
import sys, time
from pathlib import Path
from mlflow_dr.cache import cache_entry

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def write(partial):
    with (folder / "log").open("a") as log:
        log.write(me)
    partial.mkdir()
    time.sleep(0.1)
    (partial / "text").write_text(me)

(folder / me).touch()
while not (folder / other).exists():
    time.sleep(0.001)
print((cache_entry("kind", "key", write) / "text").read_text())
"""


def test_two_processes_rebuild_a_damaged_entry_once(
    make_entry: Callable[..., Path], tmp_path: Path
) -> None:
    flipped(make_entry() / "text")
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", AT_ONCE, str(tmp_path), me, other],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    outputs = [process.communicate(timeout=600) for process in pair]
    by = (tmp_path / "log").read_text()
    assert by in ("a", "b")
    assert [out.strip() for out, _ in outputs] == [by, by]
    assert sum("is damaged" in error for _, error in outputs) == 1
