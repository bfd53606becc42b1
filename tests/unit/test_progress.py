"""Progress: a bar in a terminal, whole lines at long intervals anywhere else, or nothing."""

import io
import sys

import pytest
from tqdm import tqdm

from mlflow_dr import progress
from mlflow_dr.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_short_work_prints_nothing_outside_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar(100, "reading", "passages") as bar:
        for _ in range(100):
            bar.update(1)
    assert bar.n == 100
    assert capfd.readouterr() == ("", "")


def test_long_work_prints_whole_lines_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    with progress_bar(4, "reading", "passages") as bar:
        for _ in range(4):
            bar.update(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err
    assert err.endswith("\n")
    lines = err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("reading: ") for line in lines)
    assert "2/4" in err


def test_lines_are_printed_at_intervals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    with progress_bar(100, "reading", "passages") as bar:
        start = bar.start_t
        for second in range(1, 101):
            bar._time = lambda second=second: start + second
            bar.update(1)
    lines = capsys.readouterr().err.splitlines()
    # 100 seconds by this clock, a line after each ten
    assert 8 <= len(lines) <= 10


def test_unknown_totals_are_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    with progress_bar(None, "reading", "passages") as bar:
        bar.update(7)
    assert "7passages" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(4, "reading", "passages") as bar:
        bar.update(4)
    assert "reading:" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_prints_nothing(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    output = stream()
    monkeypatch.setattr(sys, "stderr", output)
    with progress_bar(4, "reading", "passages", quiet=True) as bar:
        bar.update(4)
    assert output.getvalue() == ""


def test_an_error_passes_through() -> None:
    with pytest.raises(RuntimeError, match="cut off"), progress_bar(4, "reading", "passages"):
        raise RuntimeError("cut off")
