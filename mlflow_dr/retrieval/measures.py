"""Measures of retrieval quality, named as in ir_measures and computed by trec_eval (pytrec_eval).

trec_eval lacks three of them, which are computed here: ERR (Chapelle et al., Expected Reciprocal
Rank for Graded Relevance, CIKM 2009, with relevance up to 4 as in TREC's gdeval), RBP (Moffat and
Zobel, Rank-biased Precision, TOIS 2008), and Judged, the share of judged passages.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr.collection.records import Qrels, Query, Topics
from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.retrieval.ranking import Ranking

QUERIES_AT_A_TIME = 1024  # trec_eval's code takes a copy of their rankings
DEFAULT_MEASURES = "mrr@10 ndcg@10 recall@100"
DEFAULT_OF_ANSWERS = "accuracy@1 accuracy@5 accuracy@20 accuracy@100"

LIBRARY_NAMES = {
    "mrr": "RR",
    "ndcg": "nDCG",
    "recall": "R",
    "map": "AP",
    "precision": "P",
    "success": "Success",
    "accuracy": "Success",  # of answers instead of judgements
    "err": "ERR",
    "rbp": "RBP",
    "judged": "Judged",
    "average_rank": "",  # of a pool, and so is NLL: ir_measures has neither
    "nll": "",
}
ALIASES = {"rr": "mrr", "r": "recall", "p": "precision", "ap": "map", "hit": "success"}
TREC_NAMES = {
    "mrr": "recip_rank",  # has no cut-off in trec_eval: the ranking is cut first
    "ndcg": "ndcg_cut",
    "recall": "recall",
    "map": "map_cut",
    "precision": "P",
    "success": "success",
}
ACCURACY = "accuracy"
OF_POOL = ("average_rank", "nll")
"""Measures of a pool of passages, see `average_rank.py`; lower is better."""
OF_READER = re.compile(r"(em|f1|em_decoded)(@|_at_)[1-9]\d{0,6}")
"""Measures of a reader's answers: exact match, words in common, and exact match of decoded text."""
DEFAULT_PARAMETERS = {"rel": 1.0, "p": 0.8}
HIGHEST_RELEVANCE = 4  # of ERR
SPELLING = re.compile(
    r"(average_rank|[a-z]+)"
    r"(\((?:[a-z]+=[\d.]+(?:, *)?)*\)|(?:_[a-z]+_[\d.]+)*)(?:@|_at_)([1-9]\d{0,6})"
)


class Measure(str):
    """A measure with its cut-off, such as `ndcg@10`, or `precision_rel_2@5` with a parameter.

    A measure is its own spelling, so that results, columns and JSON are keyed by it as it is.
    `parse_measures` makes it from any spelling.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name without parameters and cut-off: `precision`."""
        return next((name for name in OF_POOL if self.startswith(name)), re.split("[@_]", self)[0])

    @property
    def cutoff(self) -> int:
        """How many passages of a ranking are measured."""
        return int(self.partition("@")[2])

    @property
    def metric(self) -> str:
        """The name in MLflow, which allows no `@`: `ndcg_at_10`."""
        return self.replace("@", "_at_")

    def parameter(self, name: str) -> float:
        """A parameter: `rel`, the lowest relevance that is relevant, or `p`, RBP's persistence."""
        match = re.search(rf"_{name}_([\d.]+)", self)
        return float(match[1] if match else DEFAULT_PARAMETERS[name])


def parse_measures(text: str) -> tuple[Measure, ...]:
    """Measures from text such as `mrr@10 nDCG@10 P(rel=2)@5`, each once.

    Names are those of ir_measures and their usual aliases, in upper or lower case.

    Raises:
        UsageError: an unknown measure or parameter, or a measure without a cut-off.
    """
    names = re.split(r"[\s,]+(?![^(]*\))", text)
    measures = tuple(dict.fromkeys(_measure(name) for name in names if name))
    if not measures:
        raise UsageError(f"no measure given; for example: {DEFAULT_MEASURES!r}")
    return measures


def recorded_measures(text: str) -> tuple[Measure, ...]:
    """As `parse_measures`, and also measures of a reader's answers, which only validators record.

    Raises:
        UsageError: as `parse_measures`.
    """
    if all(OF_READER.fullmatch(word) for word in text.split()) and text.strip():
        return tuple(Measure(word.replace("_at_", "@")) for word in text.split())
    return parse_measures(text)


def check_depth(measures: Sequence[Measure], depth: int | None) -> int:
    """The depth of the rankings: the requested one, or the largest cut-off.

    Raises:
        UsageError: the ranking is shallower than a measure's cut-off.
    """
    deepest = max(measures, key=lambda measure: measure.cutoff)
    if depth is None:
        return deepest.cutoff
    if depth < deepest.cutoff:
        raise UsageError(
            f"depth {depth} is too shallow for {deepest}; use {deepest.cutoff} or more"
        )
    return depth


