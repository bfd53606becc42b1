"""Rankings in files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from benchmarks.fuzzing import odd, reading
from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from benchmarks.fuzzing.collections import PASSAGES, QUERIES, hurt


def ranking(chance: Random, room: Path) -> Case:
    from mlflow_dr.collection.corpus import Corpus
    from mlflow_dr.collection.records import Query
    from mlflow_dr.retrieval.ranking import read_ranking

    ids = [one[0] for one in PASSAGES]
    corpus = Corpus(
        pa.table(
            {
                name: [one[place] for one in PASSAGES]
                for place, name in enumerate(("id", "title", "text"))
            }
        )
    )
    queries = [Query(one[0], one[1]) for one in QUERIES]
    form = chance.choice(("trec", "rank", "score"))
    rows: list[list[str]] = []
    for query in queries:
        order = chance.sample(ids, 5)
        for rank, passage in enumerate(order, 1):
            score = f"{chance.choice((0.5, 1.25, 3, -2, 1e-7)) * (6 - rank):.6g}"
            rows.append(
                {
                    "trec": [query.id, "Q0", passage, str(rank), score, "tag"],
                    "rank": [query.id, passage, str(rank)],
                    "score": [query.id, passage, f"{float(score):.6f}"],
                }[form]
            )
    act, how = chance.randrange(3), ""
    if act == 0:
        place = chance.randrange(len(rows))
        cell = chance.randrange(len(rows[place]))
        rows[place][cell], how = odd.word(chance, rows[place][cell])
        how = f"line {place}, cell {cell}: {how}"
    path = room / "some.trec"
    text = "".join(chance.choice((" ", "\t")).join(row) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8", errors="replace"))
    if act:
        path, how = hurt(chance, path, None)
    k = chance.choice((1, 3, 100))

    def read() -> Any:
        return [[ids[row] for row in rows] for rows in read_ranking(path, k, queries, corpus)]

    return Case(
        f"{form}: {how}",
        read,
        lambda: _tops(path, k, [one.id for one in queries], ids),
        ("some.trec",),
    )


NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE | re.ASCII
)


def _tops(path: Path, k: int, queries: list[str], passages: list[str]) -> list[list[str]]:
    found: dict[str, dict[str, float]] = {query: {} for query in queries}
    width, by_rank = 0, False
    for line in reading.lines(path):
        words = [one.strip() for one in line.split("\t")]
        if len(words) not in (3, 6):
            words = [one for one in re.split(r"[ \t\r\v\f]+", line) if one]
        if not width:
            width = len(words)
            by_rank = width == 3 and words[2].isdecimal()
        if len(words) != width or width not in (3, 6):
            raise UnreadableError("not as many columns")
        query, passage, number = (
            words[0],
            words[2 if width == 6 else 1],
            words[4 if width == 6 else 2],
        )
        if not (re.fullmatch(r"[-+]?\d{1,300}", number) if by_rank else NUMBER.fullmatch(number)):
            raise UnreadableError("no number")
        score = -float(number) if by_rank else float(number)
        if query in found:
            found[query][passage] = max(score, found[query].get(passage, -math.inf))
    tops = []
    for of_query in found.values():
        best = sorted(of_query, key=lambda one: (of_query[one], one), reverse=True)[:k]
        tops.append([one for one in best if one in passages])
    if not any(tops):
        raise UnreadableError("nothing of this collection")
    return tops


KINDS = [Kind("ranking", ranking, 7)]
