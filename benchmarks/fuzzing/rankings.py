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


def ranking(chance: Random, workdir: Path) -> Case:
    from mlflow_dr.collection.corpus import Corpus
    from mlflow_dr.collection.records import Query
    from mlflow_dr.retrieval.ranking import read_ranking

    ids = [passage[0] for passage in PASSAGES]
    corpus = Corpus(
        pa.table(
            {
                name: [passage[column] for passage in PASSAGES]
                for column, name in enumerate(("id", "title", "text"))
            }
        )
    )
    queries = [Query(query[0], query[1]) for query in QUERIES]
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
        index = chance.randrange(len(rows))
        cell = chance.randrange(len(rows[index]))
        rows[index][cell], how = odd.word(chance, rows[index][cell])
        how = f"line {index}, cell {cell}: {how}"
    path = workdir / "some.trec"
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
        lambda: _tops(path, k, [query.id for query in queries], ids),
        ("some.trec",),
    )


NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?inf(inity)?", re.IGNORECASE | re.ASCII
)


def _tops(path: Path, k: int, queries: list[str], passages: list[str]) -> list[list[str]]:
    found: dict[str, dict[str, float]] = {query: {} for query in queries}
    width, by_rank = 0, False
    for line in reading.lines(path):
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) not in (3, 6):
            columns = [column for column in re.split(r"[ \t\r\v\f]+", line) if column]
        if not width:
            width = len(columns)
            by_rank = width == 3 and columns[2].isdecimal()
        if len(columns) != width or width not in (3, 6):
            raise UnreadableError("the number of columns differs")
        query, passage, number = (
            columns[0],
            columns[2 if width == 6 else 1],
            columns[4 if width == 6 else 2],
        )
        if not (re.fullmatch(r"[-+]?\d{1,300}", number) if by_rank else NUMBER.fullmatch(number)):
            raise UnreadableError("no number")
        score = -float(number) if by_rank else float(number)
        if query in found:
            found[query][passage] = max(score, found[query].get(passage, -math.inf))
    tops = []
    for of_query in found.values():
        best = sorted(of_query, key=lambda passage: (of_query[passage], passage), reverse=True)[:k]
        tops.append([passage for passage in best if passage in passages])
    if not any(tops):
        raise UnreadableError("no passage of this collection")
    return tops


KINDS = [Kind("ranking", ranking, 7)]
