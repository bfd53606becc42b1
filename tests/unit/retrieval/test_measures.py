"""Every measure against its definition in plain Python, pytrec_eval and ir_measures."""

import json
import math
import random
import re
import shutil

import ir_measures
import pytest
import pytrec_eval

from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval import measures
from mlflow_dr.retrieval.measures import (
    DEFAULT_MEASURES,
    Measure,
    check_depth,
    mean_values,
    measure_ranking,
    parse_measures,
)

Ranked = list[tuple[str, float]]
CUTS = (1, 3, 10, 20)
TREC = {
    "ndcg": "ndcg_cut",
    "recall": "recall",
    "map": "map_cut",
    "precision": "P",
    "success": "success",
}
NAMES = ("mrr", *TREC, "err", "rbp", "judged")
ALL = tuple(Measure(f"{name}@{cut}") for name in NAMES for cut in CUTS)


def plain(measure: Measure, ranked: list[str], judged: dict[str, int]) -> float:
    """The measure's definition."""
    k = measure.cutoff
    gains = [max(0, judged.get(passage_id, 0)) for passage_id in ranked[:k]]
    hits = [gain > 0 for gain in gains]
    relevant = sum(relevance > 0 for relevance in judged.values())
    if not relevant and measure.name != "judged":
        return 0.0
    match measure.name:
        case "mrr":
            return next((1 / rank for rank, hit in enumerate(hits, 1) if hit), 0.0)
        case "ndcg":
            ideal = sorted((max(0, rel) for rel in judged.values()), reverse=True)[:k]
            return discounted(gains) / discounted(ideal)
        case "recall":
            return sum(hits) / relevant
        case "map":
            found = (sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit)
            return sum(found) / relevant
        case "precision":
            return sum(hits) / k
        case "success":
            return float(any(hits))
        case "err":
            stops = [(2**gain - 1) / 16 for gain in gains]
            reached = (math.prod(1 - stop for stop in stops[:n]) for n in range(len(stops)))
            return sum(
                p * stop / n for n, (p, stop) in enumerate(zip(reached, stops, strict=True), 1)
            )
        case "rbp":
            return 0.2 * sum(0.8**index * hit for index, hit in enumerate(hits))
        case "judged":
            return sum(p in judged for p in ranked[:k]) / len(ranked[:k]) if ranked else 0.0
    raise AssertionError(measure)


def discounted(gains: list[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def random_case(seed: int) -> tuple[dict[str, Ranked], dict[str, dict[str, int]]]:
    """30 queries with graded judgements and rankings of 0 to 40 passages."""
    rng = random.Random(seed)
    passages = [f"p{n}" for n in range(50)]
    ranking, qrels = {}, {}
    for query in range(30):
        qrels[f"q{query}"] = {
            p: rng.choice([0, 1, 1, 2, 3]) for p in rng.sample(passages, rng.randint(1, 12))
        }
        found = rng.sample(passages, rng.randint(0, 40))
        ranking[f"q{query}"] = [(p, 9.0 - 0.125 * index) for index, p in enumerate(found)]
    return ranking, qrels


@pytest.mark.parametrize("measure", ALL, ids=str)
def test_against_the_definition(measure: Measure) -> None:
    ranking, qrels = random_case(0)
    values = measure_ranking(ranking, qrels, [measure])
    for query_id, judged in qrels.items():
        expected = plain(measure, [p for p, _ in ranking[query_id]], judged)
        assert values[query_id][measure] == pytest.approx(expected, abs=1e-6), query_id


@pytest.mark.parametrize("measure", [m for m in ALL if m.name in TREC], ids=str)
def test_against_pytrec_eval(measure: Measure) -> None:
    ranking, qrels = random_case(1)
    name = TREC[measure.name]
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {f"{name}.{measure.cutoff}"})
    theirs = evaluator.evaluate({q: dict(found) for q, found in ranking.items()})
    ours = measure_ranking(ranking, qrels, ALL)
    for query_id, values in theirs.items():
        assert ours[query_id][measure] == values[f"{name}_{measure.cutoff}"]


@pytest.mark.parametrize(
    "spelling",
    ["RR(rel=2)@5", "R(rel=2)@10", "P(rel=2)@5", "AP(rel=3)@10", "Success(rel=2)@3", "Judged@7"],
)
def test_against_ir_measures(spelling: str) -> None:
    ranking, qrels = random_case(4)
    (measure,) = parse_measures(spelling)
    run = {query_id: dict(found) for query_id, found in ranking.items() if found}
    library = ir_measures.parse_measure(spelling)
    theirs = {metric.query_id: metric.value for metric in library.iter_calc(qrels, run)}
    ours = {
        query_id: v[measure] for query_id, v in measure_ranking(ranking, qrels, [measure]).items()
    }
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.skipif(not shutil.which("perl"), reason="gdeval is written in Perl")
def test_err_against_gdeval() -> None:
    ranking, qrels = random_case(5)
    qrels = {query_id[1:]: {**judged, "p99": 4} for query_id, judged in qrels.items()}
    ranking = {
        query_id[1:]: [*found[:2], ("p99", 8.8), *found[2:]] for query_id, found in ranking.items()
    }
    run = {query_id: dict(found) for query_id, found in ranking.items()}
    theirs = ir_measures.gdeval.iter_calc([ir_measures.ERR @ 10], qrels, run)
    ours = measure_ranking(ranking, qrels, [Measure("err@10")])
    expected = {metric.query_id: metric.value for metric in theirs}
    assert {query_id: v["err@10"] for query_id, v in ours.items()} == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("RBP@10", 0.2 * 0.8), ("RBP(p=0.5)@10", 0.25), ("RBP(rel=2)@10", 0.0), ("RBP@1", 0.0)],
)
def test_rbp_and_its_parameters(spelling: str, value: float) -> None:
    measures = parse_measures(spelling)
    values = measure_ranking({"q": [("x", 2.0), ("y", 1.0)]}, {"q": {"y": 1}}, measures)
    assert values["q"][measures[0]] == pytest.approx(value)


