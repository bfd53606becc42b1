"""What a validator does, from flags, from a file and from Python."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.cli.options import from_flags
from mlflow_dr.collection.asyncval import AsyncvalFiles
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.subsets.spec import parse_subset
from mlflow_dr.validation.config import RunConfig, ValidateConfig
from mlflow_dr.validation.validations import EvalConfig, Refines, Validation

FLAGS = {"measures": ("mrr@10",), "dtype": "fp32", "every": 100}
SETTINGS = EvalConfig(parse_measures("mrr@10"), dtype="fp32")
LISTS = "\n".join(f"  l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(8))
BOMB = f"validations:\n  l0: &l0 [0]\n{LISTS}\norder: *l8\n"  # 43 million numbers


def read(tmp_path: Path, text: str, **flags: Any) -> ValidateConfig:
    path = tmp_path / "validations.yaml"
    path.write_text(text)
    return from_flags(ValidateConfig, {**FLAGS, **flags}, path)


def test_a_file_overrides_the_flags(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        order: bisect
        max_lag_seconds: 60
        max_seconds: 90
        validations:
          dev: {dataset: msmarco, split: dev, measures: mrr@10 recall@1000, depth: 1000}
          covid:
            dataset: beir/trec-covid
            measures: [ndcg@10]
            dtype: bf16
          plain:
        """,
    )
    assert (config.order, config.every, config.max_lag_seconds) == ("bisect", 100, 60.0)
    assert config.max_seconds == 90.0
    dev, covid, plain = config.all_validations
    assert (dev.name, dev.dataset, dev.split, dev.settings.depth) == ("dev", "msmarco", "dev", 1000)
    assert dev.settings.measures == parse_measures("mrr@10 recall@1000")
    assert (dev.settings.dtype, covid.settings.dtype) == ("fp32", "bf16")
    assert covid.settings.measures == parse_measures("ndcg@10")
    assert plain == Validation(SETTINGS, "plain")


def test_a_file_without_several_validations_is_like_flags(tmp_path: Path) -> None:
    config = read(tmp_path, "{name: small, subset: random:5, order: newest}")
    assert [validation.name for validation in config.all_validations] == ["small-random_5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys"),
        ("[1]", "expected keys"),
        ("a: [", "not a YAML file"),
        ("validations: []", "validations is []; expected keys with values"),
        ("validations: {}", "validations is {}; expected"),
        ("name: b\nvalidations: {a: }", "name: the names of validations are in the file"),
        ("ordre: oldest\nvalidations: {a: }", "no key 'ordre'; did you mean 'order'?"),
        ("order: best\nvalidations: {a: }", "order is 'best'; expected one of 'oldest'"),
        ("every: 0\nvalidations: {a: }", "every is 0"),
        ("every: yes\nvalidations: {a: }", "every is True"),
        ("every: 1.5\nvalidations: {a: }", "every is 1.5; expected a whole number"),
        (f"every: {'9' * 5000}\nvalidations: {{a: }}", "not a YAML file: Exceeds the limit"),
        ("follow: 'false'\nvalidations: {a: }", "follow is 'false'; expected true or false"),
        ("validations: {a: {keep_own_id: 'false'}}", "validations.a.keep_own_id is 'false'; exp"),
        ("validations: {a: {keep_own_id: 0}}", "validations.a.keep_own_id is 0; expected true"),
        (f"validations: {{a: {{depth: {'x' * 100_000}}}}}", "validations.a.depth is 'xxx"),
        (f"validations: {{a: {{subset: bm25@{'9' * 5000}}}}}", "is not a whole number above 0"),
        (f"validations: {{a: {{refine: full@{'9' * 5000}}}}}", "expected SUBSET@N"),
        (f"validations: {{a: {{measures: mrr@{'9' * 5000}}}}}", "with a cut-off"),
        ("validations: {a: {depth: deep}}", "validations.a.depth is 'deep'"),
        ("validations: {a: {dataset: 5}}", "validations.a.dataset is 5"),
        ("validations: {a: {dpeth: 5}}", "validations.a: no key 'dpeth'; did you mean 'depth'?"),
        ("validations: {a: [1]}", "validations.a is [1]; expected keys"),
        ("validations: {a: {measures: mrr@10, depth: 5}}", "validations.a: depth 5 is too shallow"),
        ("validations: {a: {measures: mmr@10}}", "validations.a.measures: measure 'mmr@10'"),
        ("validations: {a: {subset: bm52@10}}", "validations.a.subset: subset 'bm52@10'"),
        ("validations: {a: {dtype: fp9}}", "validations.a.dtype: dtype 'fp9'"),
        ("validations: {a: {device: gpu}}", "validations.a.device: device 'gpu'"),
        ("validations: {a: {dataset: dmeo}}", "validations.a.dataset: no dataset 'dmeo'"),
        ("validations: {a: {refine: full}}", "validations.a: refine 'full'"),
        ("validations: {a: {refine: ''}}", "validations.a: refine ''"),
        ("keep: worst:1\nvalidations: {a: }", "validations.yaml: keep: unknown rule 'worst:1'"),
        ("patience: -1\nvalidations: {a: }", "validations.yaml: patience"),
        (f"poll_seconds: {10**16}\nvalidations: {{a: }}", "poll_seconds is 10000000000000000"),
        ("poll_seconds: 0\nvalidations: {a: }", "poll_seconds is 0; expected a number above 0"),
        ("patience_seconds: -1\nvalidations: {a: }", "patience_seconds is -1; expected a number"),
        ("max_lag_seconds: .nan\nvalidations: {a: }", "max_lag_seconds is nan; expected a finite"),
        ("pooling: foo\nvalidations: {a: }", "pooling: pooling 'foo'"),
        ("validations: {a: , a: }", "key 'a' stands twice in the mapping of line 1"),
        ("order: " + "[" * 5000, "not a YAML file"),
        (BOMB, "order is"),
        ("validations: {a/b: }", "cannot be called 'a/b'"),
        ("validations: {a: {candidate_dir: c}}", "validations.a: give dataset, or candidate_dir"),
        ("validations: {a: {candidate_dir: c}}", "there is no query_files, no qrel_files"),
        (
            "validations: {a: {dataset: demo, candidate_dir: c, query_files: c, qrel_files: c}}",
            "validations.a: give dataset, or candidate_dir (once), query_files and qrel_files",
        ),
        (
            "validations: {a: {candidate_dir: [c, d], query_files: c}}",
            "candidate_dir is ['c', 'd']",
        ),
        ("validations: {a: {query_files: 5}}", "validations.a.query_files is 5"),
        (
            "validations: {a: {candidate_dir: c, query_files: [c], qrel_files: [c, c]}}",
            "1 query files and 2 files of judgements",
        ),
        (
            "validations: {a: {candidate_dir: nowhere, query_files: c, qrel_files: c}}",
            "no such file",
        ),
    ],
)
def test_a_file_that_is_wrong_is_one_line(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").touch()
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "validations.yaml"))
    assert len(str(caught.value)) < 500


