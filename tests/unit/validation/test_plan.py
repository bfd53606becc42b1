from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.collection.asyncval import asyncval_name
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.validation.evaluate import Settings
from mlflow_dr.validation.order import Order
from mlflow_dr.validation.plan import (
    Asked,
    Plan,
    Refines,
    Validation,
    each_split,
    refining,
)
from mlflow_dr.validation.plan_file import read_plan

SETTINGS = Settings(parse_measures("mrr@10"), dtype="fp32")
ASKED = Asked(SETTINGS)
LISTS = "\n".join(f"  l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(8))
BOMB = f"validations:\n  l0: &l0 [0]\n{LISTS}\norder: *l8\n"  # 43 million numbers


def read(tmp_path: Path, text: str, asked: Asked = ASKED, **others: Any) -> Plan:
    path = tmp_path / "validations.yaml"
    path.write_text(text)
    return read_plan(path, asked, **{"every": 100, **others})


def test_what_the_file_says_and_what_it_leaves(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        order: bisect
        max_lag_seconds: 60
        validations:
          dev: {dataset: msmarco, split: dev, measures: mrr@10 recall@1000, depth: 1000}
          covid:
            dataset: beir/trec-covid
            measures: [ndcg@10]
            dtype: bf16
          plain:
        """,
    )
    assert (plan.order, plan.every, plan.max_lag_seconds) == (Order.BISECT, 100, 60.0)
    dev, covid, plain = plan.validations
    assert (dev.name, dev.dataset, dev.split, dev.settings.depth) == ("dev", "msmarco", "dev", 1000)
    assert dev.settings.measures == parse_measures("mrr@10 recall@1000")
    assert (dev.settings.dtype, covid.settings.dtype) == ("fp32", "bf16")
    assert covid.settings.measures == parse_measures("ndcg@10")
    assert plain == Validation(SETTINGS, "plain")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected keys"),
        ("[1]", "expected keys"),
        ("a: [", "not a YAML file"),
        ("order: oldest", "expected `validations:`"),
        ("validations: []", "expected `validations:`"),
        ("ordre: oldest\nvalidations: {a: }", "no key 'ordre'"),
        ("order: best\nvalidations: {a: }", "order is 'best'; expected one of oldest"),
        ("every: 0\nvalidations: {a: }", "every is 0"),
        ("every: yes\nvalidations: {a: }", "every is True"),
        ("every: 1.5\nvalidations: {a: }", "every is 1.5; expected a value of type int"),
        (f"every: {'9' * 5000}\nvalidations: {{a: }}", "not a YAML file"),
        ("every: 2001-99-99\nvalidations: {a: }", "not a YAML file"),
        ("[" * 5000, "not a YAML file"),
        ("follow: 'false'\nvalidations: {a: }", "follow is 'false'; expected a value of type bool"),
        ("validations: {a: {keep_own_id: 'false'}}", "validations.a.keep_own_id is 'false'; exp"),
        ("validations: {a: {keep_own_id: 0}}", "validations.a.keep_own_id is 0; expected a value"),
        (f"validations: {{a: {{depth: {'x' * 100_000}}}}}", "validations.a.depth is 'xxx"),
        (f"validations: {{a: {{subset: bm25@{'9' * 5000}}}}}", "is not a whole number above 0"),
        (f"validations: {{a: {{refine: full@{'9' * 5000}}}}}", "expected SUBSET@N"),
        (f"validations: {{a: {{measures: mrr@{'9' * 5000}}}}}", "with a cut-off"),
        ("validations: {a: {depth: deep}}", "validations.a.depth is 'deep'"),
        ("validations: {a: {dataset: 5}}", "validations.a.dataset is 5"),
        ("validations: {a: {dpeth: 5}}", "validations.a: no key 'dpeth'"),
        ("validations: {a: [1]}", "validations.a: expected keys"),
        ("validations: {a: {measures: mmr@10}}", "mmr"),
        ("validations: {a: {measures: mrr@10, depth: 5}}", "depth"),
        ("validations: {a: {measures: mmr@10}}", "validations.a.measures: measure 'mmr@10'"),
        ("validations: {a: {subset: bm52@10}}", "validations.a.subset: subset 'bm52@10'"),
        ("validations: {a: {dtype: fp9}}", "validations.a.dtype: dtype 'fp9'"),
        ("validations: {a: {device: gpu}}", "validations.a.device: device 'gpu'"),
        ("validations: {a: {dataset: dmeo}}", "validations.a.dataset: no dataset 'dmeo'"),
        ("validations: {a: {refine: full}}", "validations.a: refine 'full'"),
        ("validations: {a: {refine: ''}}", "validations.a.refine is empty"),
        ("keep: worst:1\nvalidations: {a: }", "validations.yaml: keep: no rule 'worst:1'"),
        ("patience: -1\nvalidations: {a: }", "validations.yaml: patience"),
        (f"poll_seconds: {10**16}\nvalidations: {{a: }}", "poll_seconds is 10000000000000000"),
        ("poll_seconds: .nan\nvalidations: {a: }", "poll_seconds is nan; expected a value of"),
        (f"every: {'9' * 5000}\nvalidations: {{a: }}", "not a YAML file: Exceeds the limit"),
        ("validations: {a: , a: }", "key 'a' stands twice in the mapping of line 1"),
        ("order: " + "[" * 5000, "not a YAML file"),
        (BOMB, "order is"),
        ("validations: {a/b: }", "cannot be called 'a/b'"),
        ("validations: {a: {candidates: c}}", "validations.a: give dataset, or candidates (once),"),
        ("validations: {a: {candidates: c}}", "there is no queries, no qrels"),
        (
            "validations: {a: {dataset: d, candidates: c, queries: q, qrels: r}}",
            "validations.a: give dataset, or candidates (once), queries and qrels",
        ),
        ("validations: {a: {candidates: [c, d], queries: q, qrels: r}}", "candidates (once)"),
        ("validations: {a: {candidates: c, queries: 5, qrels: r}}", "validations.a.queries is 5"),
        (
            "validations: {a: {candidates: c, queries: [q], qrels: [r, s]}}",
            "1 query files and 2 files of judgements",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "validations.yaml"))
    assert len(str(caught.value)) < 500


def test_settings_from_python_are_checked_too() -> None:
    with pytest.raises(UsageError, match="keep_own_id is 'false'; expected a value of type bool"):
        Settings(parse_measures("mrr@10"), keep_own_id="false")  # type: ignore[arg-type]


def test_a_split_that_the_dataset_of_the_file_does_not_have(
    tmp_path: Path, beir_folder: Callable[..., Path]
) -> None:
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, dev={"q": {"p": 1}})
    with pytest.raises(UsageError, match=r"yaml: validations\.a\.split: .* no split 'dav'; did"):
        read(tmp_path, f"validations: {{a: {{dataset: {folder}, split: dav}}}}")


def test_nothing_is_made_to_read_a_file(tmp_path: Path, own_cache: Path) -> None:
    read(tmp_path, "validations: {a: {dataset: demo, split: dev}}")
    assert not any(own_cache.iterdir())


def test_files_instead_of_a_dataset(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        validations:
          nq: {candidates: c, queries: nq.json, qrels: q.tsv, measures: nDCG@10}
          both: {candidates: c, queries: [a.json, b.b.json], qrels: [a.tsv, b.tsv]}
          one: {candidates: c, queries: [a.json, b.json], qrels: q.tsv, split: b}
        """,
    )
    assert [(one.name, one.split) for one in plan.validations] == [
        *(("nq", "nq"), ("both-a", "a"), ("both-b_b", "b.b"), ("one", "b"))
    ]
    queries, qrels = [Path("a.json"), Path("b.b.json")], [Path("a.tsv"), Path("b.tsv")]
    both = asyncval_name(Path("c"), queries, qrels)
    assert {one.dataset for one in plan.validations[1:3]} == {both}
    assert plan.validations[0].settings.measures == parse_measures("ndcg@10")


def test_what_the_flags_say_stands_where_the_file_names_no_collection(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        "validations: {short: {measures: mrr@5}, c: {split: c}, other: {dataset: demo}}",
        Asked(SETTINGS, "here", ["a", "b"]),
    )
    assert [(one.name, one.dataset, one.split) for one in plan.validations] == [
        ("short-a", "here", "a"),
        ("short-b", "here", "b"),
        ("c", "here", "c"),
        ("other", "demo", None),
    ]


def test_a_split_of_the_flags_is_that_of_a_dataset_of_the_file(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        validations:
          a:
          b: {dataset: demo}
          c: {dataset: demo, split: dev}
          d: {candidates: c, queries: nq.json, qrels: q.tsv}
        """,
        Asked(SETTINGS, "here", splits=["test"], subsets=["random:5", "random:7"]),
    )
    assert [(one.name, one.dataset, one.split) for one in plan.validations[:6]] == [
        ("a-random_5", "here", "test"),
        ("a-random_7", "here", "test"),
        ("b-random_5", "demo", "test"),
        ("b-random_7", "demo", "test"),
        ("c-random_5", "demo", "dev"),
        ("c-random_7", "demo", "dev"),
    ]
    assert {one.split for one in plan.validations[6:]} == {"nq"}


def test_subsets_of_the_flags_are_those_of_validations_without_one(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        validations:
          a:
          b: {subset: bm25@7, judged: relevant, refine: full@1}
          c: {seed: 4}
        """,
        Asked(SETTINGS, subsets=["random:5"], seed=3, judged="all", refine="random:9@2"),
        keep_up=True,
    )
    assert [one.name for one in plan.validations] == [
        "a-random_5-seed_3-all_judged",
        "a-random_9-seed_3-all_judged",
        "b-bm25_at_7",
        "b",
        "c-random_5-seed_4-all_judged",
        "c-random_9-seed_4-all_judged",
    ]
    assert [one.refines and one.refines.best for one in plan.validations] == [
        *(None, 2, None, 1, None, 2)
    ]
    assert plan.keep_up


def test_several_subsets_are_not_refined_by_one_validation() -> None:
    cheap = Asked(SETTINGS, subsets=["bm25@1", "random:5"], refine="full@3")
    with pytest.raises(UsageError, match="'val' would be of the best by several subsets"):
        cheap.validations("val")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        read_plan(tmp_path / "nowhere.yaml", ASKED)


@pytest.mark.parametrize(
    "wrong",
    [
        {"validations": (Validation(SETTINGS), Validation(SETTINGS))},
        {"validations": (Validation(SETTINGS),), "poll_seconds": 0.0},
        {"validations": (Validation(SETTINGS),), "encoder_changes": {"pooling": "foo"}},
        {"validations": (Validation(SETTINGS),), "patience_seconds": -1.0},
        {"validations": (Validation(SETTINGS),), "max_lag_seconds": -5.0},
    ],
)
def test_a_plan_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(**wrong)


def test_a_subset_is_in_the_name_and_the_whole_corpus_is_not() -> None:
    subsets = [parse_subset("full"), parse_subset("bm25@50+random:10000")]
    made = each_split(SETTINGS, "val", "demo", ["dev", "test"], subsets)
    assert [one.name for one in made] == [
        "val-dev",
        "val-dev-bm25_at_50-random_10000",
        "val-test",
        "val-test-bm25_at_50-random_10000",
    ]


def test_what_refines() -> None:
    cheap = each_split(SETTINGS, "val", None, (), [parse_subset("random:5")])
    (dear,) = refining("full@3", cheap)
    assert (dear.name, dear.subset, dear.refines) == (
        "val",
        parse_subset("full"),
        Refines("val-random_5", SETTINGS.measures[0], 3),
    )
    (wider,) = refining("bm25@5@2", cheap)
    assert (wider.name, wider.refines and wider.refines.best) == ("val-bm25_at_5", 2)
    (judged,) = refining("bm25@5@2", cheap, judged="all")
    assert judged.name == "val-bm25_at_5-all_judged"
    assert refining("full@3", cheap, seed=7, judged="all") == (dear,)
    for text in ("full", "full@", "full@0", "@3", "full@x"):
        with pytest.raises(UsageError, match="expected SUBSET@N"):
            refining(text, cheap)
    with pytest.raises(UsageError, match="does already"):
        refining("random:5@3", cheap)


def test_subsets_in_the_file(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        "keep_up: true\n"
        "validations:\n"
        "  a: {subset: random:5, seed: 3, judged: all, refine: full@2}\n"
        "  b: {subset: bm25@7}\n",
    )
    assert plan.keep_up
    assert [one.name for one in plan.validations] == [
        "a-random_5-seed_3-all_judged",
        "a",
        "b-bm25_at_7",
    ]
    assert [one.name for one in plan.cheap] == ["a-random_5-seed_3-all_judged", "b-bm25_at_7"]


def test_keeping_up_chooses_among_subsets() -> None:
    with pytest.raises(UsageError, match="at least twice"):
        Plan((Validation(SETTINGS),), keep_up=True)
