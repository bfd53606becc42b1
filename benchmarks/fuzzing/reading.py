"""An independent reader of collections, which defines the right values."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzzing.case import UnreadableError

Passages = list[tuple[str, str, str, list[int] | None]]
"""id, title, text, tokens."""

MARK = b"\xef\xbb\xbf"
LAST_RELEVANCE = 32_767


def content(path: Path) -> bytes:
    """The bytes of a file, decompressed if its name ends in `.gz`."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableError(f"{type(error).__name__} on reading") from error
    return data.removeprefix(MARK)


def lines(path: Path) -> Iterator[str]:
    """Lines that are not blank, without blanks around them."""
    for line in content(path).split(b"\n"):
        if line.strip():
            try:
                yield line.strip().decode()
            except UnicodeDecodeError as error:
                raise UnreadableError("not UTF-8") from error


def _constant(text: str) -> Any:
    raise ValueError(text)


def parsed(text: str) -> Any:
    """Standard JSON, without NaN and lone surrogates."""
    try:
        made = json.loads(text, parse_constant=_constant)
        json.dumps(made, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON ({type(error).__name__})") from error
    return made


def records(path: Path, arrays: bool = True) -> list[dict[str, Any]]:
    """The objects of JSON lines or of a JSON array."""
    if arrays and content(path).lstrip()[:1] == b"[":
        try:
            made = parsed(content(path).decode())
        except UnicodeDecodeError as error:
            raise UnreadableError("not UTF-8") from error
    else:
        made = [parsed(line) for line in lines(path)]
    if not all(isinstance(record, dict) for record in made):
        raise UnreadableError("a record is no object")
    return made


def identifier(record: Mapping[str, Any], *fields: str) -> str:
    """The id in the first of the fields that exists."""
    made = next((record[field] for field in fields if field in record), None)
    if isinstance(made, str) and made:
        return made
    if isinstance(made, int) and not isinstance(made, bool):
        return str(made)
    raise UnreadableError(f"no id in {fields[0]}")


def text(record: Mapping[str, Any], *fields: str) -> str:
    """The string in the first of the fields that exists."""
    made = next((record[field] for field in fields if field in record), None)
    if not isinstance(made, str):
        raise UnreadableError(f"no text in {fields[0]}")
    return made


def optional(record: Mapping[str, Any], field: str, kind: type, default: Any) -> Any:
    """A value of a type, or the default if it is missing."""
    made = record.get(field)
    if made is None:
        return default
    if not isinstance(made, kind):
        raise UnreadableError(f"{field} is no {kind.__name__}")
    return made


def answers(record: Mapping[str, Any]) -> list[str]:
    """Short answers: a list of strings, or one string."""
    made = record.get("answers")
    made = [] if made is None else [made] if isinstance(made, str) else made
    if not isinstance(made, list) or not all(isinstance(answer, str) for answer in made):
        raise UnreadableError("answers are no strings")
    return made


def text_or_tokens(made: Any) -> tuple[str, list[int] | None]:
    """A string, or token ids."""
    if isinstance(made, str):
        return made, None
    if isinstance(made, list) and all(type(token) is int and 0 <= token < 2**31 for token in made):
        return "", made
    raise UnreadableError("neither text nor token ids")


def unique(ids: Sequence[str]) -> None:
    """Check that no id is repeated."""
    if len(set(ids)) < len(ids):
        raise UnreadableError("an id is used twice")


def json_passages(path: Path) -> Passages:
    """`corpus.jsonl` of BEIR or Tevatron."""
    made: Passages = [
        (
            identifier(record, "_id", "docid", "document_id", "id"),
            optional(record, "title", str, ""),
            text(record, "text", "document_text"),
            None,
        )
        for record in records(path, arrays=False)
    ]
    if not made:
        raise UnreadableError("no passage")
    unique([passage[0] for passage in made])
    return made


def table_passages(path: Path) -> Passages:
    """DPR's table, read as DPR does; a cell with a tab and a line end is an error."""
    try:
        text = content(path).decode()
    except UnicodeDecodeError as error:
        raise UnreadableError("not UTF-8") from error
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
        list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error as error:
        if "expected after" not in str(error):
            raise UnreadableError("an open quotation mark") from error
    made: Passages = []
    for row in rows:
        if any("\t" in cell and "\n" in cell for cell in row):
            raise UnreadableError("an open quotation mark")
        if not row or row[0] == "id":
            continue
        if len(row) != 3 or not row[0]:
            raise UnreadableError("not three columns")
        made.append((row[0], row[2], row[1], None))
    if not made:
        raise UnreadableError("no passage")
    unique([passage[0] for passage in made])
    return made


def qrels(path: Path, ids: set[str]) -> dict[str, dict[str, int]]:
    """Judgements of BEIR or TREC.

    Args:
        path: the file.
        ids: ids of queries and passages; a header contains none of them.
    """
    made: dict[str, dict[str, int]] = {}
    header: list[str] = []
    for number, line in enumerate(lines(path)):
        columns = [
            column.strip() for column in (line.split("\t") if "\t" in line else line.split())
        ]
        if number == 0 and not re.search(r"\d", columns[-1]):
            if ids & set(columns):
                raise UnreadableError("the first judgement has no relevance")
            header = columns
            continue
        if len(columns) == 4 and len(header) != 3:
            columns = columns[:1] + columns[2:]
        if len(columns) != 3 or not re.fullmatch(r"-?\d+", columns[2]):
            raise UnreadableError("no judgement")
        query, passage, relevance = columns[0], columns[1], int(columns[2])
        if abs(relevance) > LAST_RELEVANCE:
            raise UnreadableError("a relevance that trec_eval does not accept")
        if made.setdefault(query, {}).setdefault(passage, relevance) != relevance:
            raise UnreadableError("two judgements of one passage")
    return made


def topics(
    queries: Mapping[str, Any], judged: dict[str, dict[str, int]], passages: Passages
) -> dict[str, Any]:
    """Queries that have judgements of existing passages, and these judgements."""
    passage_ids = {passage[0] for passage in passages}
    kept = {
        query: {passage: n for passage, n in judged[query].items() if passage in passage_ids}
        for query, put in queries.items()
        if query in judged and (put[0].strip() or put[2])
    }
    kept = {query: some for query, some in kept.items() if some}
    if not kept:
        raise UnreadableError("no judgement is left")
    return {"queries": [(query, *queries[query]) for query in kept], "qrels": kept}


def ranked(ids: Sequence[str], query: str) -> list[tuple[str, float]]:
    """A ranking of all passages that depends only on the ids."""
    order = sorted(ids, key=lambda passage_id: (hash_of(query + passage_id), passage_id.encode()))
    return [(passage_id, float(len(order) - rank)) for rank, passage_id in enumerate(order)]


def hash_of(value: str) -> int:
    """A number that does not change between processes."""
    return zlib.crc32(value.encode())


def measured(judged: Mapping[str, Mapping[str, int]], ids: Sequence[str]) -> dict[str, Any]:
    """MRR@10, nDCG@10 and Recall@5 of `ranked`, by their definitions."""
    made = {}
    for query, relevances in judged.items():
        found = [relevances.get(passage_id, 0) for passage_id, _ in ranked(ids, query)]
        relevant = [relevance for relevance in relevances.values() if relevance > 0]
        ideal = sorted(relevant, reverse=True)
        first = next((rank for rank, relevance in enumerate(found[:10], 1) if relevance > 0), 0)
        made[query] = {
            "mrr@10": 1 / first if first else 0.0,
            "ndcg@10": _gain(found[:10]) / _gain(ideal[:10]) if ideal else 0.0,
            "recall@5": sum(relevance > 0 for relevance in found[:5]) / len(relevant)
            if relevant
            else 0.0,
        }
    return made


def _gain(relevances: Sequence[int]) -> float:
    return sum(
        max(0, relevance) / math.log2(index + 2) for index, relevance in enumerate(relevances)
    )
