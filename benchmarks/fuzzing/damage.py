"""Damage to bytes, lines, JSON values, files and folders."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import odd


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value in a tree of dictionaries and lists."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, child in items:
        yield (*path, key)
        yield from paths(child, (*path, key))


def tree(chance: Random, whole: Any) -> tuple[Any, str]:
    """A copy of a JSON value with one change, and a description of the change."""
    changed = copy.deepcopy(whole)
    found = list(paths(changed))
    if not found or chance.random() < 0.02:
        return odd.value(chance), "all of it"
    path = chance.choice(found)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    last, old = path[-1], holder[path[-1]]
    act = chance.randrange(12)
    what = ".".join(map(str, path))
    if act == 0:
        del holder[last]
        return changed, f"{what} removed"
    if act == 1 and isinstance(holder, dict):
        holder[
            chance.choice(
                (
                    "",
                    "x",
                    "\x1b[2J",
                    "\ud800",
                    "__class__",
                    last.upper() if isinstance(last, str) else "y",
                )
            )
        ] = holder.pop(last)
        return changed, f"{what} renamed"
    if act == 2:
        holder[last] = [old]
        return changed, f"{what} nested"
    if act == 3 and isinstance(old, str):
        index = chance.randint(0, len(old))
        holder[last] = (
            old[:index]
            + chance.choice((*odd.CONTROLS, odd.CLIPBOARD, " ", "\n", "\t", '"'))
            + old[index:]
        )
        return changed, f"{what} with a control character"
    if act == 4 and isinstance(old, int | float | bool):
        holder[last] = str(old)
        return changed, f"{what} as a string"
    if act == 5 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(old))
        return changed, f"{what} twice"
    if act == 6 and isinstance(old, str):
        holder[last] = chance.choice((old.upper(), f" {old}", f"{old} ", old * 2, old[:-1]))
        return changed, f"{what} varied"
    holder[last] = new = odd.value(chance)
    return changed, f"{what} = {new!r:.60}"


def dumped(chance: Random, whole: Any, indent: int | None = None) -> bytes:
    """A JSON value as bytes; lone surrogates are escaped."""
    if chance.random() < 0.5:
        try:
            return json.dumps(whole, ensure_ascii=False, indent=indent).encode()
        except UnicodeEncodeError:
            pass
    return json.dumps(whole, indent=indent).encode()


def raw(chance: Random, data: bytes) -> tuple[bytes, str]:
    """Damaged bytes, and a description of the damage."""
    name = chance.choice(list(_RAW))
    return _RAW[name](chance, data), name


def _flipped(chance: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(chance: Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def _slice(chance: Random, data: bytes) -> tuple[int, int]:
    start = chance.randrange(len(data) + 1)
    return start, min(len(data), start + chance.choice((1, 2, 5, 50)))


def _hole(chance: Random, data: bytes) -> bytes:
    start, stop = _slice(chance, data)
    return data[:start] + data[stop:]


def _doubled(chance: Random, data: bytes) -> bytes:
    start, stop = _slice(chance, data)
    return data[:stop] + data[start:]


def _inserted(chance: Random, data: bytes) -> bytes:
    index = chance.randrange(len(data) + 1)
    what = chance.choice(odd.PIECES)
    return data[:index] + what + data[index:]


def _lines(
    change: Callable[[Random, list[bytes]], list[bytes]],
) -> Callable[[Random, bytes], bytes]:
    return lambda chance, data: b"".join(change(chance, data.splitlines(keepends=True)))


def _line_twice(chance: Random, lines: list[bytes]) -> list[bytes]:
    if lines:
        index = chance.randrange(len(lines))
        lines.insert(chance.randrange(len(lines) + 1), lines[index])
    return lines


def _line_dropped(chance: Random, lines: list[bytes]) -> list[bytes]:
    if lines:
        del lines[chance.randrange(len(lines))]
    return lines


def _lines_swapped(chance: Random, lines: list[bytes]) -> list[bytes]:
    chance.shuffle(lines)
    return lines


def _lines_joined(chance: Random, lines: list[bytes]) -> list[bytes]:
    if lines:
        index = chance.randrange(len(lines))
        lines[index] = lines[index].rstrip(b"\n")
    return lines


def _blank_line(chance: Random, lines: list[bytes]) -> list[bytes]:
    lines.insert(
        chance.randrange(len(lines) + 1), chance.choice((b"\n", b"  \n", b"\r\n", b"\x0c\n"))
    )
    return lines


def _long_line(chance: Random, lines: list[bytes]) -> list[bytes]:
    if lines:
        index = chance.randrange(len(lines))
        lines[index] = lines[index].rstrip(b"\n") * chance.choice((100, 20_000)) + b"\n"
    return lines


def _recoded(chance: Random, data: bytes) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(
        chance.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7")), errors="replace"
    )


_RAW: dict[str, Callable[[Random, bytes], bytes]] = {
    "bits flipped": _flipped,
    "bits flipped ": _flipped,
    "cut off": _cut,
    "a hole": _hole,
    "a part twice": _doubled,
    "something inserted": _inserted,
    "something inserted ": _inserted,
    "a line twice": _lines(_line_twice),
    "a line dropped": _lines(_line_dropped),
    "lines in another order": _lines(_lines_swapped),
    "two lines joined": _lines(_lines_joined),
    "a blank line": _lines(_blank_line),
    "a long line": _lines(_long_line),
    "empty": lambda chance, data: b"",
    "line ends of Windows": lambda chance, data: data.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda chance, data: b"\xef\xbb\xbf" + data,
    "another encoding": _recoded,
    "NULs": lambda chance, data: b"\x00" * len(data),
    "nested deeply": lambda chance, data: chance.choice((b"[", b'{"a":')) * 100_000,
    "an end of NULs": lambda chance, data: data[: len(data) // 2] + b"\x00" * (len(data) // 2),
    "no last line end": lambda chance, data: data.rstrip(b"\n"),
    "twice": lambda chance, data: data + data,
    "a page": lambda chance, data: b"<!DOCTYPE html><html><body>Please log in</body></html>\n",
}


def file(chance: Random, path: Path) -> str:
    """Damage a file in place; returns a description of the damage."""
    act = chance.randrange(24)
    if act == 0:
        path.unlink()
        return "removed"
    if act == 1:
        path.unlink()
        path.symlink_to("nowhere")
        return "a dangling link"
    if act == 2:
        path.unlink()
        path.symlink_to(path.name)
        return "a link to itself"
    if act == 3:
        path.unlink()
        path.mkdir()
        return "a folder"
    data, how = raw(chance, path.read_bytes())
    path.write_bytes(data)
    return how


def packed(chance: Random, path: Path) -> tuple[Path, str]:
    """Compress some files, and damage some of these; returns the path and a description."""
    act = chance.randrange(12)
    if act > 3:
        return path, ""
    target = path.with_name(path.name + ".gz")
    data = gzip.compress(path.read_bytes(), mtime=0)
    path.unlink()
    if act == 0:
        data, how = raw(chance, data)
    elif act == 1:
        data, how = data[: chance.randrange(len(data))], "cut off"
    elif act == 2:
        data, how = data + gzip.compress(b"", mtime=0), "of two members"
    else:
        how = "whole"
    target.write_bytes(data)
    return target, f"packed, {how}"
