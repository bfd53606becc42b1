"""Relevance judgements: the two file layouts, and their check against queries and corpus."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Qrels, Query, Topics
from mlflow_dr.errors import DataError
from mlflow_dr.files import decoded, read_lines

log = logging.getLogger(__name__)

TREC_COLUMNS = 4
RELEVANCES = range(-32_767, 32_768)
"""trec_eval counts the passages of each relevance up to the highest: of 2^40, till it crashes."""

EXPECTED = f"a whole number from {RELEVANCES[0]:,} to {RELEVANCES[-1]:,}"


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements from a BEIR file (`query-id  corpus-id  score`) or a TREC file of four columns.

    Raises:
        DataError: a line has the wrong number of columns, a relevance that is no whole number or
            beyond 32,767, or judges a passage differently from an earlier line.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        text = decoded(line, path, number)
        columns = text.split("\t") if "\t" in text else text.split()
        if len(columns) == TREC_COLUMNS:
            del columns[1]
        if len(columns) != 3:
            raise DataError(
                f"{path}:{number}: {len(columns)} columns; expected query-id, corpus-id, score "
                "(or TREC's query-id, 0, passage-id, relevance)"
            )
        query_id, passage_id, relevance_text = (column.strip() for column in columns)
        relevance = int(relevance_text) if re.fullmatch(r"-?\d{1,20}", relevance_text) else None
        if relevance is None or relevance not in RELEVANCES:
            if number == 1 and not any(map(str.isdigit, relevance_text)):
                continue  # BEIR's header
            raise DataError(f"{path}:{number}: relevance {relevance_text!r} is not {EXPECTED}")
        judged = qrels.setdefault(query_id, {})
        if judged.setdefault(passage_id, relevance) != relevance:
            raise DataError(
                f"{path}:{number}: query {query_id!r} and passage {passage_id!r} have relevance "
                f"{relevance} here and {judged[passage_id]} on an earlier line"
            )
    return qrels


def checked_topics(where: str, queries: Iterable[Query], qrels: Qrels, corpus: Corpus) -> Topics:
    """The judged queries, without judgements that name a query or passage that does not exist.

    What is left out is counted in one warning: judgements of unknown queries, of unknown passages
    and of queries without text.

    Args:
        where: the judgements' source, for messages.

    Raises:
        DataError: no judgement is left.
    """
    by_id = {query.id: query for query in queries if query.id in qrels}
    empty = [query.id for query in by_id.values() if not (query.text.strip() or query.tokens)]
    for query_id in empty:
        del by_id[query_id]
    known = {*by_id, *empty}
    unknown_queries = [query_id for query_id in qrels if query_id not in known]

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
            f"{where}: no judgement is left to measure with: "
            f"{problems or 'the file has none'}; do corpus, queries and judgements belong together?"
        )
    if problems:
        log.warning("%s: left out: %s", where, problems)
    return Topics([query for query_id, query in by_id.items() if query_id in kept], kept)


def _count(what: str, number: int, examples: Sequence[str]) -> str:
    return f"{number} {what} (such as {examples[0]!r})" if number else ""
