"""Training examples in each layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzzing import damage, reading
from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from benchmarks.fuzzing.collections import PASSAGES, hurt, jsonl
from benchmarks.fuzzing.layouts import BY_ID, records_of
from mlflow_dr.collection.catalogue import Examples, open_examples

Side = list[tuple[Any, float | None]]
"""Passages, each with its score."""


def ours(examples: Examples) -> list[Any]:
    """Examples with the contents of their passages."""
    made = []
    for index in range(len(examples)):
        example = examples[index]
        rows = [int(row) for row in (*example.positives, *example.negatives)]
        held = [_held(passage) for passage in examples.passages.passages(rows)]
        scores = (
            [None] * len(rows)
            if example.scores is None
            else [float(score) for score in example.scores]
        )
        both = list(zip(held, scores, strict=True))
        split = len(example.positives)
        tokens = None if example.query.tokens is None else list(example.query.tokens)
        query = (example.query.id, example.query.text, list(example.query.answers), tokens)
        made.append(_tidy(query, both[:split], both[split:]))
    return made


def _held(passage: Any) -> Any:
    return passage.title, passage.text, None if passage.tokens is None else tuple(passage.tokens)


def _tidy(query: Any, positives: Side, negatives: Side) -> Any:
    """Remove repeated passages and negatives that are positives; keep scores if all have one."""
    sides = []
    seen: set[Any] = set()
    for side in (positives, negatives):
        kept: Side = []
        for held, score in side:
            if held not in seen:
                kept.append((held, score))
                seen.add(held)
        sides.append(kept)
    scored = all(score is not None for side in sides for _, score in side)
    return (
        *query,
        *([(held, score if scored else None) for held, score in side] for side in sides),
    )


def right(records: Sequence[dict[str, Any]], layout: str, corpus: Path | None) -> list[Any]:
    """The examples as the independent reader reads them."""
    passages_by_id = {}
    if corpus is not None:
        passages_by_id = {
            passage[0]: (passage[1], passage[2], None) for passage in reading.json_passages(corpus)
        }
    read = {"Tevatron": _tevatron, BY_ID: _by_id, "tokenised": _tokenised, "DPR": _dpr}[layout]
    made = []
    kinds = set()
    for index, record in enumerate(records):
        query, positives, negatives = read(record, index)
        if layout == BY_ID:
            positives, negatives = (
                [(passages_by_id[i], s) for i, s in side if i in passages_by_id]
                for side in (positives, negatives)
            )
        positives, negatives = (
            [entry for entry in side if _is_held(entry[0])] for side in (positives, negatives)
        )
        kinds |= {held[2] is None for held, _ in (*positives, *negatives)}
        if (query[1].strip() or query[3]) and positives:
            made.append(_tidy(query, positives, negatives))
    if len(kinds) > 1:
        raise UnreadableError("text and token ids")
    if not made:
        raise UnreadableError("no example")
    return made


def _is_held(held: Any) -> bool:
    title, text, tokens = held
    return bool(title.strip() or text.strip() or tokens)


def _id(record: dict[str, Any], index: int, *fields: str) -> str:
    named = [field for field in fields if record.get(field) not in (None, "")]
    return reading.identifier(record, named[0]) if named else str(index)


def _score(made: Any) -> float | None:
    if made is None:
        return None
    if isinstance(made, bool) or not isinstance(made, int | float):
        raise UnreadableError("a score is no number")
    with np.errstate(over="ignore"):
        score = float(np.float32(made)) if abs(made) < 10**39 else math.inf
    if not math.isfinite(score):
        raise UnreadableError("a score is not finite")
    return score


def _listed(record: dict[str, Any], field: str) -> list[Any]:
    return reading.optional(record, field, list, [])


def _passages(record: dict[str, Any], field: str, ids: Sequence[str], scored: bool) -> Side:
    made: Side = []
    for passage in _listed(record, field):
        if not isinstance(passage, dict):
            raise UnreadableError("a passage is no object")
        _id(passage, 0, *ids)
        held = (reading.optional(passage, "title", str, ""), reading.text(passage, "text"), None)
        made.append((held, _score(passage.get("score")) if scored else None))
    return made


def _tevatron(record: dict[str, Any], index: int) -> Any:
    query = (
        _id(record, index, "query_id"),
        reading.optional(record, "query", str, ""),
        reading.answers(record),
        None,
    )
    if "positive_passages" not in record:
        raise UnreadableError("another layout")
    return query, *(
        _passages(record, f"{side}_passages", ("docid",), True) for side in ("positive", "negative")
    )


def _dpr(record: dict[str, Any], index: int) -> Any:
    text = reading.optional(record, "question", str, "")
    query = (_id(record, index, "query_id", "question_id"), text, reading.answers(record), None)
    if "positive_ctxs" not in record:
        raise UnreadableError("another layout")
    ids = ("passage_id", "psg_id", "id")
    positives, hard = (
        _passages(record, f"{side}_ctxs", ids, False) for side in ("positive", "hard_negative")
    )
    return query, positives, hard or _passages(record, "negative_ctxs", ids, False)


def _by_id(record: dict[str, Any], index: int) -> Any:
    text = reading.optional(record, "query_text", str, "") or reading.optional(
        record, "query", str, ""
    )
    query = (_id(record, index, "query_id"), text, reading.answers(record), None)
    if "positive_document_ids" not in record:
        raise UnreadableError("another layout")
    sides = []
    for side in ("positive", "negative"):
        ids = [
            reading.identifier({"id": passage_id}, "id")
            for passage_id in _listed(record, f"{side}_document_ids")
        ]
        scores = [_score(score) for score in _listed(record, f"{side}_scores")]
        if scores and len(scores) != len(ids):
            raise UnreadableError("the numbers of scores and passages differ")
        sides.append(list(zip(ids, scores or [None] * len(ids), strict=True)))
    return query, *sides


def _tokenised(record: dict[str, Any], index: int) -> Any:
    text, tokens = reading.text_or_tokens(record.get("query") or "")
    if "positives" not in record:
        raise UnreadableError("another layout")
    sides = []
    for side in ("positives", "negatives"):
        held = [reading.text_or_tokens(passage) for passage in _listed(record, side)]
        sides.append(
            [(("", pair[0], None if pair[1] is None else tuple(pair[1])), None) for pair in held]
        )
    query = (_id(record, index, "query_id"), text, [], tokens or None)
    if sides[0] and bool(text) != (sides[0][0][0][2] is None) and (text or tokens):
        raise UnreadableError("text and token ids")
    return query, *sides


def layout(name: str) -> Callable[[Random, Path], Case]:
    """Cases of a layout: two files of JSON lines, JSON arrays or Parquet, some compressed."""

    def make(chance: Random, workdir: Path) -> Case:
        records = records_of(name)
        folder = workdir / "train"
        folder.mkdir()
        if name == BY_ID:
            jsonl(
                folder / "corpus.jsonl",
                [{"docid": i, "title": t, "text": x} for i, t, x in PASSAGES],
            )
        parts = {"train-0": records[:1], "train-1": records[1:]}
        form = chance.choice(("jsonl", "jsonl", "json", "parquet"))
        files = {}
        victim = chance.choice(list(parts))
        how = ""
        for stem, some in parts.items():
            path = folder / f"{stem}.{form}"
            if form == "parquet":
                pq.write_table(pa.Table.from_pylist(some), path)
            elif form == "json":
                if stem == victim and chance.random() < 0.5:
                    some, how = damage.tree(chance, some)
                path.write_bytes(damage.dumped(chance, some, chance.choice((None, 2))))
            else:
                jsonl(path, some)
            if stem == victim and form == "parquet":
                how = f"{path.name}: {damage.file(chance, path)}"
            elif stem == victim and not how:
                path, how = hurt(chance, path, some if form == "jsonl" else None)
            files[stem] = path
        if name == BY_ID and chance.random() < 0.2:
            _, more = hurt(chance, folder / "corpus.jsonl", None)
            how += f"; {more}"

        def plain() -> Any:
            paths = [path for path in files.values() if path.is_symlink() or path.is_file()]
            made = [record for path in paths for record in _records(path)]
            beside = next(folder.glob("corpus.jsonl*"), None) if name == BY_ID else None
            return right(made, name, beside)

        names = ("train-0", "train-1", "corpus.jsonl", "/train:")
        return Case(how, lambda: ours(open_examples(folder)), plain, names)

    return make


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".parquet":
        return reading.records(path)
    try:
        made: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UnreadableError(f"{type(error).__name__} on reading") from error
    return made


KINDS = [
    Kind("tevatron", layout("Tevatron"), 7),
    Kind("tevatron-ids", layout(BY_ID), 6),
    Kind("tevatron-tokens", layout("tokenised"), 5),
    Kind("dpr-json", layout("DPR"), 8),
]
