"""Relevance judgements (qrels): the two file layouts, and the check against queries and corpus."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import checked_id, read_records
from mlflow_dr.collection.records import Qrels, Query, Topics
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import decoded, read_lines

log = logging.getLogger(__name__)

TREC_COLUMNS = 4
RELEVANCES = range(-32_767, 32_768)
"""trec_eval has a counter for each relevance up to the highest, so a very large one crashes it."""

NAMES = (
    {"queryid", "qid", "query", "topic", "topicid"},
    {"corpusid", "docid", "docno", "documentid", "passageid", "pid", "doc", "document", "passage"},
    {"score", "relevance", "rel", "label", "relevant", "judgment", "judgement"},
)
"""How headers name query, passage and relevance; case, `-` and `_` are ignored."""

NUMBER = re.compile(r"-?\d+(\.\d+)?")

EXPECTED = f"a whole number from {RELEVANCES[0]:,} to {RELEVANCES[-1]:,}"


def write_qrels(path: Path, topics: Topics, as_trec: bool = False) -> None:
    """Write judgements in BEIR's layout with its header, or in TREC's four columns."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        if not as_trec:
            file.write("query-id\tcorpus-id\tscore\n")
        for query in topics.queries:
            for passage_id, relevance in topics.qrels[query.id].items():
                iteration = "\t0" if as_trec else ""
                file.write(f"{query.id}{iteration}\t{passage_id}\t{relevance}\n")


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements from a BEIR file (`query-id  corpus-id  score`) or a TREC file of four columns.

    A header (`query-id`, `corpus-id`, `score`, or similar names) assigns the columns; columns of
    other names are ignored.

    Raises:
        DataError: a line has the wrong number of columns, an unusable id, a relevance that is not a
            whole number up to 32,767, or contradicts an earlier line.
    """
    qrels: dict[str, dict[str, int]] = {}
    indexes: list[int] = []
    width = 0
    for number, line in read_lines(path):
        location = f"{path}:{number}"
        text = decoded(line, path, number)
        cells = text.split("\t") if "\t" in text else text.split()
        columns = [cell.strip() for cell in cells]
        if number == 1 and (indexes := _header(columns)):
            width = len(columns)
            continue
        if indexes and len(columns) != width:
            raise DataError(f"{location}: {len(columns)} columns; the first line names {width}")
        query_id, passage_id, relevance_text = (
            [columns[index] for index in indexes]
            if indexes
            else _unnamed(columns, location, number == 1)
        )
        relevance = int(relevance_text) if re.fullmatch(r"-?\d{1,20}", relevance_text) else None
        if relevance is None or relevance not in RELEVANCES:
            if number == 1 and not any(map(str.isdigit, relevance_text)):
                continue  # a header of other names
            raise DataError(
                f"{location}: relevance {quoted(relevance_text[:50])} is not {EXPECTED}"
            )
        judged = qrels.setdefault(checked_id(query_id, location), {})
        if judged.setdefault(checked_id(passage_id, location), relevance) != relevance:
            raise DataError(
                f"{location}: query {quoted(query_id)} and passage {quoted(passage_id)} have "
                f"relevance {relevance} here and {judged[passage_id]} on an earlier line"
            )
    return qrels


def read_qrels_records(path: Path) -> dict[str, dict[str, int]]:
    """Judgements from records, such as `{"query-id": "q", "corpus-id": "p", "score": 1}`.

    Without a score a passage is relevant (1). A list of ids judges several passages at once.

    Raises:
        DataError: a field is missing, an id cannot be used, a relevance is not a whole number up to
            32,767, or contradicts an earlier record.
    """
    qrels: dict[str, dict[str, int]] = {}
    for location, record in read_records(path, dict):
        query_id, passages, relevance = (_field(record, spellings) for spellings in NAMES)
        relevance = 1 if relevance is None else relevance
        ids = passages if isinstance(passages, list) else [passages]
        if not all(isinstance(value, str | int) for value in (query_id, *ids)):
            raise DataError(
                f"{location}: expected query-id, corpus-id and score (optional), not "
                f"{quoted(record)}"
            )
        if not isinstance(relevance, int | float) or relevance not in RELEVANCES:
            raise DataError(f"{location}: relevance {quoted(relevance)} is not {EXPECTED}")
        judged = qrels.setdefault(checked_id(query_id, location), {})
        for passage_id in ids:
            known = judged.setdefault(checked_id(passage_id, location), int(relevance))
            if known != relevance:
                raise DataError(
                    f"{location}: query {quoted(query_id)} and passage {quoted(passage_id)} have "
                    f"relevance {int(relevance)} here and {known} in an earlier record"
                )
    return qrels


def _field(record: Mapping[str, Any], spellings: Collection[str]) -> Any:
    """The first value whose name is one of these, without case, `-` and `_`."""
    return next((value for key, value in record.items() if _plain(key) in spellings), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _header(columns: Sequence[str]) -> list[int]:
    """Which columns a header names query, passage and relevance; empty for any other line."""
    names = [_plain(column) for column in columns]
    matches = [[i for i, name in enumerate(names) if name in spellings] for spellings in NAMES]
    return [] if any(len(indexes) != 1 for indexes in matches) else [i for (i,) in matches]


def _unnamed(columns: Sequence[str], location: str, is_first: bool) -> Sequence[str]:
    """Query, passage and relevance of a line of a file without a header.

    The second of four columns is TREC's iteration: `0`, `Q0`, or the number of an aspect or of a
    round. If it is anything else, or if the third column could be BEIR's score, the line is
    ambiguous. The first line may be a header of unknown names.

    Raises:
        DataError: the number of columns is neither 3 nor 4, or the four are not TREC's.
    """
    if len(columns) == TREC_COLUMNS:
        query, iteration, passage, relevance = columns
        is_number = NUMBER.fullmatch(iteration) and not NUMBER.fullmatch(passage)
        is_header = is_first and not NUMBER.search(relevance)
        if not (iteration.upper() in ("0", "Q0") or is_number or is_header):
            raise DataError(
                f"{location}: 4 columns, the second of them {quoted(iteration)}; TREC's have 0 "
                "there; BEIR's with more than three columns need a first line such as query-id, "
                "corpus-id, score, and the names of the others"
            )
        return query, passage, relevance
    if len(columns) != 3:
        raise DataError(
            f"{location}: {len(columns)} columns; expected query-id, corpus-id, score "
            "(or TREC's query-id, 0, passage-id, relevance)"
        )
    return columns


def checked_topics(location: str, queries: Iterable[Query], qrels: Qrels, corpus: Corpus) -> Topics:
    """The judged queries, without judgements of queries and passages that do not exist.

    One warning counts what is left out: judgements of unknown queries, of unknown passages and of
    queries without text.

    Args:
        location: the source of the judgements, for messages.

    Raises:
        DataError: no judgement is left.
    """
    by_id = {query.id: query for query in queries if query.id in qrels}
    if cut := next((query_id for query_id in by_id if "\0" in query_id), None):
        raise DataError(f"{location}: query id {quoted(cut)} has a NUL character; remove it")
    empty = [query.id for query in by_id.values() if not (query.text.strip() or query.tokens)]
    for query_id in empty:
        del by_id[query_id]
    query_ids = {*by_id, *empty}
    unknown_queries = [query_id for query_id in qrels if query_id not in query_ids]

    passage_ids = sorted({pid for qid in by_id for pid in qrels[qid]})
    rows = corpus.rows_of(passage_ids)
    unknown = {pid for pid, row in zip(passage_ids, rows, strict=True) if row < 0}
    kept: dict[str, dict[str, int]] = {}
    dropped = 0
    for query_id in by_id:
        judged = {pid: rel for pid, rel in qrels[query_id].items() if pid not in unknown}
        dropped += len(qrels[query_id]) - len(judged)
        if judged:
            kept[query_id] = judged
    left_out = [
        _count("judgements name passages that the corpus lacks", dropped, sorted(unknown)),
        _count("judged queries are not in the query file", len(unknown_queries), unknown_queries),
        _count("judged queries have no text", len(empty), empty),
    ]
    problems = "; ".join(text for text in left_out if text)
    if not kept:
        raise DataError(
            f"{location}: no judgement is left to measure with: "
            f"{problems or 'the file has none'}; check that corpus, queries and judgements belong "
            "together"
        )
    if problems:
        log.warning("%s: left out: %s", location, problems)
    return Topics([query for query_id, query in by_id.items() if query_id in kept], kept)


def _count(what: str, number: int, examples: Sequence[str]) -> str:
    return f"{number} {what} (such as {quoted(examples[0])})" if number else ""
