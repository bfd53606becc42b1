"""Measures of retrieval quality, by trec_eval's own code (pytrec_eval)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mlflow_dr.collection.records import Qrels
from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.retrieval.ranking import Ranking

DEFAULT_MEASURES = "mrr@10 ndcg@10 recall@100"

TREC_NAMES = {
    "mrr": "recip_rank",  # no cut-off of its own: the ranking is cut first
    "ndcg": "ndcg_cut",
    "recall": "recall",
    "map": "map_cut",
    "precision": "P",
    "success": "success",
    "accuracy": "success",  # DPR's top-k accuracy
}
ALIASES = {"rr": "mrr", "r": "recall", "p": "precision", "ap": "map", "hit": "success"}


class Measure(NamedTuple):
    """One measure with its cut-off, such as nDCG@10."""

    name: str
    cutoff: int

    def __str__(self) -> str:
        return f"{self.name}@{self.cutoff}"

    @property
    def metric(self) -> str:
        """The name in MLflow, which allows no `@`: `ndcg_at_10`."""
        return f"{self.name}_at_{self.cutoff}"


def parse_measures(text: str) -> tuple[Measure, ...]:
    """Measures from words such as `mrr@10 ndcg@10 recall@100`, repeats left out.

    Raises:
        UsageError: an unknown measure, or one without a cut-off.
    """
    measures = []
    for word in text.replace(",", " ").split():
        match = re.fullmatch(r"([a-z]+)(?:@|_at_)([1-9]\d{0,6})", word.lower())
        name = ALIASES.get(match[1], match[1]) if match else ""
        if not match or name not in TREC_NAMES:
            near = did_you_mean(match[1], TREC_NAMES) if match else ""
            raise UsageError(
                f"measure {quoted(word)}: expected one of {', '.join(TREC_NAMES)} with a cut-off, "
                f"such as ndcg@10{near}"
            )
        measures.append(Measure(name, int(match[2])))
    if not measures:
        raise UsageError(f"no measure given; for example: {DEFAULT_MEASURES!r}")
    return tuple(dict.fromkeys(measures))


def check_depth(measures: Sequence[Measure], depth: int | None) -> int:
    """The depth of the rankings: as asked, else the largest cut-off.

    Raises:
        UsageError: a measure looks deeper than the ranking goes.
    """
    deepest = max(measures, key=lambda measure: measure.cutoff)
    if depth is None:
        return deepest.cutoff
    if depth < deepest.cutoff:
        raise UsageError(
            f"depth {depth} is too shallow for {deepest}; use {deepest.cutoff} or more"
        )
    return depth


def measure_ranking(
    ranking: Ranking, qrels: Qrels, measures: Sequence[Measure]
) -> dict[str, dict[str, float]]:
    """Values of each query: query id -> measure -> value.

    Every query of `qrels` is measured; one that the ranking lacks has 0 everywhere.
    """
    values: dict[str, dict[str, float]] = {
        query_id: dict.fromkeys(map(str, measures), 0.0) for query_id in qrels
    }
    cuts = sorted({m.cutoff for m in measures if m.name == "mrr"})
    plain = [m for m in measures if m.name != "mrr"]
    if plain:
        names = {str(m): f"{TREC_NAMES[m.name]}.{m.cutoff}" for m in plain}
        _measure(values, ranking, qrels, names, depth=None)
    for cut in cuts:
        _measure(values, ranking, qrels, {f"mrr@{cut}": "recip_rank"}, depth=cut)
    return values


def mean_values(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over all queries."""
    names = next(iter(per_query.values())).keys()
    return {
        name: sum(values[name] for values in per_query.values()) / len(per_query) for name in names
    }


def _measure(
    values: dict[str, dict[str, float]],
    ranking: Ranking,
    qrels: Qrels,
    names: Mapping[str, str],
    depth: int | None,
) -> None:
    import pytrec_eval

    evaluator = pytrec_eval.RelevanceEvaluator(qrels, set(names.values()))
    run = {query_id: dict(found[:depth]) for query_id, found in ranking.items() if found}
    for query_id, found in evaluator.evaluate(run).items():
        for measure, trec_name in names.items():
            values[query_id][measure] = found[trec_name.replace(".", "_")]
