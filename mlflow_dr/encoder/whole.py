"""Whether a directory that somebody else writes holds a whole encoder, judged by its own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONFIGS = ("config.json", "adapter_config.json", "modules.json", "mlflow_dr.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
HEADER = 8
LONGEST_HEADER = 100_000_000
STATE = "trainer_state.json"
STEP = re.compile(r"(?:.*[^0-9])?([0-9]{1,18})", re.DOTALL)  # what a metric takes is 64 bits
LARGEST_STEP = 10**18


def why_not_whole(directory: Path) -> str:
    """What is missing, or damaged; empty when nothing is.

    Configurations must parse; shards that an index names must be there; a safetensors file must be
    as long as its header says. A module directory of sentence-transformers counts as well.

    Args:
        directory: of any of the kinds that `load_encoder` reads.
    """
    try:
        configs = [directory / name for name in CONFIGS if (directory / name).is_file()]
        if not configs:
            return f"none of {', '.join(CONFIGS)}"
        for path in configs:
            json.loads(path.read_text(encoding="utf-8"))
        weights = [path for pattern in WEIGHTS for path in sorted(directory.rglob(pattern))]
        for path in _shards(directory):
            if not path.is_file():
                return f"{path.name} is missing"
        if not weights:
            return "no weights"
        for path in weights:
            if reason := _damage(path):
                return f"{path.relative_to(directory)} {reason}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} has gone"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())[:300]
    except RecursionError:
        return "its JSON is nested too deeply"
    return ""


def signature_of(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of all files: what changes while a directory is being written."""
    found = []
    for path in sorted(directory.rglob("*")):
        try:
            state = path.stat()
        except OSError:
            continue
        found.append((str(path.relative_to(directory)), state.st_size, state.st_mtime_ns))
    return tuple(found)


def step_of(directory: Path) -> int | None:
    """The training step of a checkpoint: what its trainer noted, else the number its name ends in.

    None where neither says one.
    """
    try:
        noted = json.loads((directory / STATE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        noted = None
    if type(noted) is int and 0 <= noted < LARGEST_STEP:
        return noted
    match = STEP.fullmatch(directory.name)
    step = int(match[1]) if match else LARGEST_STEP
    return step if step < LARGEST_STEP else None


def _shards(directory: Path) -> Iterator[Path]:
    """The files that an index names.

    Raises:
        ValueError: it is no index.
    """
    for name in INDEXES:
        index = directory / name
        if not index.is_file():
            continue
        values = json.loads(index.read_text(encoding="utf-8"))
        names = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{name} has no weight_map that names files")
        for file in names.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name} names {file!r:.100}, which is no file beside it")
        yield from (directory / file for file in sorted(set(names.values())))


def _damage(path: Path) -> str:
    """How a file of weights is cut off; empty when it is not.

    Raises:
        ValueError: its header is malformed.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return "" if size else "is empty"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEADER), "little")
        if size < HEADER or not 0 < length <= min(LONGEST_HEADER, size - HEADER):
            return f"is cut off after {size} bytes"
        header: Any = json.loads(file.read(length))
    try:
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    except (AttributeError, KeyError, TypeError, IndexError):
        ends = [None]
    if not all(type(end) is int for end in ends):
        raise ValueError(f"{path.name} has a malformed header")
    whole = HEADER + length + max(ends, default=0)
    return "" if size == whole else f"has {size} bytes, but its header says {whole}"
