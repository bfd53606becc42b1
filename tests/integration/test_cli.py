"""The command line: its help, and what it says to bad input."""

import json
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr import cli
from mlflow_dr.cli import COMMANDS
from mlflow_dr.tracking.client import connect

SCRIPT = Path(sys.executable).parent / "mlflow-dr"
Call = Callable[..., subprocess.CompletedProcess]
Failure = Callable[..., tuple[int, str]]
Folder = Callable[..., Path]

CORPUS = {"p1": "the lighthouse keeper", "p2": "the harbour pilot", "p3": "the ferry leaves"}
QUERIES = {"q1": "who keeps the lighthouse"}
JUDGED = {"q1": {"p1": 1}}


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the console script's own function here: exit code, output and error output.

    An exception that gets out of it, which would be a traceback, fails the test.
    """
    package = logging.getLogger("mlflow_dr")
    before = package.handlers, package.propagate, package.level
    on_sigterm, uri = signal.getsignal(signal.SIGTERM), mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_DR_COMMAND", "none")

    def command(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlflow-dr", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    yield command
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])
    signal.signal(signal.SIGTERM, on_sigterm)
    mlflow.set_tracking_uri(uri)


@pytest.fixture
def failure(command: Callable[..., tuple[int, str, str]]) -> Failure:
    """Runs a command that must fail with one line; returns the exit code and this line."""

    def failure(*argv: object) -> tuple[int, str]:
        code, _, errors = command(*argv)
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        return code, errors.strip()

    return failure


@pytest.fixture(scope="module")
def store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    """A store in a sqlite file; nothing is published to it."""
    uri = mlflow.get_tracking_uri()
    path = shutil.copy(empty_store, tmp_path_factory.mktemp("store"))
    client = connect(f"sqlite:///{path}")
    mlflow.set_tracking_uri(uri)
    return client


@pytest.fixture
def tracked(store: MlflowClient) -> Iterator[MlflowClient]:
    """The store, as what MLflow is set to."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.tracking_uri)
    yield store
    mlflow.set_tracking_uri(before)


def test_help_lists_every_command_with_one_line_each(call: Call) -> None:
    done = call(SCRIPT, "--help")
    assert done.returncode == 0
    for name, line in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(line)}$", done.stdout, re.MULTILINE), name


def test_help_imports_neither_torch_nor_mlflow_and_answers_at_once(call: Call) -> None:
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "from mlflow_dr.cli import _run\n"
        "sys.argv = ['mlflow-dr', '--help']\n"
        "_run()\n"
        "print(time.process_time() - start)\n"
        "print(sorted({'torch', 'mlflow', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    seconds, imported = call(sys.executable, "-c", code).stdout.splitlines()[-2:]
    assert imported == "[]"
    assert float(seconds) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name: str, command: Callable) -> None:
    code, output, _ = command(name, "--help")
    assert code == 0
    assert re.search(rf"Example:\n *mlflow-dr {name}", output)


def test_datasets_lists_the_catalogue(command: Callable) -> None:
    code, output, _ = command("datasets")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()[::2]] == [
        *("demo", "demo-qa", "msmarco", "nq", "trivia"),
        *("dpr:PASSAGES?queries=FILE[,FILE]", "FOLDER", "FILE", "irds:ID"),
        *("asyncval:CANDIDATES?queries=FILE&qrels=FILE", "pool:FILE"),
        "OWNER/NAME[/CONFIG][@REVISION][:SPLIT]",
    ]


def test_an_unknown_command_is_one_line(failure: Failure) -> None:
    assert failure("trian") == (
        2,
        "error: No such command 'trian'; did you mean 'train'? see `mlflow-dr --help`",
    )


def test_a_console_script_prints_no_traceback(call: Call) -> None:
    done = call(SCRIPT, "evaluate", "nowhere/", "--dataset", "dmeo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: no dataset 'dmeo'; did you mean 'demo'\? [^\n]+\n", done.stderr)