def test_settings_from_python_are_checked_too() -> None:
    with pytest.raises(UsageError, match="keep_own_id is 'false'; expected"):
        EvalConfig(parse_measures("mrr@10"), keep_own_id="false")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="keep_own_id is 'false'; expected"):
        ValidateConfig(keep_own_id="false")


def test_a_split_that_the_files_dataset_lacks(
    tmp_path: Path, beir_folder: Callable[..., Path]
) -> None:
    folder = beir_folder({"p": "gulls"}, {"q": "birds"}, dev={"q": {"p": 1}})
    with pytest.raises(UsageError, match=r"yaml: validations\.a\.split: .* no split 'dav'; did"):
        read(tmp_path, f"validations: {{a: {{dataset: {folder}, split: dav}}}}")


def test_reading_a_file_creates_nothing(tmp_path: Path, own_cache: Path) -> None:
    read(tmp_path, "validations: {a: {dataset: demo, split: dev}}")
    assert not any(own_cache.iterdir())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c", "nq.json", "a.json", "b.json", "b.b.json", "q.tsv", "a.tsv", "b.tsv"):
        (tmp_path / name).touch()


def test_files_instead_of_a_dataset(tmp_path: Path, files: None) -> None:
    config = read(
        tmp_path,
        """
        validations:
          nq: {candidate_dir: c, query_files: nq.json, qrel_files: q.tsv, measures: nDCG@10}
          both: {candidate_dir: c, query_files: [a.json, b.b.json], qrel_files: [a.tsv, b.tsv]}
          one: {candidate_dir: c, query_files: [a.json, b.json], qrel_files: q.tsv, split: b}
        """,
    )
    validations = config.all_validations
    assert [(validation.name, validation.split) for validation in validations] == [
        *(("nq", "nq"), ("both-a", "a"), ("both-b_b", "b.b"), ("one", "b"))
    ]
    queries, qrels = [Path("a.json"), Path("b.b.json")], [Path("a.tsv"), Path("b.tsv")]
    both = AsyncvalFiles(Path("c"), queries, qrels).name
    assert {validation.dataset for validation in validations[1:3]} == {both}
    assert validations[0].settings.measures == parse_measures("ndcg@10")


def test_files_of_the_flags_apply_to_validations_without_a_dataset(
    tmp_path: Path, files: None
) -> None:
    config = read(
        tmp_path,
        "validations: {short: {measures: mrr@5}, c: {split: a}, other: {dataset: demo}}",
        candidate_dir="c",
        query_files=("a.json", "b.json"),
        qrel_files=("q.tsv",),
    )
    name = AsyncvalFiles(Path("c"), [Path("a.json"), Path("b.json")], [Path("q.tsv")]).name
    assert [
        (validation.name, validation.dataset, validation.split)
        for validation in config.all_validations
    ] == [
        ("short-a", name, "a"),
        ("short-b", name, "b"),
        ("c", name, "a"),
        ("other", "demo", None),
    ]