@pytest.mark.parametrize("measure", ALL, ids=str)
def test_equal_scores_are_ordered_as_trec_eval_orders_them(measure: Measure) -> None:
    """By descending passage id, which is the order in which a search returns them."""
    judged = {"q": {"p1": 1, "p2": 2, "p3": 0}}
    tied = {"q": [(passage_id, 1.0) for passage_id in ("p4", "p3", "p2", "p1")]}
    apart = {"q": [(passage_id, -float(n)) for n, (passage_id, _) in enumerate(tied["q"])]}
    assert measure_ranking(tied, judged, [measure]) == measure_ranking(apart, judged, [measure])


def test_results_are_keyed_by_measures_which_are_their_own_spelling() -> None:
    (measure,) = parse_measures("RR@10")
    values = measure_ranking({"q": [("x", 1.0)]}, {"q": {"x": 1}}, [measure])
    assert values["q"]["mrr@10"] == values["q"][measure] == 1.0
    assert json.dumps(mean_values(values)) == '{"mrr@10": 1.0}'


def test_mrr_against_pytrec_eval_on_a_ranking_that_was_cut() -> None:
    ranking, qrels = random_case(2)
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"})
    theirs = evaluator.evaluate({q: dict(found[:3]) for q, found in ranking.items()})
    ours = measure_ranking(ranking, qrels, ALL)
    assert {q: v["recip_rank"] for q, v in theirs.items()} == {
        q: v["mrr@3"] for q, v in ours.items() if ranking[q]
    }


@pytest.mark.parametrize(("rank", "value"), [(1, 1.0), (4, 0.25), (10, 0.1), (11, 0.0), (40, 0.0)])
def test_mrr_ends_at_its_cut_off(rank: int, value: float) -> None:
    found = [("hit" if index == rank else f"p{index}", -float(index)) for index in range(1, 60)]
    measured = measure_ranking({"q": found}, {"q": {"hit": 1}}, [Measure("mrr@10")])
    assert measured["q"]["mrr@10"] == pytest.approx(value)


def test_measures_of_different_cut_offs_do_not_disturb_one_another() -> None:
    ranking, qrels = random_case(3)
    together = measure_ranking(ranking, qrels, ALL)
    for measure in ALL:
        alone = measure_ranking(ranking, qrels, [measure])
        assert {q: v[measure] for q, v in together.items()} == {
            q: v[measure] for q, v in alone.items()
        }


@pytest.mark.parametrize("ranking", [{"a": [("x", 1.0)]}, {"a": [("x", 1.0)], "b": []}])
def test_a_query_without_results_scores_0_and_counts(ranking: dict[str, Ranked]) -> None:
    qrels = {"a": {"x": 1}, "b": {"x": 1}}
    values = measure_ranking(ranking, qrels, ALL)
    assert set(values["b"].values()) == {0.0}
    assert mean_values(values)["mrr@10"] == 0.5


def test_no_ranking_at_all_is_0_everywhere() -> None:
    values = measure_ranking({}, {"a": {"x": 1}}, ALL)
    assert values == {"a": dict.fromkeys(ALL, 0.0)}


def test_a_query_that_is_not_judged_does_not_count() -> None:
    values = measure_ranking({"a": [("x", 1.0)], "other": [("y", 1.0)]}, {"a": {"x": 1}}, ALL)
    assert values.keys() == {"a"}


