"""Unusual characters, strings, numbers, and values of unexpected types."""

from __future__ import annotations

from random import Random
from typing import Any

CONTROLS = (
    "\x00",
    "\x07",
    "\x08",
    "\x1b",
    "\x7f",
    "\x85",
    "\x9b",
    "\u2028",
    "\u200b",
    "\u202e",
    "\ufeff",
)
CLIPBOARD = "\x1b]52;c;aGVsbG8=\x07"
STRINGS = (
    *("", " ", "\t", "\n", "a\nb", "a\rb", "a\tb", "\x00", "a\x00b", CLIPBOARD, "\u202eabc"),
    *(
        "\ufeffa",
        "\ud800",
        "a\udfffb",
        "NaN",
        "null",
        "true",
        "no",
        "0",
        "-1",
        "1e5",
        "\u0661\u0662",
    ),
    *("..", "../../etc/passwd", "/", "~", "%s%n", "{}", "x" * 5000, "é", "e\u0301", "😀"),
    *("id with blanks", '"', "'", "\\", "\u00a0"),
)
NUMBERS = (
    *(0, -1, 1, 2, 3, 1.0, 1.5, -0.0, 1e308, -1e308, 1e-320, 2**31 - 1, 2**31, 2**53 + 1, 2**63),
    *(2**64, 10**30, -(10**30), float("nan"), float("inf"), float("-inf")),
)
NUMERALS = (
    *("0", "-1", "1.5", "1e3", "9" * 30, "9" * 5000, "\u0661\u0662", "\u00b2", "0x10", "1_000"),
    *("\u0660", "+5", " 5", "00", "05", "nan", "inf"),
)
PATHS = (
    *("../evil", "/etc/passwd", "a/../../b", "", ".", "\x1b]0;x\x07", "x" * 300, "nul\x00", "~"),
    *("manifest.json", "C:\\x", "sub/../config.json"),
)
PIECES = (
    *(
        b'"',
        b"'",
        b"\t",
        b"\n",
        b"\r",
        b"\r\n",
        b"\x00",
        b"\x00" * 64,
        b"\xff\xfe",
        b"\xed\xa0\x80",
    ),
    *(b"\xc3", b"\xef\xbb\xbf", b"\x1b[31m", b"\\", b"{", b"}", b"[", b"]", b",", b":", b" "),
    *(
        b"\xe2\x80\xae",
        b"\x0b",
        b"\x0c",
        b"\x1c",
        b"\x85",
        b"\xc2\x85",
        b"\xe2\x80\xa8",
        b"\xc2\xa0",
    ),
    *(b"\\u0000", b"NaN", b"1e999", b"9" * 5000),
)


def value(chance: Random) -> Any:
    """A value of an unexpected type or size."""
    kind = chance.randrange(10)
    if kind < 4:
        return chance.choice(STRINGS)
    if kind < 7:
        return chance.choice(NUMBERS)
    plain: list[Any] = [
        None,
        True,
        False,
        [],
        {},
        [None],
        [[]],
        {"a": 1},
        [1, "a"],
        [{}],
        ["a", None],
    ]
    if kind < 9:
        return chance.choice(plain)
    deep: Any = []
    for _ in range(chance.choice((3, 50, 400))):
        deep = [deep] if chance.random() < 0.5 else {"a": deep}
    return deep


def word(chance: Random, text: str) -> tuple[str, str]:
    """A changed text, and a description of the change."""
    act = chance.randrange(12)
    index = chance.randint(0, len(text))
    if act == 0:
        return text[:index] + text[index + 1 :], "a character left out"
    if act == 1:
        return text[:index] + chance.choice(
            (*CONTROLS, CLIPBOARD, "\ud800", "\n", "\t", " ")
        ) + text[index:], "a control character"
    if act == 2:
        return text[:index] + chance.choice("@:+,.-_/%$\\\"'[]{}()*?#&=;|<>~^!") + text[
            index:
        ], "a mark"
    if act == 3:
        return _replaced(chance, text, chance.choice(NUMERALS)), "another number"
    if act == 4:
        return chance.choice(
            ("", " ", "\x00", "x" * 10_000, "+", "@", ":", "a" * 300, "-", "--", "null")
        ), "something else"
    if act == 5:
        return text.upper(), "upper case"
    if act == 6:
        return text + text, "twice"
    if act == 7:
        return text[:index], "cut off"
    if act == 8:
        return f" {text}\t", "blanks around it"
    if act == 9:
        return text.replace(
            chance.choice(text or " "), chance.choice("@:+, ")
        ), "a character replaced"
    if act == 10:
        parts = text.split("+")
        chance.shuffle(parts)
        return "+".join(parts), "in another order"
    return text, "as it is"


def _replaced(chance: Random, text: str, number: str) -> str:
    digits = [index for index, character in enumerate(text) if character.isdigit()]
    if not digits:
        return text + number
    start = stop = chance.choice(digits)
    while start and text[start - 1].isdigit():
        start -= 1
    while stop < len(text) and text[stop].isdigit():
        stop += 1
    return text[:start] + number + text[stop:]
