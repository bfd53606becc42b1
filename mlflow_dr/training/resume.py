"""Going on with a training that was stopped: which run it was, and which checkpoints are whole.

Trainer writes a checkpoint file by file, so one that a crash has cut off looks like any other. Here
a list of its files and their sizes is written last, when everything is on the disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_dr.errors import UsageError
from mlflow_dr.files import written_beside

RUN_FILE = "mlflow_dr_run.json"
WHOLE_FILE = "mlflow_dr_whole.json"
LAST = "true"


@dataclass(frozen=True)
class Resumption:
    """What a training goes on from.

    Attributes:
        run_id: the MLflow run.
        checkpoint: Trainer's checkpoint; None where the training was stopped before the first.
    """

    run_id: str
    checkpoint: Path | None


def find_resumption(output_dir: str | Path, asked: str | None) -> Resumption | None:
    """What to go on from.

    Args:
        output_dir: where the training saves.
        asked: `true` for the last whole checkpoint in `output_dir`, or a checkpoint's directory;
            None or `false` for a new training.

    Raises:
        UsageError: there is nothing to go on from.
    """
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != LAST:
        checkpoint = Path(asked).expanduser()
        run_id = _run_of_whole(checkpoint)
        if run_id is None:
            raise UsageError(
                f"{checkpoint}: not a whole checkpoint of `mlflow-dr train` (its {WHOLE_FILE} is "
                "missing or names other files); --resume_from_checkpoint alone takes the last whole"
            )
        return Resumption(run_id, checkpoint)
    directory = Path(output_dir)
    run_id = _read(directory / RUN_FILE).get("run_id")
    if not run_id:
        raise UsageError(
            f"{directory}: no training was started there ({RUN_FILE} is missing); give the "
            "--output_dir that it had, or leave --resume_from_checkpoint out"
        )
    whole = [path for path in checkpoints(directory).values() if _run_of_whole(path) == run_id]
    return Resumption(run_id, whole[-1] if whole else None)


def check_output(output_dir: str | Path, overwrite: bool) -> None:
    """Refuse an output directory that holds another training's checkpoints.

    Args:
        output_dir: where a new training will save.
        overwrite: whether such checkpoints are to be removed.

    Raises:
        UsageError: there are such checkpoints, and they are not to be removed.
    """
    directory = Path(output_dir)
    if not overwrite and (there := list(checkpoints(directory).values())):
        raise UsageError(
            f"{directory} has checkpoints of another training (such as {there[-1].name}); "
            "--resume_from_checkpoint goes on with it, --overwrite_output_dir removes them, "
            "or give another --output_dir"
        )


def begin_output(output_dir: str | Path, run_id: str) -> None:
    """Note in the output directory whose checkpoints it holds, and remove those of others."""
    directory = Path(output_dir)
    for checkpoint in checkpoints(directory).values():
        shutil.rmtree(checkpoint)
    _write(directory / RUN_FILE, {"run_id": run_id})


def mark_whole(checkpoint: Path, run_id: str) -> None:
    """Declare a checkpoint whole, once all its files are on the disk."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    _write(checkpoint / WHOLE_FILE, {"run_id": run_id, "files": sizes})


def checkpoints(directory: Path) -> dict[int, Path]:
    """Trainer's checkpoints in a directory, whole or not, by step; ascending."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in directory.glob("*")]
    return dict(sorted((int(match[1]), path) for match, path in named if match and path.is_dir()))


def whole_checkpoints_until(last: Path) -> dict[int, Path]:
    """Whole checkpoints beside one and of the same run, by step, ascending; it is the last.

    None for one that was given another name.
    """
    run_id = _run_of_whole(last)
    found: dict[int, Path] = {}
    for step, path in checkpoints(last.parent).items():
        if _run_of_whole(path) == run_id:
            found[step] = path
        if path == last:
            return found
    return {}


def _run_of_whole(checkpoint: Path) -> str | None:
    """The run of a checkpoint that is whole; None for one that is not."""
    note = _read(checkpoint / WHOLE_FILE)
    files = note.get("files")
    if not isinstance(files, dict):
        return None
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return note.get("run_id")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    with written_beside(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
