"""One model of configuration, filled from flags, a file or Python, with the same checks."""

from pathlib import Path
from typing import Annotated, Any

import click
import pytest
from pydantic import Field, ValidationError

from mlflow_dr.cli.options import TakesSeveral, from_flags, takes
from mlflow_dr.config import ConfigError, Flag
from mlflow_dr.errors import MlflowDrError, UsageError
from mlflow_dr.fields import (
    CheckpointsDir,
    CollectionConfig,
    Depth,
    Device,
    Dtype,
    EncoderOverrides,
    Judged,
    Measures,
    Subsets,
)

LISTS = "\n".join(f"  l{n + 1}: &l{n + 1} [{', '.join([f'*l{n}'] * 9)}]" for n in range(8))
BOMB = f"encoder: x\nmeasures:\n  l0: &l0 [0]\n{LISTS}\ndepth: *l8\n"  # 43 million numbers


class Shown(CollectionConfig, EncoderOverrides):
    encoder: Annotated[str, Flag(positional=True)]
    measures: Measures = "mrr@10"
    depth: Depth = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    subset: Subsets = ()
    judged: Judged = "relevant"
    lag: Annotated[float | None, Flag("--max-lag"), Field(gt=0, description="In seconds.")] = None
    follow: Annotated[bool, Flag(off="--once")] = True
    checkpoints_dir: CheckpointsDir = None
    kept_in_files: Annotated[int, Flag(in_file_only=True)] = 3


@click.command("show", cls=TakesSeveral)
@takes(Shown)
def command(config: Shown) -> Shown:
    return config


def called(*argv: str) -> Any:
    return command.main(list(argv), "show", standalone_mode=False)


def from_file(path: Path, text: str) -> Shown:
    path.write_text(text)
    return from_flags(Shown, {}, path)


def test_flags_a_file_and_python_give_the_same_configuration(tmp_path: Path) -> None:
    expected = Shown(
        encoder="x", measures=["RR@10", "nDCG@5"], q_max_len=9, lag=3, follow=False, subset="full"
    )
    argv = "x --metrics RR@10 nDCG@5 --q_max_len 9 --max-lag 3 --once --subset full"
    assert called(*argv.split()) == expected
    text = "{encoder: x, measures: RR@10 nDCG@5, q_max_len: 9, lag: 3, follow: false, subset: full}"
    assert from_file(tmp_path / "show.yaml", text) == expected


def test_only_what_is_given_counts_as_given() -> None:
    assert called("x", "--depth", "5").given() == {"encoder": "x", "depth": 5}
    assert called("x", "--no-normalize").encoder_changes == {"normalize": False}


@pytest.mark.parametrize("flag", ["--ckpts_dir", "--ckpts-dir", "--checkpoints-dir"])
def test_a_flag_has_its_other_names_with_dashes_and_underscores(flag: str) -> None:
    assert called("x", flag, "here").checkpoints_dir == Path("here")


def test_the_help_has_descriptions_choices_and_defaults(capsys: Any) -> None:
    called("--help")
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--max-lag, --lag FLOAT In seconds.", "[relevant|all]", "[default: mrr@10]"):
        assert part in text
    assert "kept" not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--depth 0", "--depth is 0; expected at least 1"),
        ("--max_lag 0", "--max-lag is 0.0; expected a number above 0"),
        ("--max_lag nan", "--max-lag is nan; expected a finite number"),
        ("--q_max_len 2", "--q-max-len is 2; expected at least 3"),
        ("--metrics mmr@10", "--measures: measure 'mmr@10'"),
        ("--device gpu", "--device: device 'gpu'"),
        ("--dtype fp9", "--dtype: dtype 'fp9'"),
        ("--pooling sum", "--pooling: pooling 'sum'"),
        ("--subset bm52@1", "--subset: subset 'bm52@1'"),
    ],
)
def test_a_wrong_value_is_named_by_its_flag(argv: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        called("x", *argv.split())
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " is None; expected keys with values"),
        ("[1]", " is [1]; expected keys with values"),
        ("a: [", ": not a YAML file"),
        ("[" * 5000, ": not a YAML file"),
        ("a: 1\na: 2", ": not a YAML file: key 'a' stands twice in the mapping of line 1"),
        (f"depth: {'9' * 5000}", ": not a YAML file"),
        ("depth: 2001-99-99", ": not a YAML file"),
        ("{}", ": encoder is missing"),
        ("{encoder: x, dpeth: 5}", ": no key 'dpeth'; did you mean 'depth'? known are"),
        ("{encoder: x, depth: '5'}", ": depth is '5'; expected a whole number"),
        ("{encoder: x, depth: 1.5}", ": depth is 1.5; expected a whole number"),
        ("{encoder: x, depth: true}", ": depth is True; expected a whole number"),
        (f"{{encoder: x, depth: {10**16}}}", ": depth is 10000000000000000; expected at most"),
        ("{encoder: x, follow: 'no'}", ": follow is 'no'; expected true or false"),
        ("{encoder: x, follow: 0}", ": follow is 0; expected true or false"),
        ("{encoder: x, lag: .nan}", ": lag is nan; expected a finite number"),
        ("{encoder: x, judged: some}", ": judged is 'some'; expected one of 'relevant' or 'all'"),
        ("{encoder: 5}", ": encoder is 5; expected text"),
        ("{encoder: x, query_files: 5}", ": query_files is 5; expected"),
        (f"{{encoder: x, pooling: {'y' * 100_000}}}", ": pooling: pooling 'yyy"),
        ("{encoder: x, measures: [-1]}", ": measures: measure '-1'"),
        (BOMB, ": measures is {"),
    ],
)
def test_a_wrong_file_is_one_line_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "show.yaml"
    with pytest.raises(UsageError) as caught:
        from_file(path, text)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        from_flags(Shown, {}, tmp_path / "nowhere.yaml")


def test_python_is_checked_too_and_nothing_changes_later() -> None:
    with pytest.raises(ConfigError, match="depth is 0; expected at least 1"):
        Shown(encoder="x", depth=0)
    config = Shown(encoder="x")
    with pytest.raises(ValidationError, match="frozen"):
        config.depth = 5
    with pytest.raises(ConfigError, match="at least 1"):
        config.replaced(depth=0)
    assert config.replaced(depth=5) == Shown(encoder="x", depth=5)


@pytest.mark.parametrize(
    "values",
    [
        {"dataset": "demo", "query_files": "q"},
        {"query_files": ["q"]},
        {"candidate_dir": "c", "query_files": "q", "qrel_files": "r"},
    ],
)
def test_a_name_and_files_or_files_that_are_missing(values: dict[str, Any]) -> None:
    with pytest.raises(MlflowDrError, match=r"give dataset|no such file"):
        CollectionConfig(**values).named_dataset()


def test_the_files_of_a_collection_are_a_dataset_and_its_splits(tmp_path: Path) -> None:
    for name in ("c.json", "a.json", "b.json", "r.tsv"):
        (tmp_path / name).touch()
    candidates, first, second, judgements = (
        tmp_path / name for name in ("c.json", "a.json", "b.json", "r.tsv")
    )
    config = CollectionConfig(
        candidate_dir=candidates, query_files=[first, second], qrel_files=judgements
    )
    name, splits = config.named_dataset()
    assert name is not None
    assert splits == ("a", "b")
    assert config.one_dataset("b") == (name, "b")
    with pytest.raises(UsageError, match="--split a or b"):
        config.one_dataset(None)