def check_topics(location: str, topics: Topics, measures: Sequence[Measure]) -> None:
    """Refuse measures of judgements or answers that a split does not have.

    Raises:
        UsageError: with the measures that it can be measured by.
    """
    if answers_depth(measures) and not any(query.answers for query in topics.queries):
        raise UsageError(
            f"{location} has no answers, so {ACCURACY} cannot be measured; use success@k, which "
            "is of judgements"
        )
    judged = [measure for measure in measures if measure.name != ACCURACY]
    if judged and not topics.qrels:
        raise UsageError(
            f"{location} has answers and no judgements, so {judged[0]} cannot be measured; use "
            f"--measures {DEFAULT_OF_ANSWERS!r}"
        )


def of_pool(measures: Sequence[Measure]) -> bool:
    """Whether the measures are of a pool.

    Raises:
        UsageError: only some of them are.
    """
    names = {measure.name in OF_POOL for measure in measures}
    if len(names) > 1:
        raise UsageError(
            f"{' and '.join(OF_POOL)} are of a pool of passages and not of a ranking; measure them "
            "in a validation of their own"
        )
    return True in names


def measure_topics(
    topics: Topics, ranking: Ranking, measures: Sequence[Measure], hits: np.ndarray | None = None
) -> dict[str, dict[Measure, float]]:
    """Measure a ranking by judgements and by answers, query by query.

    Args:
        topics: the queries.
        ranking: see `measure_ranking`.
        measures: see `parse_measures`.
        hits: see `measure_answers`; None where no measure needs answers.
    """
    judged = measure_ranking(ranking, topics.qrels, measures)
    if hits is None:
        return judged
    found = measure_answers(topics.queries, hits, measures)
    return {
        query_id: {
            measure: values[measure] if measure in values else judged[query_id][measure]
            for measure in measures
        }
        for query_id, values in found.items()
    }


def measure_answers(
    queries: Sequence[Query], hits: np.ndarray, measures: Sequence[Measure]
) -> dict[str, dict[Measure, float]]:
    """DPR's top-k accuracy of each query: 1 if one of the first k passages holds an answer, else 0.

    Args:
        queries: the queries.
        hits: whether each passage holds an answer, the best first, `(n_queries, depth) bool`.
        measures: those that are not `accuracy` are left out.
    """
    values: dict[str, dict[Measure, float]] = {query.id: {} for query in queries}
    for measure in measures:
        if measure.name == ACCURACY:
            found: np.ndarray = np.any(hits[:, : measure.cutoff], axis=1)
            for query, is_found in zip(queries, found.tolist(), strict=True):
                values[query.id][measure] = float(is_found)
    return values


def answers_depth(measures: Sequence[Measure]) -> int:
    """How many passages of a ranking are looked at for answers; 0 if no measure needs them."""
    return max((measure.cutoff for measure in measures if measure.name == ACCURACY), default=0)


def measure_ranking(
    ranking: Ranking, qrels: Qrels, measures: Sequence[Measure]
) -> dict[str, dict[Measure, float]]:
    """Measure a ranking, query by query.

    Args:
        ranking: query id -> (passage id, score), the best first, equal scores in trec_eval's order
            (by descending passage id).
        qrels: query id -> passage id -> relevance. Each of its queries is measured; a query that
            the ranking lacks has 0 everywhere.
        measures: see `parse_measures`; `accuracy` is left out, see `measure_answers`.

    Returns:
        query id -> measure -> value.
    """
    measures = [measure for measure in measures if measure.name != ACCURACY]
    values = {query_id: dict.fromkeys(measures, 0.0) for query_id in qrels}
    by_formula = [measure for measure in measures if measure.name in FORMULAS]
    evaluators = _evaluators(qrels, measures)
    items = iter(ranking.items())
    while group := list(islice(items, QUERIES_AT_A_TIME)):
        for evaluator in evaluators:
            evaluator.measure(group, values)
        for query_id, passages in group if by_formula else ():
            if query_id in qrels:
                passage_ids = [passage_id for passage_id, _ in passages]
                values[query_id] |= {
                    measure: FORMULAS[measure.name](
                        passage_ids[: measure.cutoff], qrels[query_id], measure
                    )
                    for measure in by_formula
                }
    return values


def mean_values(per_query: Mapping[str, Mapping[Measure, float]]) -> dict[Measure, float]:
    """The mean of each measure over all queries."""
    names = next(iter(per_query.values())).keys()
    return {
        name: sum(values[name] for values in per_query.values()) / len(per_query) for name in names
    }