def test_an_unknown_split_is_an_error_that_lists_the_splits(
    failure: Failure, beir_folder: Folder, tiny_directory: Path
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED, train=JUDGED)
    code, line = failure("evaluate", tiny_directory, "--dataset", folder, "--split", "tset")
    assert code == 2
    assert line.endswith("has no split 'tset'; it has: dev, train")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--measures", "ndgc@10"], r"--measures: measure 'ndgc@10': expected one of mrr, .*"),
        (["--measures", "ndcg"], r"--measures: measure 'ndcg': .* with a cut-off, such as ndcg@10"),
        (["--measures", " "], r"--measures: no measure given; for example: .*"),
        (["--depth", "5"], r"depth 5 is too shallow for recall@100; use 100 or more"),
        (["--depth", "0"], r"--depth is 0; expected at least 1"),
        (["--device", "cuda:99"], r"device 'cuda:99' does not exist: this machine has .*"),
        (["--device", "gpu"], r"--device: device 'gpu' is not a device; expected auto, cpu, .*"),
        (["--device", "cpu", "--dtype", "fp16"], r"dtype fp16 needs a CUDA device; .*"),
        (["--dtype", "fp8"], r"--dtype: dtype 'fp8': expected auto, fp32, bf16, fp16"),
        (["--output", "/no/such/r.json"], r"/no/such/r.json: the folder /no/such does not exist"),
        (["--ranking", "/no/such/f.trec"], r"/no/such/f.trec: the folder .* does not exist"),
        (["--pooling", "median"], r"--pooling: pooling 'median': expected one of cls, mean, .*"),
        (["--max-length", "1"], r"--max-length is 1; expected at least 3"),
    ],
)
def test_a_wrong_flag_of_evaluate_is_refused_before_any_work(
    argv: list[str], message: str, failure: Failure, beir_folder: Folder, tiny_directory: Path
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    code, line = failure("evaluate", tiny_directory, "--dataset", folder, *argv)
    assert code == 2
    assert re.fullmatch(f"error: {message}", line), line


def test_an_encoder_that_does_not_exist(failure: Failure, beir_folder: Folder) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    code, line = failure("evaluate", "./no-encoder", "--dataset", folder)
    assert code == 2
    assert line.startswith("error: ./no-encoder: not a directory; expected an encoder's directory")
    code, line = failure("evaluate", "no-such/encoder-on-the-hub", "--dataset", folder)
    assert code == 2
    assert "'no-such/encoder-on-the-hub' is not a directory, and the Hugging Face hub" in line


def test_a_truncated_weight_file_is_a_damaged_checkpoint(
    failure: Failure, beir_folder: Folder, damaged_directory: Path
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    code, line = failure("evaluate", damaged_directory, "--dataset", folder)
    assert code == 1
    assert line.startswith(f"error: {damaged_directory}: cannot be read (")


@pytest.fixture
def damaged_directory(tiny_directory: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "damaged"
    shutil.copytree(tiny_directory, directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return directory


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "p1", "text": "a b"}\n{"_id": p2}\n',
            r"corpus.jsonl:2: not JSON",
        ),
        (
            "corpus.jsonl",
            '{"_id": "p1", "text": "a"}\n{"_id": "p1", "text": "b"}\n',
            r"corpus.jsonl:2: passage id 'p1' is used twice; its first use is at .*corpus.jsonl:1",
        ),
        ("corpus.jsonl", '{"_id": "p1"}\n', r"corpus.jsonl:1: the passage has no 'text'"),
        ("corpus.jsonl", "", r"corpus.jsonl: the corpus has no passages"),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": 3}\n',
            r"queries.jsonl:1: text: expected 'str', got 'int'",
        ),
        (
            "qrels/dev.tsv",
            "query-id\tcorpus-id\tscore\nq1\tp8\t1\nq1\tp9\t1\n",
            r"qrels/dev.tsv: no judgement is left to measure with: "
            r"2 judgements name passages that the corpus lacks \(such as 'p8'\)",
        ),
        (
            "qrels/dev.tsv",
            "q7\tp1\t1\n",
            r"qrels/dev.tsv: no judgement is left .* 1 judged queries are not in the query file",
        ),
        ("qrels/dev.tsv", "", r"qrels/dev.tsv: no judgement is left .* the file has none"),
        ("qrels/dev.tsv", "q1\tp1\n", r"qrels/dev.tsv:1: 2 columns; expected query-id, corpus-id"),
    ],
)
def test_a_damaged_collection_names_file_and_line(
    file: str,
    content: str,
    message: str,
    failure: Failure,
    beir_folder: Folder,
    tiny_directory: Path,
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    (folder / file).write_text(content)
    code, line = failure("evaluate", tiny_directory, "--dataset", folder)
    assert code == 1
    assert re.match(f"error: {re.escape(str(folder))}/{message}", line), line


def test_judgements_of_unknown_passages_are_counted_and_left_out(
    command: Callable, beir_folder: Folder, tiny_directory: Path
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev={"q1": {"p1": 1, "p9": 1}})
    code, output, errors = command("evaluate", tiny_directory, "--dataset", folder)
    assert code == 0
    assert "1 judgements name passages that the corpus lacks (such as 'p9')" in errors
    assert "mrr@10\t" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--learning_rat", "1"],
            r"unknown flag --learning_rat; did you mean --learning_rate\? .*",
        ),
        (["--max-stepz=3"], r"unknown flag --max-stepz; did you mean --max_steps\? .*"),
        (["--zzzzzz"], r"unknown flag --zzzzzz; `mlflow-dr train --help-all` lists all"),
        (["--max_steps", "many"], r"argument --max_steps.*: invalid int value: 'many'; see .*"),
        (["--train_n_passages", "-3"], r"train_n_passages is -3; it must be at least 1"),
        (["--publish_steps", "-1"], r"publish_steps is -1; it must be at least 0"),
        (["--temperature", "0"], r"temperature is 0.0; it must be above 0"),
        (["--config", "/no/such.yaml"], r"/no/such.yaml: cannot be read \(No such file .*\)"),
    ],
)
def test_a_wrong_flag_of_train(argv: list[str], message: str, failure: Failure) -> None:
    code, line = failure("train", *argv)
    assert code == 2
    assert re.fullmatch(f"error: {message}", line), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: [1\n", "not YAML or JSON: "),
        ("- learning_rate\n", "expected a mapping of flags to values, got list"),
        ("learnig_rate: 1e-3\n", "unknown flag --learnig_rate; did you mean --learning_rate?"),
    ],
)
def test_a_bad_configuration_file(
    content: str, message: str, failure: Failure, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    code, line = failure("train", "--config", path)
    assert code == 2
    assert line.startswith(f"error: {path}: {message}")


def test_training_on_what_has_no_examples_makes_no_run(
    tracked: MlflowClient, command: Callable, beir_folder: Folder
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    before = len(tracked.search_runs(["0"]))
    code, _, errors = command("train", "--dataset", folder, "--model", "tiny")
    assert code == 2
    assert re.search(r"^error: [^\n]+ has no split 'train'; it has: dev\n\Z", errors, re.MULTILINE)
    assert len(tracked.search_runs(["0"])) == before


def test_no_run_with_that_id(tracked: MlflowClient, failure: Failure) -> None:
    code, line = failure("validate", "--run-id", "0" * 32)
    assert code == 1
    assert line.startswith(f"error: no run '{'0' * 32}' on sqlite:///")
    assert "MLFLOW_TRACKING_URI" in line


def test_a_deleted_run(tracked: MlflowClient, failure: Failure) -> None:
    run_id = tracked.create_run("0").info.run_id
    tracked.delete_run(run_id)
    code, line = failure("validate", "--run-id", run_id)
    assert code == 1
    assert line.startswith(f"error: run {run_id} was deleted; restore it with `mlflow runs restore")


def test_a_run_that_names_no_dataset(tracked: MlflowClient, failure: Failure) -> None:
    run_id = tracked.create_run("0").info.run_id
    code, line = failure("validate", "--run-id", run_id, "--once")
    assert (code, line) == (
        2,
        f"error: run {run_id} names no dataset (param 'dataset'); give --dataset",
    )


def test_no_checkpoint_with_that_id(
    tracked: MlflowClient, failure: Failure, beir_folder: Folder
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    code, line = failure("evaluate", "models:/m-0", "--dataset", folder)
    assert code == 1
    assert line.startswith("error: model m-0: ")


def test_a_server_that_refuses_connections_is_reported_at_once(call: Call) -> None:
    start = time.monotonic()
    done = call("mlflow-dr", "validate", "--run-id", "0", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: tracking server http://127.0.0.1:9 does not answer .+\n", done.stderr
    )
    assert time.monotonic() - start < 100  # MLflow itself tries for minutes


def test_a_server_that_never_answers_is_reported_within_seconds(
    failure: Failure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        code, line = failure("validate", "--run-id", "0", "--tracking-uri", uri)
    assert code == 1
    assert line.startswith(f"error: tracking server {uri} does not answer (Read timed out")
    assert time.monotonic() - start < 60  # MLflow itself tries for minutes


def test_evaluate_prints_what_it_writes(
    command: Callable, beir_folder: Folder, tiny_directory: Path, tmp_path: Path
) -> None:
    folder = beir_folder(CORPUS, QUERIES, dev=JUDGED)
    report = tmp_path / "report.json"
    code, output, _ = command("evaluate", tiny_directory, "--dataset", folder, "--output", report)
    assert code == 0
    measures = json.loads(report.read_text())["measures"]
    shown = dict(line.split("\t") for line in output.splitlines() if "\t" in line)
    assert shown == {name: f"{value:.4f}" for name, value in measures.items()}
