"""`mlflow-dr mine` as a command, with BM25 and with a published checkpoint."""

import gzip
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

Call = Callable[..., subprocess.CompletedProcess]
REPOSITORY = Path(__file__).parents[2]


def lines_of(path: Path) -> list[dict]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in text.splitlines()]


def positives(collection: Path) -> dict[str, str]:
    rows = (collection / "qrels" / "train.tsv").read_text().splitlines()[1:]
    return {query: passage for query, passage, _ in (row.split("\t") for row in rows)}


def test_bm25(call: Call, collection: Path, tmp_path: Path) -> None:
    path = tmp_path / "mined.jsonl"
    argv = ["mlflow-dr", "mine", "--dataset", collection, "--output", path]
    argv += ["--with", "bm25", "--depth", "50", "--negatives", "10"]
    done = call(*argv)
    assert done.returncode == 0, done.stderr
    found = lines_of(path)
    relevant = positives(collection)
    assert {line["query_id"]: line["positive_document_ids"] for line in found} == {
        query: [passage] for query, passage in relevant.items()
    }
    for line in found:
        negatives = line["negative_document_ids"]
        assert len(set(negatives)) == len(negatives) == len(line["negative_scores"]) <= 10
        assert relevant[line["query_id"]] not in negatives
    number = sum(len(line["negative_document_ids"]) for line in found)
    assert f"240 queries with {number / 240:.1f} negatives on average\n" in done.stdout
    assert re.search(rf"wrote {path} in \d+\.\d s\n", done.stdout)

    again = call(*argv)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {path}: exists already; --force replaces it\n"
    before = path.read_bytes()
    assert call(*argv, "--force", "--range-max", "50").returncode == 0
    assert path.read_bytes() == before


def test_bm25_needs_neither_torch_nor_mlflow(call: Call, collection: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mlflow_dr.cli import _run\n"
        f"sys.argv = ['mlflow-dr', 'mine', '--dataset', {str(collection)!r}, '--output', 'm']\n"
        "assert _run() == 0\n"
        "print(sorted({'torch', 'mlflow', 'transformers'} & set(sys.modules)))\n"
    )
    done = call(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_a_published_checkpoint(
    call: Call,
    client: MlflowClient,
    server: str,
    collection: Path,
    publish_noise: Callable[..., str],
    checkpoints: Callable,
    tmp_path: Path,
) -> None:
    model = checkpoints(client, publish_noise(5))[5]
    path = tmp_path / "mined.jsonl.gz"
    argv = ["mlflow-dr", "mine", "--dataset", collection, "--output", path, "--device", "cpu"]
    argv += ["--with", f"models:/{model.model_id}", "--tracking-uri", server, "--dtype", "fp32"]
    done = call(*argv, "--depth", "20", "--negatives", "5", "--range-min", "2")
    assert done.returncode == 0, done.stderr
    report = tmp_path / "ranking.trec"
    evaluated = call(
        *("mlflow-dr", "evaluate", f"models:/{model.model_id}", "--dataset", collection),
        *("--split", "train", "--ranking", report, "--tracking-uri", server),
        *("--device", "cpu", "--dtype", "fp32"),
    )
    assert evaluated.returncode == 0, evaluated.stderr
    ranking: dict[str, list[str]] = {}
    for line in report.read_text().splitlines():
        query, _, passage, *_ = line.split()
        ranking.setdefault(query, []).append(passage)
    records = map(json.loads, (collection / "corpus.jsonl").read_text().splitlines())
    texts = {record["_id"]: record["text"] for record in records}
    relevant = positives(collection)
    found = lines_of(path)
    assert len(found) == 240
    for mined in found:
        same = texts[relevant[mined["query_id"]]]  # methods inherit their docstrings
        others = [p for p in ranking[mined["query_id"]] if texts[p] != same]
        assert mined["negative_document_ids"] == others[2:7]


def test_mine_as_an_entry_of_the_mlflow_project(
    call: Call, collection: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mined.jsonl"
    parameters = {"dataset": collection, "output": path, "depth": 20, "negatives": 4, "margin": 0}
    flags = [word for key, value in parameters.items() for word in ("-P", f"{key}={value}")]
    done = call(
        *("mlflow", "run", REPOSITORY, "--env-manager", "local", "-e", "mine", *flags),
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db",
    )
    assert done.returncode == 0, done.stderr
    found = lines_of(path)
    assert len(found) == 240
    for line in found:
        assert len(line["negative_document_ids"]) <= 4
        assert all(line["positive_scores"][0] >= score for score in line["negative_scores"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_mine_leaves_no_file(
    start: Callable[..., subprocess.Popen],
    collection: Path,
    minilm: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    argv = ["mlflow-dr", "mine", "--dataset", collection, "--output", tmp_path / "mined.jsonl"]
    process = start(*argv, "--with", minilm)
    deadline = time.monotonic() + 600
    while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 130, printed
    assert printed.splitlines()[-1] == "stopped"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--margin", "nan"], "--margin is nan; expected a finite number"),
        (["--depth", "20"], "30 negatives from ranks 0 to 20: there are 20;"),
        (["--language", "klingon"], "language 'klingon': expected none or one of arabic,"),
        (["--with", "./nowhere"], "cannot mine with './nowhere': ./nowhere: not a directory"),
        (["--device", "cuda:99", "--with", "TINY"], "device 'cuda:99' does not exist"),
        (["--sample", "best"], "Invalid value for '--sample'"),
    ],
)
def test_a_wrong_flag_is_one_line(
    call: Call, collection: Path, tiny_directory: Path, argv: list[str], line: str
) -> None:
    argv = [str(tiny_directory) if word == "TINY" else word for word in argv]
    done = call("mlflow-dr", "mine", "--dataset", collection, "--output", "mined.jsonl", *argv)
    assert done.returncode in (1, 2)
    errors = done.stderr.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert line in errors[-1]
    assert "Traceback" not in done.stderr
