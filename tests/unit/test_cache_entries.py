"""`mlflow-dr cache`: what is listed, and what is removed."""

import mmap
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from mlflow_dr.cache import CHECKED, cache_entry
from mlflow_dr.cache_entries import cache_entries, chosen_entries, parse_age
from mlflow_dr.cli.machine import cache_command
from mlflow_dr.collection.corpus import cached_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.errors import UsageError


def called(*argv: str, answer: str | None = None) -> Result:
    return CliRunner().invoke(cache_command, argv, input=answer)


def made(kind: str, key: str, size: int = 1000, about: str = "") -> Path:
    def build(partial: Path) -> None:
        partial.mkdir()
        (partial / "data").write_bytes(bytes(size))

    return cache_entry(kind, key, build, about)


@pytest.fixture
def old() -> Callable[[Path], None]:
    """Makes an entry look as if it was last opened 40 days ago."""

    def old(entry: Path) -> None:
        then = time.time() - 40 * 86400
        os.utime(entry / CHECKED, (then, then))

    return old


def test_entries_are_listed_with_what_they_are(own_cache: Path) -> None:
    cached_corpus("key", [Passage("p", "", "a tug")], location="harbour/corpus.jsonl")
    tokens = made("tokens", "a", 3_000_000, "8 passages of harbour")
    for key in range(12):
        made("fidelity", str(key))
    (own_cache / "downloads" / "0123456789abcdef").mkdir(parents=True)
    (own_cache / "downloads" / "0123456789abcdef" / "psgs.tsv.gz").write_bytes(b"12")
    (own_cache / "jax").mkdir()
    (own_cache / "jax" / "program").write_bytes(b"1")
    (own_cache / "mine").mkdir()
    (own_cache / "mine" / "thesis.tex").touch()
    shown = called().output
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    lines = [re.sub(r"used [\d.]+ s ago", "used now", line) for line in lines]
    assert "corpora: passages, as Arrow files, 1 entry" in shown
    assert any(line.endswith("harbour/corpus.jsonl") for line in lines)
    assert f"{tokens.name} 3.0 MB used now 8 passages of harbour" in lines
    assert "and 2 entries that are smaller" in lines
    assert any(line.endswith("psgs.tsv.gz") for line in lines)
    assert "jax: programs compiled by JAX, 1 entry, 1 bytes" in lines
    assert "thesis" not in shown
    assert lines[-1].endswith(f" in {own_cache}")


def test_what_was_not_used_for_long_is_removed(
    own_cache: Path, old: Callable[[Path], None]
) -> None:
    stale, fresh = made("tokens", "stale"), made("tokens", "fresh")
    other = made("bm25", "stale")
    for entry in (stale, other):
        old(entry)
    shown = called("remove", "tokens", "--older-than", "30d", "--yes").output
    assert shown == "removed 1 entry, 1.1 kB\n"
    assert [entry.path for entry in cache_entries()] == [fresh, other]
    assert made("tokens", "stale") == stale  # it is made again
    assert called("remove", "--all", "--yes").output.startswith("removed 3 entries")
    assert cache_entries() == []


def test_it_asks_before_it_removes() -> None:
    entry = made("tokens", "key")
    assert "nothing was removed" in str(called("remove", entry.name[:6], answer="n\n").exception)
    assert "nothing was removed" in str(called("remove", entry.name[:6]).exception)
    assert entry.exists()
    assert "removed 1 entry" in called("remove", entry.name[:6], answer="y\n").output
    assert not entry.exists()


def test_what_is_mapped_or_being_made_is_kept() -> None:
    mapped, making = made("tokens", "mapped"), made("tokens", "making")
    with (mapped / "data").open("rb") as file, FileLock(f"{making}.lock"):
        bytes_ = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        file.close()
        shown = called("remove", "--all", "--yes").output
        bytes_.close()
    assert f"kept tokens {mapped.name}: process {os.getpid()} uses it" in shown
    assert f"kept tokens {making.name}: another process is making it" in shown
    assert mapped.exists()
    assert making.exists()


def test_an_unfinished_entry_is_removed_with_its_name(own_cache: Path) -> None:
    remains = made("tokens", "key").parent / ".0123456789abcdef.x1"
    remains.mkdir()
    (remains / "data").write_bytes(b"1")
    assert "unfinished" in called().output
    called("remove", "0123", "--yes")
    assert not remains.exists()
    assert len(cache_entries()) == 1


@pytest.mark.parametrize("argv", [[], ["--all", "tokens"], ["nope"], ["--older-than", "soon"]])
def test_what_is_refused(argv: list[str]) -> None:
    assert isinstance(called("remove", *argv).exception, UsageError)


def test_opening_an_entry_again_is_noted(old: Callable[[Path], None], own_cache: Path) -> None:
    entry = made("tokens", "key")
    old(entry)
    assert chosen_entries([], "30d")
    from mlflow_dr import cache

    cache._sound.clear()  # as in a new process
    made("tokens", "key")
    assert not chosen_entries([], "30d")


def test_ages() -> None:
    assert [parse_age(text) for text in ("12h", "30d", "2w")] == [43200, 2592000, 1209600]
