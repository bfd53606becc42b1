"""Which parts are finished, and what a folder refuses."""

from pathlib import Path
from typing import NoReturn

import pytest

from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.qa.progress import FILE, FinishedParts

SETTINGS = {"first": {"size": 3}, "second": {"rate": 0.1}}


def fail() -> NoReturn:
    raise DataError("no such passage")


def test_a_finished_part_is_not_done_again(tmp_path: Path) -> None:
    parts = FinishedParts(tmp_path, SETTINGS)
    assert parts.do("first", lambda: {"found": [1, 2]})
    with pytest.raises(DataError, match="second: no such passage; the next call goes on"):
        parts.do("second", fail)
    again = FinishedParts(tmp_path, SETTINGS)
    assert "second" not in again
    assert not again.do("first", fail)
    assert again["first"] == {"found": [1, 2]}
    assert again.seconds["first"] >= 0


def test_only_the_settings_of_finished_parts_are_fixed(tmp_path: Path) -> None:
    FinishedParts(tmp_path, SETTINGS).do("first", dict)
    changed = {**SETTINGS, "second": {"rate": 0.2}}
    assert "first" in FinishedParts(tmp_path, changed)
    changed["first"] = {"size": 4}
    with pytest.raises(UsageError, match="first was done with size 3, and not 4"):
        FinishedParts(tmp_path, changed)
    assert "first" not in FinishedParts(tmp_path, changed, force=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"first": 1}', '{"third": {}}', '"x"'])
def test_a_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match="damaged; --force begins anew"):
        FinishedParts(tmp_path, SETTINGS)