def test_a_passage_of_relevance_0_or_less_is_not_relevant() -> None:
    ranking = {"q": [("zero", 3.0), ("minus", 2.0), ("one", 1.0)]}
    values = measure_ranking(ranking, {"q": {"zero": 0, "minus": -1, "one": 1}}, ALL)["q"]
    assert (values["mrr@10"], values["success@1"], values["recall@1"]) == (1 / 3, 0.0, 0.0)
    assert measure_ranking(ranking, {"q": {"zero": 0}}, ALL)["q"]["mrr@10"] == 0.0


def test_the_mean_is_over_all_queries() -> None:
    m, n = parse_measures("mrr@1 ndcg@1")
    values = {"a": {m: 1.0, n: 0.0}, "b": {m: 0.5, n: 0.25}, "c": {m: 0.0, n: 0.5}}
    assert mean_values(values) == {m: 0.5, n: 0.25}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mrr@10", ["mrr@10"]),
        ("mrr@10 ndcg@10 recall@100", ["mrr@10", "ndcg@10", "recall@100"]),
        ("MRR@10,nDCG@5,  Recall@1\n", ["mrr@10", "ndcg@5", "recall@1"]),
        ("ndcg_at_10", ["ndcg@10"]),
        ("rr@10 r@5 p@3 ap@7 hit@2", ["mrr@10", "recall@5", "precision@3", "map@7", "success@2"]),
        ("accuracy@20 success@20", ["accuracy@20", "success@20"]),
        ("RR@10, AP@7 Judged@10 ERR@20", ["mrr@10", "map@7", "judged@10", "err@20"]),
        ("P(rel=2)@5 precision_rel_2_at_5", ["precision_rel_2@5"]),
        ("RBP(p=0.90, rel=2)@10 rbp(p=0.8)@10", ["rbp_p_0.9_rel_2@10", "rbp@10"]),
        ("mrr@10 rr@10 mrr@5 MRR_at_10", ["mrr@10", "mrr@5"]),
        (DEFAULT_MEASURES, ["mrr@10", "ndcg@10", "recall@100"]),
    ],
)
def test_measures_are_read(text: str, expected: list[str]) -> None:
    assert list(parse_measures(text)) == expected


@pytest.mark.parametrize(
    "word", ["mrr", "mrr@", "mrr@0", "mrr@-1", "mrr@1.5", "bleu@4", "@10", "mrr@10@10", "mrr@ten"]
)
def test_a_measure_that_does_not_exist(word: str) -> None:
    with pytest.raises(UsageError, match=f"measure '{word}': expected one of mrr, ndcg"):
        parse_measures(f"ndcg@10 {word}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("P(foo=1)@5", "unsupported params found: ..foo"),
        ("nDCG(rel=2)@5", "unsupported params found: ..rel"),
        ("P(rel=1.5)@5", "invalid param rel=1.5"),
        ("P(rel=0)@5", "expected rel from 1 upward"),
        ("RBP(p=1.5)@5", "expected rel from 1 upward, p between 0 and 1"),
        ("RBP(p=0.1.2)@5", "problem parsing measure"),
    ],
)
def test_parameters_that_a_measure_does_not_have(word: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^measure '{re.escape(word)}': {message}"):
        parse_measures(word)


def test_a_misspelt_measure_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'recall'"):
        parse_measures("recal@10")


@pytest.mark.parametrize("text", ["", "  ", " , "])
def test_no_measure(text: str) -> None:
    with pytest.raises(UsageError, match="no measure given"):
        parse_measures(text)


def test_the_name_in_mlflow() -> None:
    assert Measure("ndcg@10").metric == "ndcg_at_10"
    (measure,) = parse_measures("RBP(p=0.9)@10")
    assert measure.metric == "rbp_p_0.9_at_10"
    assert parse_measures(measure.metric) == (measure,)


def test_the_depth_is_the_largest_cut_off_unless_a_larger_one_is_given() -> None:
    measures = parse_measures("mrr@10 recall@100 ndcg@20")
    assert check_depth(measures, None) == 100
    assert check_depth(measures, 100) == 100
    assert check_depth(measures, 1000) == 1000
    with pytest.raises(UsageError, match="depth 99 is too shallow for recall@100; use 100 or more"):
        check_depth(measures, 99)


def test_queries_are_measured_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = {f"q{n}": [("a", 2.0), ("b", 1.0)][n % 3 :] for n in range(7)}
    qrels = {f"q{n}": {"b": 1} for n in range(8)}
    expected = measure_ranking(ranking, qrels, parse_measures("mrr@10 ndcg@10"))
    monkeypatch.setattr(measures, "QUERIES_AT_A_TIME", 2)
    assert measure_ranking(ranking, qrels, parse_measures("mrr@10 ndcg@10")) == expected
    assert [values["mrr@10"] for values in expected.values()][:3] == [0.5, 1.0, 0.0]
