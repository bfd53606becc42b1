"""Files that are complete or absent."""

import gzip
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlflow_dr.errors import DataError
from mlflow_dr.files import (
    atomic_write,
    build_once,
    cache_dir,
    decoded,
    digest_of,
    file_sha256,
    grant_umask_modes,
    read_lines,
    scratch,
)

TWO_AT_ONCE = """
import sys, time
from pathlib import Path
from mlflow_dr.files import build_once

folder, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def build(partial):
    with (folder / "log").open("a") as log:
        log.write(me)
    partial.mkdir()
    (partial / "half").write_text(me)
    time.sleep(0.3)
    (partial / "whole").write_text(me)

(folder / me).touch()
while not (folder / other).exists():
    time.sleep(0.001)
made = build_once(folder / "target", build)
print((made / "whole").read_text())
"""


def test_two_processes_build_a_file_once(tmp_path: Path) -> None:
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_AT_ONCE, str(tmp_path), me, other],
            stdout=subprocess.PIPE,
            text=True,
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    outputs = [process.communicate(timeout=600)[0].strip() for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    built_by = (tmp_path / "log").read_text()
    assert built_by in ("a", "b")
    assert outputs == [built_by, built_by]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a", "b", "log", "target", "target.lock"]


def test_a_target_that_exists_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    target = build_once(tmp_path / "target", lambda partial: pytest.fail("built again"))
    assert target.read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from mlflow_dr.files import build_once

def build(partial):
    partial.mkdir()
    (partial / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

build_once(Path(sys.argv[1]), build)
"""


def test_the_remains_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "[a]"
    done = subprocess.run([sys.executable, "-c", KILLED, target], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*/*/half"))) == 1
    (tmp_path / ".other.half").mkdir()
    build_once(target, Path.touch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.half", "[a]", "[a].lock"]


@pytest.mark.parametrize("is_directory", [True, False])
def test_an_error_leaves_nothing_and_the_next_attempt_builds(
    tmp_path: Path, is_directory: bool
) -> None:
    def build(partial: Path) -> None:
        if is_directory:
            partial.mkdir()
            partial = partial / "file"
        partial.write_text("half")
        if fails:
            raise RuntimeError("cut off")

    target = tmp_path / "deep" / "target"
    fails = True
    with pytest.raises(RuntimeError, match="cut off"):
        build_once(target, build)
    assert [path.name for path in target.parent.iterdir()] == ["target.lock"]
    fails = False
    assert build_once(target, build).exists()


def test_an_atomic_write_is_renamed_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with atomic_write(target) as partial:
        partial.write_text("text")
        assert not target.exists()
        assert partial.name == "target"
    assert target.read_text() == "text"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_keeps_the_existing_file(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_environment_names_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_DR_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("MLFLOW_DR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlflow_dr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "mlflow_dr"


def test_digests() -> None:
    assert digest_of("a", 1) == digest_of("a", "1")
    assert len({digest_of("ab"), digest_of("a", "b"), digest_of("b", "a"), digest_of("a")}) == 4
    assert len(digest_of("a")) == 16
    assert len(digest_of(os.fsdecode(b"name of a file that is no UTF-8: \xff"))) == 16


def test_the_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "file") == expected


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lines_have_the_numbers_of_an_editor(tmp_path: Path, suffix: str) -> None:
    data = b"\xef\xbb\xbfone\r\n\n  \t\ntwo\n \xef\xbb\xbf three \nfour"
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert list(read_lines(path)) == [
        (1, b"one"),
        (4, b"two"),
        (5, b"\xef\xbb\xbf three"),
        (6, b"four"),
    ]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file: no such file"):
        list(read_lines(tmp_path / "file"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        list(read_lines(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("mlflow_dr.files.LONGEST_LINE", 1 << 20)
    path = tmp_path / f"file{suffix}"
    data = b"short\n" + b"x" * (1 << 24)
    path.write_bytes(gzip.compress(data, 1) if suffix else data)
    tracemalloc.start()
    lines = read_lines(path)
    assert next(lines) == (1, b"short")
    with pytest.raises(DataError, match=r"file.*:2: the line is longer than 1 MiB"):
        next(lines)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize("damage", ["truncated", "changed", "not packed"])
def test_damaged_compression(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(os.urandom(20_000).hex().encode()))
    if damage == "truncated":
        del data[-5000:]
    elif damage == "changed":
        data[5000:5100] = bytes(100)
    else:
        data = bytearray(b"plain text")
    (tmp_path / "file.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"file\.gz:1: the compressed file is damaged"):
        list(read_lines(tmp_path / "file.gz"))


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    assert decoded("é".encode(), tmp_path / "file", 7) == "é"
    with pytest.raises(DataError, match=r"file:7: not UTF-8 text"):
        decoded("é".encode("latin-1"), tmp_path / "file", 7)


def test_many_scratch_directories_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new directory may be swept before it is locked; then another one is made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work(_: int) -> None:
        for _ in range(40):
            with scratch() as directory:
                directory.mkdir()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_directory_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch() as directory:
        directory.mkdir()
        (directory / "weights").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_directory_made_in_one_thread_and_left_in_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with ExitStack() as ending:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ending.enter_context, scratch()).result()
        folder, _ = sorted(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == []
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(folder))]


def test_only_the_scratch_directories_of_killed_processes_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal\n"
        "from mlflow_dr.files import scratch\n"
        "with scratch() as directory:\n"
        "    directory.mkdir()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    variables = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=variables).returncode == -signal.SIGKILL
    left, lock = sorted(tmp_path.iterdir())
    others = {tmp_path / "mlflow_dr-scratch-mine", tmp_path / "mlflow_dr-notes"}
    for other in others:
        other.mkdir()
    with scratch() as first, scratch() as second:
        assert not left.exists()
        assert not lock.exists()
        assert first.parent.exists()
        assert second.parent.exists()
    assert set(tmp_path.iterdir()) == others


def test_no_scratch_directory_stays_when_the_process_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def die_at(moment: int) -> None:
        moments = iter(range(moment))

        def hook(event: str, _: object) -> None:
            is_about_files = event.startswith(("os.", "open", "shutil."))
            if is_about_files and next(moments, None) is None:
                signal.raise_signal(signal.SIGKILL)

        sys.addaudithook(hook)
        with scratch() as directory:
            directory.mkdir()
            (directory / "weights").write_text("1")

    for moment in range(100):
        child = os.fork()
        if child == 0:
            try:
                die_at(moment)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        with scratch():
            pass
        assert list(tmp_path.iterdir()) == [], moment
        if status == 0:
            break
    assert moment > 5


def test_files_get_the_modes_of_the_umask(tmp_path: Path) -> None:
    """Modes beyond the umask are kept; links are not changed."""
    (tmp_path / "sub").mkdir()
    private, program = tmp_path / "sub" / "private", tmp_path / "program"
    for path, mode in ((private, 0o600), (program, 0o755)):
        path.write_text("")
        path.chmod(mode)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = os.umask(0o022)
    try:
        grant_umask_modes(tmp_path)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (private, program)] == [0o644, 0o755]
    assert {path.name for path in tmp_path.iterdir()} == {"sub", "program", "link"}
