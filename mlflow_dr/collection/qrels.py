"""Relevance judgements: the two file layouts, and their check against queries and corpus."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.jsonl import checked_id
from mlflow_dr.collection.records import Qrels, Query, Topics
from mlflow_dr.errors import DataError, quoted
from mlflow_dr.files import decoded, read_lines

log = logging.getLogger(__name__)

TREC_COLUMNS = 4
RELEVANCES = range(-32_767, 32_768)
"""trec_eval counts the passages of each relevance up to the highest: of 2^40, till it crashes."""

NAMES = (
    {"queryid", "qid", "query", "topic", "topicid"},
    {"corpusid", "docid", "docno", "documentid", "passageid", "pid", "doc", "document", "passage"},
    {"score", "relevance", "rel", "label", "relevant", "judgment", "judgement"},
)
"""How headers name query, passage and relevance; case, `-` and `_` do not count."""

NUMBER = re.compile(r"-?\d+(\.\d+)?")

EXPECTED = f"a whole number from {RELEVANCES[0]:,} to {RELEVANCES[-1]:,}"


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Judgements from a BEIR file (`query-id  corpus-id  score`) or a TREC file of four columns.

    A first line of names (`query-id`, `corpus-id`, `score`, or the like) says which column is
    which, and columns of other names are passed over.

    Raises:
        DataError: a line has the wrong number of columns, an id that is empty or has a NUL
            character, a relevance that is no whole number or beyond 32,767, or judges a passage
            differently from an earlier line.
    """
    qrels: dict[str, dict[str, int]] = {}
    names: _Columns | None = None
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        text = decoded(line, path, number)
        columns = [one.strip() for one in (text.split("\t") if "\t" in text else text.split())]
        if number == 1 and (names := _header(columns)):
            continue
        three = names.of(columns, where) if names else _unnamed(columns, where, number == 1)
        query_id, passage_id, relevance_text = three
        relevance = int(relevance_text) if re.fullmatch(r"-?\d{1,20}", relevance_text) else None
        if relevance is None or relevance not in RELEVANCES:
            if number == 1 and not any(map(str.isdigit, relevance_text)):
                continue  # a header of other names
            raise DataError(f"{where}: relevance {quoted(relevance_text[:50])} is not {EXPECTED}")
        judged = qrels.setdefault(checked_id(query_id, where), {})
        if judged.setdefault(checked_id(passage_id, where), relevance) != relevance:
            raise DataError(
                f"{where}: query {quoted(query_id)} and passage {quoted(passage_id)} have "
                f"relevance {relevance} here and {judged[passage_id]} on an earlier line"
            )
    return qrels


class _Columns(NamedTuple):
    """Which columns of a file with a header are which."""

    places: tuple[int, int, int]
    number: int

    def of(self, columns: Sequence[str], where: str) -> list[str]:
        """Query, passage and relevance of a line.

        Raises:
            DataError: it has not as many columns as the header.
        """
        if len(columns) != self.number:
            raise DataError(f"{where}: {len(columns)} columns; the first line names {self.number}")
        return [columns[place] for place in self.places]


def _header(columns: Sequence[str]) -> _Columns | None:
    """What a line of known names says about the columns; None for any other line."""
    given = [one.lower().replace("_", "").replace("-", "") for one in columns]
    found = [[place for place, one in enumerate(given) if one in names] for names in NAMES]
    if any(len(places) != 1 for places in found):
        return None
    query, passage, relevance = (places[0] for places in found)
    return _Columns((query, passage, relevance), len(columns))


def _unnamed(columns: Sequence[str], where: str, is_first: bool) -> Sequence[str]:
    """Query, passage and relevance of a line of a file without a header.

    Of four columns the second is TREC's iteration: `0`, `Q0`, or the number of a topic's aspect or
    of a round. With anything else there, or where the third could be BEIR's score, the line may
    mean two things. The first line may have names that are not known.

    Raises:
        DataError: there are neither three nor four columns, or four that are not TREC's.
    """
    if len(columns) == TREC_COLUMNS:
        query, iteration, passage, relevance = columns
        is_number = NUMBER.fullmatch(iteration) and not NUMBER.fullmatch(passage)
        is_header = is_first and not NUMBER.search(relevance)
        if not (iteration.upper() in ("0", "Q0") or is_number or is_header):
            raise DataError(
                f"{where}: 4 columns, the second of them {quoted(iteration)}; TREC's have 0 there; "
                "BEIR's with more than three columns need a first line such as query-id, "
                "corpus-id, score, and the names of the others"
            )
        return query, passage, relevance
    if len(columns) != 3:
        raise DataError(
            f"{where}: {len(columns)} columns; expected query-id, corpus-id, score "
            "(or TREC's query-id, 0, passage-id, relevance)"
        )
    return columns


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
    if cut := next((query_id for query_id in by_id if "\0" in query_id), None):
        raise DataError(f"{where}: query id {quoted(cut)} has a NUL character; remove it")
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
    return f"{number} {what} (such as {quoted(examples[0])})" if number else ""
