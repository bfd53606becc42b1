"""What reaches a terminal: no control characters, no secrets, no endless lines."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlflow_dr.errors import did_you_mean, one_line
from mlflow_dr.terminal import LONGEST_LINE, in_columns, one_line_of, printable, without_secrets

CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"  # OSC 52 writes the clipboard
OVERRIDE = "\u202e"  # what follows is shown from right to left


def test_control_characters_of_a_name_are_escaped() -> None:
    assert printable(f"a{CLIPBOARD}b{OVERRIDE}c\x9b\r\n") == (
        r"a\x1b]52;c;cm0gLXJm\x07b\u202ec\x9b\r\n"
    )
    assert printable("größe 模型 مرحبا") == "größe 模型 مرحبا"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("http://user:secret@127.0.0.1:9 is away", "http://***@127.0.0.1:9 is away"),
        ("https://host/?token=a&x=b", "https://host/?token=***&x=***"),
        ("https://host/?TOKEN", "https://host/?***"),
        ("postgresql://user:p@ss/w@host/db", "postgresql://user:***@host/db"),
        ("mysql://user:p?#@ss/w@host/db", "mysql://user:***@host/db"),
        ("postgresql://user@host/db?password=a", "postgresql://user@host/db?password=***"),
        ("host=h password=a user=u", "host=h password=*** user=u"),
        ("/api?access_token=a in a path", "/api?access_token=*** in a path"),
    ],
)
def test_secrets_are_not_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:///mlflow.db",
        "models:/name@best",
        "https://github.com/owner/name@main",
        "http://h:5000/#/experiments/0/runs/a/model-metrics?workflowType=machine_learning",
        "asyncval:corpus?queries=dev.json&qrels=dev.tsv",
        "token_table=true max_tokens=3",
    ],
)
def test_other_texts_are_shown(text: str) -> None:
    assert without_secrets(text) == text


def test_a_long_line_keeps_its_beginning_and_its_end() -> None:
    line = one_line_of(f"corpus.jsonl:7: id {'x' * 200_000}; give it another")
    assert len(line) == LONGEST_LINE
    assert line.startswith("corpus.jsonl:7: id xxx")
    assert line.endswith("xxx; give it another")
    assert len(one_line(ValueError("x" * 200_000))) < 330


@pytest.mark.parametrize("piece", ["://a:", "http://a@", "a-token", "://?a=", "\x1b"])
def test_every_text_is_handled_fast(piece: str) -> None:
    start = time.process_time()
    one_line_of(f"{piece * (200_000 // len(piece))}=")
    assert time.process_time() - start < 5


def test_cells_of_a_table_stay_on_their_line() -> None:
    table = in_columns([("step", "note"), ("1", f"a\nb{CLIPBOARD}")])
    assert table.splitlines()[1:] == [r"1     a\nb\x1b]52;c;cm0gLXJm\x07"]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_everything_that_a_command_prints_is_guarded(stream: str) -> None:
    code = (
        "import sys\n"
        "from mlflow_dr.terminal import guard_streams\n"
        "guard_streams(); guard_streams()\n"
        f"sys.stdout = sys.{stream}\n"
        f"print({CLIPBOARD!r}, 'http://TOKEN@host', 'Gr\\u00f6\\u00dfe \\udcff')\n"
        f"sys.{stream}.write('\\rbar\\n')\n"
        f"sys.{stream}.write('\\n\\x1b[A')\n"
    )
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        check=True,
        env={"LC_ALL": "C", "PYTHONPATH": ":".join(sys.path)},
    )
    shown = getattr(done, stream)
    assert shown.endswith(b"\rbar\n\n\x1b[A")
    assert shown.startswith(rb"\x1b]52;c;cm0gLXJm\x07 http://***@host Gr")
    assert rb"\udcff" in shown


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("Trian", ["train", "validate"]) == "; did you mean 'train'?"
    assert did_you_mean("zzz", ["train", "validate"]) == ""


def test_a_stream_whose_file_became_a_pipe_is_guarded(tmp_path: Path) -> None:
    """A file object remembers whether it can seek, but a new process may find a pipe instead."""
    code = (
        "import os, sys; sys.stdout.seekable(); sys.stdout.buffer.tell();"
        "r, w = os.pipe(); os.dup2(w, 1); from mlflow_dr.terminal import guard_streams;"
        "guard_streams(); print('a\\x1b'); sys.stdout.flush();"
        "sys.stderr.write(os.read(r, 99).decode())"
    )
    with (tmp_path / "out").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=file, stderr=subprocess.PIPE, text=True, check=True
        )
    assert done.stderr == "a\\x1b\n"