def test_a_split_of_the_flags_applies_to_a_dataset_of_the_file(tmp_path: Path, files: None) -> None:
    config = read(
        tmp_path,
        """
        validations:
          a:
          b: {dataset: demo}
          c: {dataset: demo, split: dev}
          d: {candidate_dir: c, query_files: nq.json, qrel_files: q.tsv}
        """,
        dataset="here",
        split=("test",),
        subset=("random:5", "random:7"),
    )
    assert [
        (validation.name, validation.dataset, validation.split)
        for validation in config.all_validations[:6]
    ] == [
        ("a-random_5", "here", "test"),
        ("a-random_7", "here", "test"),
        ("b-random_5", "demo", "test"),
        ("b-random_7", "demo", "test"),
        ("c-random_5", "demo", "dev"),
        ("c-random_7", "demo", "dev"),
    ]
    assert {validation.split for validation in config.all_validations[6:]} == {"nq"}


def test_subsets_of_the_flags_apply_to_validations_without_a_subset(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        validations:
          a:
          b: {subset: bm25@7, judged: relevant, refine: full@1}
          c: {seed: 4}
        """,
        subset=("random:5",),
        seed=3,
        judged="all",
        refine="random:9@2",
        keep_up=True,
    )
    validations = config.all_validations
    assert [validation.name for validation in validations] == [
        "a-random_5-seed_3-all_judged",
        "a-random_9-seed_3-all_judged",
        "b-bm25_at_7",
        "b",
        "c-random_5-seed_4-all_judged",
        "c-random_9-seed_4-all_judged",
    ]
    assert [validation.refines and validation.refines.best for validation in validations] == [
        *(None, 2, None, 1, None, 2)
    ]
    assert config.keep_up


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poll_seconds": 0.0}, "poll_seconds is 0.0"),
        ({"pooling": "foo"}, "pooling 'foo'"),
        ({"patience_seconds": -1.0}, "patience_seconds is -1.0"),
        ({"max_lag_seconds": -5.0}, "max_lag_seconds is -5.0"),
        ({"subset": ["random:5", "random:5"]}, "two validations are called 'val-random_5'"),
        ({"keep_up": True}, "keep_up chooses among subsets; give at least two"),
        ({"name": "a/b"}, "cannot be called 'a/b'"),
        (
            {"subset": ["bm25@1", "random:5"], "refine": "full@3"},
            "several subsets would share the validation 'val'",
        ),
    ],
)
def test_senseless_values_are_refused(wrong: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ValidateConfig(**wrong)


def test_the_name_has_the_subset_but_not_the_full_corpus() -> None:
    subsets = ["full", "bm25@50+random:10000"]
    config = ValidateConfig(dataset="demo", split=["dev", "test"], subset=subsets)
    assert [validation.name for validation in config.all_validations] == [
        "val-dev",
        "val-dev-bm25_at_50-random_10000",
        "val-test",
        "val-test-bm25_at_50-random_10000",
    ]


def refined(refine: str, **values: Any) -> Validation:
    """The expensive validation that refines one on five random passages."""
    _, expensive = ValidateConfig(
        subset="random:5", refine=refine, measures="mrr@10", **values
    ).all_validations
    return expensive


def test_the_validations_that_refine() -> None:
    expensive = refined("full@3")
    assert (expensive.name, expensive.subset, expensive.refines) == (
        "val",
        parse_subset("full"),
        Refines("val-random_5", SETTINGS.measures[0], 3),
    )
    wider = refined("bm25@5@2")
    assert (wider.name, wider.refines and wider.refines.best) == ("val-bm25_at_5", 2)
    assert refined("bm25@5@2", judged="all").name == "val-bm25_at_5-all_judged"
    assert refined("full@3", seed=7, judged="all").subset == parse_subset("full")
    for text in ("full", "full@", "full@0", "@3", "full@x"):
        with pytest.raises(UsageError, match="expected SUBSET@N"):
            refined(text)
    with pytest.raises(UsageError, match="does already"):
        refined("random:5@3")


def test_subsets_in_the_file(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "keep_up: true\n"
        "validations:\n"
        "  a: {subset: random:5, seed: 3, judged: all, refine: full@2}\n"
        "  b: {subset: bm25@7}\n",
    )
    assert config.keep_up
    assert [validation.name for validation in config.all_validations] == [
        "a-random_5-seed_3-all_judged",
        "a",
        "b-bm25_at_7",
    ]
    assert [validation.name for validation in config.cheap] == [
        "a-random_5-seed_3-all_judged",
        "b-bm25_at_7",
    ]


def test_run_hands_its_configuration_to_the_validator(tmp_path: Path) -> None:
    config = RunConfig(
        dataset="demo",
        gpus=2,
        subset=["random:5", "full"],
        keep="best:2",
        keep_up=True,
        measures="mrr@5",
        poll_seconds=1,
    )
    validation = config.validation(run_id="run", dataset="demo", device="cpu")
    path = tmp_path / "validate.json"
    path.write_text(validation.model_dump_json(exclude_unset=True))
    assert from_flags(ValidateConfig, {}, path) == validation
    assert [each.name for each in validation.all_validations] == ["val-random_5", "val"]
    with pytest.raises(UsageError, match="expected SUBSET@N"):
        RunConfig(refine="full")
