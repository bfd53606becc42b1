"""Names of flags that are known without importing what they belong to."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.training.flags import check_flags, known_flags
from mlflow_dr.training.parsing import training_parser


def test_the_known_flags_are_those_of_the_parser() -> None:
    assert known_flags() == set(training_parser()._option_string_actions)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat; did you mean --learning_rate?"),
        (["--lerning-rate=1"], "unknown flag --lerning-rate; did you mean --learning_rate?"),
        (["--trian_file", "x"], "unknown flag --trian_file; did you mean --train_file?"),
        (["--measurs", "x"], "did you mean --measures?"),
        (["--zzzzzz"], "unknown flag --zzzzzz; `mlflow-dr train --help-all` lists all"),
        (["--pooling", "clss"], "^pooling is 'clss'; expected cls, mean, .* or weighted_mean"),
        (["--lora-publish=both"], "^lora-publish is 'both'; expected merged or adapter"),
        (["--recipe", "DPR"], "^recipe is 'DPR'; expected demo, msmarco, .* or dpr"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: cannot be read"),
    ],
)
def test_mistakes_are_refused_at_once(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_flags(argv, ["--measures"])


def test_flags_in_a_file_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("learning_rate: 1e-5\nbatch_sise: 3\n")
    with pytest.raises(
        UsageError, match=r"train\.yaml: unknown flag --batch_sise; .* --batch_size"
    ):
        check_flags(["--config", str(file)])


def test_values_that_look_like_flags_are_taken() -> None:
    check_flags(
        ["--learning_rate", "-1e-5", "--query_prefix=--x", "--fp16", "--no_publish_initial"]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --learning_rat 1", "did you mean --learning_rate?"),
        ("train --recipe dprr", "recipe is 'dprr'; expected"),
        ("run --learning_rat 1", "did you mean --learning_rate?"),
        ("run --measurs mrr@10", "did you mean --measures?"),
        ("validate --run-id x --dtype bf17", "dtype 'bf17': expected auto, fp32"),
        ("evaluate x --dataset demo --pooling clss", "pooling 'clss': expected one of cls"),
        ("mine --dpeth 3", "No such option '--dpeth'. (Did you mean one of: '--dataset'"),
    ],
)
def test_an_unknown_flag_needs_neither_torch_nor_mlflow(argv: str, message: str) -> None:
    code = (
        "import sys; from mlflow_dr.cli import _run; code = _run(); "
        "heavy = {'torch', 'transformers', 'mlflow', 'pandas'} & set(sys.modules); "
        "print(code, sorted(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "2 []"
    assert message in done.stderr