def _measure(word: str) -> Measure:
    """One measure from its spelling, checked by ir_measures."""
    match = SPELLING.fullmatch(word.lower())
    name = ALIASES.get(match[1], match[1]) if match else ""
    if not match or name not in LIBRARY_NAMES:
        near = did_you_mean(match[1], LIBRARY_NAMES) if match else ""
        raise UsageError(
            f"measure {quoted(word)}: expected one of {', '.join(LIBRARY_NAMES)} with a cut-off, "
            f"such as ndcg@10{near}"
        )
    if name in (ACCURACY, *OF_POOL):
        if match[2]:
            raise UsageError(f"measure {quoted(word)}: {name} has no parameters")
        return Measure(f"{name}@{match[3]}")
    parameters = dict(re.findall(r"([a-z]+)[=_]([\d.]+)", match[2]))
    import ir_measures

    library_spelling = ",".join(f"{key}={value}" for key, value in parameters.items())
    try:
        ir_measures.parse_measure(
            f"{LIBRARY_NAMES[name]}({library_spelling})@{match[3]}"
        ).validate_params()
        numbers = {key: float(value) for key, value in sorted(parameters.items())}
        if numbers.get("rel", 1) < 1 or not 0 < numbers.get("p", 0.5) < 1:
            raise ValueError("expected rel from 1 upward, p between 0 and 1")
    except (AssertionError, ValueError) as error:
        raise UsageError(f"measure {quoted(word)}: {error}") from None
    others = (key for key in numbers if numbers[key] != DEFAULT_PARAMETERS[key])
    suffix = "".join(f"_{key}_{numbers[key]:g}" for key in others)
    return Measure(f"{name}{suffix}@{match[3]}")


class _TrecEvaluator(NamedTuple):
    """trec_eval's evaluator of some measures, and its name of each.

    Attributes:
        evaluator: of pytrec_eval.
        keys: its name of each measure.
        depth: it gets only so many passages of each query; None for all.
    """

    evaluator: Any
    keys: Mapping[Measure, str]
    depth: int | None

    def measure(
        self,
        group: Sequence[tuple[str, Sequence[tuple[str, float]]]],
        values: dict[str, dict[Measure, float]],
    ) -> None:
        """Add the values of some queries of a ranking."""
        run = {query_id: dict(passages[: self.depth]) for query_id, passages in group if passages}
        for query_id, results in self.evaluator.evaluate(run).items():
            values[query_id] |= {measure: results[key] for measure, key in self.keys.items()}


def _evaluators(qrels: Qrels, measures: Sequence[Measure]) -> list[_TrecEvaluator]:
    """trec_eval's evaluators: each has one depth and one threshold of relevance."""
    import pytrec_eval

    names: dict[tuple[int | None, int], dict[Measure, str]] = defaultdict(dict)
    for measure in measures:
        if measure.name not in TREC_NAMES:
            continue
        trec_name, depth = TREC_NAMES[measure.name], None
        if measure.name == "mrr":
            depth = measure.cutoff
        else:
            trec_name = f"{trec_name}.{measure.cutoff}"
        names[depth, int(measure.parameter("rel"))][measure] = trec_name
    return [
        _TrecEvaluator(
            pytrec_eval.RelevanceEvaluator(qrels, set(asked.values()), relevance_level=relevant),
            {measure: name.replace(".", "_") for measure, name in asked.items()},
            depth,
        )
        for (depth, relevant), asked in names.items()
    ]


def _err(passage_ids: Sequence[str], judged: Mapping[str, int], measure: Measure) -> float:
    value, continues = 0.0, 1.0
    for rank, passage_id in enumerate(passage_ids, start=1):
        gain = min(max(0, judged.get(passage_id, 0)), HIGHEST_RELEVANCE)
        stops = (2**gain - 1) / 2**HIGHEST_RELEVANCE
        value += continues * stops / rank
        continues *= 1 - stops
    return value


def _rbp(passage_ids: Sequence[str], judged: Mapping[str, int], measure: Measure) -> float:
    persistence, relevant = measure.parameter("p"), measure.parameter("rel")
    hits = (
        index
        for index, passage_id in enumerate(passage_ids)
        if judged.get(passage_id, 0) >= relevant
    )
    return (1 - persistence) * sum(persistence**index for index in hits)


def _judged(passage_ids: Sequence[str], judged: Mapping[str, int], measure: Measure) -> float:
    return sum(passage_id in judged for passage_id in passage_ids) / max(1, len(passage_ids))


FORMULAS: dict[str, Callable[[Sequence[str], Mapping[str, int], Measure], float]] = {
    "err": _err,
    "rbp": _rbp,
    "judged": _judged,
}
