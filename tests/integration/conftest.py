"""Real processes: an MLflow server on loopback, a small collection of real text, our commands."""

import inspect
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import mlflow
import psutil
import pytest
from asking import NAMES
from forks import NO_MOMENT, SECONDS_FOR_A_COMMAND, Fork, Forks
from mlflow import MlflowClient
from mlflow.entities import LoggedModel

SECONDS_TO_START = 300
ADMIN_PASSWORD = "of all runs here"
PASSAGES = 300
MODULES = (
    *("argparse", "ast", "calendar", "collections", "configparser", "contextlib", "copy", "csv"),
    *("datetime", "decimal", "difflib", "email.message", "fractions", "functools", "heapq"),
    *("http.client", "http.cookiejar", "imaplib", "inspect", "ipaddress", "json", "locale"),
    *("logging", "mailbox", "os", "pathlib", "pickletools", "pprint", "random", "shutil"),
    *("smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile"),
    *("textwrap", "threading", "tokenize", "traceback", "unittest.case", "unittest.mock"),
    *("urllib.request", "warnings", "zipfile"),
)
Points = dict[str, dict[int, list[float]]]
TRAINING = {
    "model": "tiny",
    "max_steps": 20,
    "publish_steps": 5,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "logging_steps": 2,
    "p_max_len": 48,
}


class Ended(NamedTuple):
    """How several commands ended, and what they printed together."""

    codes: list[int]
    printed: list[str]

    @property
    def code(self) -> int:
        (code,) = self.codes
        return code

    @property
    def text(self) -> str:
        return "\n".join(self.printed)


@pytest.fixture(scope="session")
def artifact_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the server keeps its artifacts."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def serve(forks: Forks, empty_store: Path) -> Iterator[Callable[..., tuple[str, Fork]]]:
    """Starts a real MLflow server: its room, its artifact store, a port if need be, and flags.

    Returns its address and its process.
    """
    running: list[Fork] = []

    def serve(
        directory: Path, store: Path, port: int | None = None, *more: str
    ) -> tuple[str, Fork]:
        port = port or _free_port()
        if not (directory / "mlflow.db").exists():
            shutil.copy(empty_store, directory / "mlflow.db")
            with closing(sqlite3.connect(directory / "mlflow.db")) as database, database:
                database.execute("UPDATE experiments SET artifact_location = 'mlflow-artifacts:/0'")
        argv = ["mlflow", "server", "--host", "127.0.0.1"]
        argv += ["--port", str(port), "--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
        argv += ["--workers", "1", "--artifacts-destination", str(store), *more]
        with (directory / "log").open("w") as log:
            process = forks.start(
                *argv,
                directory=directory,
                variables={
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                    "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests",
                    "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
                },
                output=log,
            )
        running.append(process)
        _wait_until_healthy(f"http://127.0.0.1:{port}", process, directory / "log")
        return f"http://127.0.0.1:{port}", process

    yield serve
    for process in running:
        _stop_group(process)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def server(
    serve: Callable[..., tuple[str, Fork]],
    artifact_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """The address of a real MLflow server."""
    return serve(tmp_path_factory.mktemp("server"), artifact_store)[0]


class SpareServer:
    """A server for the tests that kill it, or that change all of its runs.

    Attributes:
        directory: has its database, `mlflow.db`.
        store: the folder in which it keeps its artifacts.
        uri: its address.
    """

    def __init__(self, serve: Callable[..., tuple[str, Fork]], directory: Path) -> None:
        self.directory, self.store = directory, directory / "artifacts"
        self._serve = serve
        self.uri, self._process = serve(directory, self.store)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def start_again(self) -> None:
        """At the same address, unless it runs."""
        if self._process.poll() is not None:
            port = int(self.uri.rpartition(":")[2])
            _, self._process = self._serve(self.directory, self.store, port)


@pytest.fixture(scope="session")
def _spare_server(
    serve: Callable[..., tuple[str, Fork]], tmp_path_factory: pytest.TempPathFactory
) -> SpareServer:
    return SpareServer(serve, tmp_path_factory.mktemp("spare"))


@pytest.fixture
def spare_server(_spare_server: SpareServer) -> SpareServer:
    _spare_server.start_again()  # if a test before has failed
    return _spare_server


@pytest.fixture(scope="session")
def wait_until_healthy() -> Callable[..., None]:
    """A function that waits for a server: its address, its process and its log, if any."""
    return _wait_until_healthy


def _wait_until_healthy(
    uri: str, process: subprocess.Popen | Fork, log: Path | None = None
) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    output = log.read_text()[-3000:] if log else ""
    pytest.fail(f"no MLflow server after {SECONDS_TO_START} s:\n{output}")


def _stop_group(process: Fork) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@pytest.fixture(scope="session")
def client(server: str) -> MlflowClient:
    return MlflowClient(server)


@pytest.fixture(scope="session")
def start(
    environment: dict[str, str], forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., subprocess.Popen | Fork]]:
    """Starts a command with its variables as keywords and its output as one text stream.

    The commands of `NAMES` are forked, and so are they and Python where forks start them; those
    with a path are not. Commands that a failed test leaves running are killed at the end.
    """
    running: list[subprocess.Popen] = []

    def start(*argv: object, **variables: str) -> subprocess.Popen | Fork:
        directory = tmp_path_factory.mktemp("cwd")
        if argv[0] in NAMES:
            return forks.start(*argv, variables=variables, directory=directory)
        process = subprocess.Popen(
            [str(word) for word in argv],
            cwd=directory,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.stdout is not None:
            process.stdout.close()
        if process.poll() is None:
            for child in (*psutil.Process(process.pid).children(recursive=True), process):
                child.kill()
            process.wait()


@pytest.fixture(scope="session")
def call(
    environment: dict[str, str], forks: Forks, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command to its end, forked as `start` says; its variables are given as keywords."""

    def call(*argv: object, **variables: str) -> subprocess.CompletedProcess:
        directory = tmp_path_factory.mktemp("cwd")
        if argv[0] in NAMES:
            return forks.call(
                *argv,
                variables=variables,
                directory=directory,
            )
        return subprocess.run(
            [str(word) for word in argv],
            cwd=directory,
            env={**environment, **variables},
            capture_output=True,
            text=True,
            timeout=SECONDS_FOR_A_COMMAND,
        )

    return call


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in BEIR's layout: docstrings of the standard library, first line -> the rest."""
    folder = tmp_path_factory.mktemp("collection")
    pairs = _docstrings()
    assert len(pairs) == PASSAGES
    (folder / "qrels").mkdir()
    passages, queries, qrels = [], [], {"train": [], "dev": []}
    for number, (name, question, text) in enumerate(pairs):
        if number % 20:  # every twentieth stays longer than encoders look
            text = " ".join(text.split()[:40])
        passages.append({"_id": f"p{number}", "title": name, "text": text})
        queries.append({"_id": f"q{number}", "text": question})
        qrels["dev" if number % 5 == 0 else "train"].append(f"q{number}\tp{number}\t1")
    for file, records in (("corpus", passages), ("queries", queries)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{file}.jsonl").write_text(lines)
    for split, lines in qrels.items():
        rows = "\n".join(["query-id\tcorpus-id\tscore", *lines])
        (folder / "qrels" / f"{split}.tsv").write_text(rows + "\n")
    return folder


def _docstrings() -> list[tuple[str, str, str]]:
    """Name, first paragraph and the rest of each docstring that has both, without repeats."""
    found: dict[str, tuple[str, str, str]] = {}
    for module in map(import_module, MODULES):
        for name, member in _documented(module):
            first, _, rest = inspect.cleandoc(member.__doc__).partition("\n\n")
            first, rest = " ".join(first.split()), " ".join(rest.split())
            if len(first.split()) >= 4 and len(rest.split()) >= 8:
                found.setdefault(first, (name, first, rest))
    return list(found.values())[:PASSAGES]


def _documented(module: ModuleType) -> Iterator[tuple[str, object]]:
    for name, member in sorted(vars(module).items()):
        if getattr(member, "__module__", None) != module.__name__ or not callable(member):
            continue
        if isinstance(member.__doc__, str):
            yield name, member
        for inner, method in sorted(vars(member).items()) if inspect.isclass(member) else ():
            if isinstance(getattr(method, "__doc__", None), str):
                yield f"{name}.{inner}", method


@pytest.fixture(scope="session")
def tiny_directory(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an untrained tiny encoder with the vocabulary of the collection."""
    import torch

    from mlflow_dr.encoder.backbone import tiny_encoder
    from mlflow_dr.encoder.config import EncoderConfig
    from mlflow_dr.encoder.saving import save_encoder

    lines = (collection / "corpus.jsonl").read_text().splitlines()
    directory = tmp_path_factory.mktemp("encoders") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = EncoderConfig("mean", normalize=True, passage_max_length=64)
        save_encoder(directory, tiny_encoder((json.loads(line)["text"] for line in lines), config))
    return directory


@pytest.fixture(scope="session")
def followed(
    server: str, client: MlflowClient, collection: Path, start: Callable, call: Callable
) -> SimpleNamespace:
    """A training run whose validator was there first: run_id, what both printed, exit codes."""
    run_id = client.create_run("0").info.run_id
    validator = start(
        *("mlflow-dr", "validate", "--run-id", run_id, "--poll-seconds", "0.2"),
        MLFLOW_TRACKING_URI=server,
    )
    try:
        first_line = validator.stdout.readline()
        flags = [str(word) for key, value in TRAINING.items() for word in (f"--{key}", value)]
        training = call(
            *("mlflow-dr", "train", "--dataset", collection, *flags),
            MLFLOW_TRACKING_URI=server,
            MLFLOW_RUN_ID=run_id,
        )
        printed, _ = validator.communicate(timeout=SECONDS_FOR_A_COMMAND)
    finally:
        validator.kill()
        validator.wait()
    return SimpleNamespace(
        run_id=run_id,
        training=training,
        validator_code=validator.returncode,
        validator_printed=first_line + printed,
    )


@pytest.fixture(scope="session")
def publish_noise(
    server: str,
    client: MlflowClient,
    collection: Path,
    tiny_directory: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., str]:
    """Publishes untrained encoders with different weights for each step; returns their run id."""

    def publish_noise(
        *steps: int,
        status: str = "FINISHED",
        client: MlflowClient = client,
        experiment: str = "0",
    ) -> str:
        from mlflow_dr.tracking.checkpoints import publish
        from mlflow_dr.tracking.runs import TrackedRun

        before = mlflow.get_tracking_uri()
        mlflow.set_tracking_uri(client.tracking_uri)
        try:
            run = TrackedRun(client, client.create_run(experiment))
            run.log_params({"dataset": collection, "validation_split": "dev"})
            for step in steps:
                directory = tmp_path_factory.mktemp("noise") / f"step-{step}"
                _save_noise(tiny_directory, directory, seed=step)
                publish(run, directory, step)
            if status != "RUNNING":
                run.finish(status)
        finally:
            mlflow.set_tracking_uri(before)
        return run.id

    return publish_noise


def _save_noise(source: Path, directory: Path, seed: int) -> None:
    import torch

    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.saving import save_encoder

    encoder = load_encoder(source)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    save_encoder(directory, encoder)


@pytest.fixture(scope="session")
def forked(
    forks: Forks, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Ended]:
    """Runs `mlflow-dr` in one or more processes at once; how each ended and what all printed.

    With `die`, a command sends itself a signal at a moment of `MOMENTS`. With `kill`, it is sent a
    signal some seconds after a line that it prints. Functions in `then` are called with the process
    id, once, after the first line with that beginning.
    """

    def forked(
        *argv: object,
        times: int = 1,
        die: tuple[str, signal.Signals] = NO_MOMENT,
        kill: tuple[str, float, signal.Signals] | None = None,
        then: Mapping[str, Callable[[int], None]] | None = None,
        **variables: str,
    ) -> Ended:
        if "MLFLOW_TRACKING_URI" not in variables:
            variables["MLFLOW_TRACKING_URI"] = request.getfixturevalue("server")
        started = forks.start_several(
            "mlflow-dr",
            *argv,
            variables=variables,
            directory=tmp_path_factory.mktemp("cwd"),
            die=die,
            times=times,
        )
        printed: list[str] = []
        left = dict(then or {})
        with started[0].stdout as lines:
            for line in lines:
                printed.append(line.rstrip())
                if kill is not None and line.startswith(kill[0]):
                    time.sleep(kill[1])
                    started[0].send_signal(kill[2])
                    kill = None
                for beginning in [text for text in left if line.startswith(text)]:
                    left.pop(beginning)(started[0].pid)
        return Ended([process.wait(SECONDS_FOR_A_COMMAND) for process in started], printed)

    return forked


@pytest.fixture(scope="session")
def points() -> Callable[[MlflowClient, str, str], Points]:
    """A validation's points of a run, timings too: metric without prefix -> step -> values.

    They are read from the run and from its checkpoints, and must be the same.
    """

    def points(client: MlflowClient, run_id: str, name: str) -> Points:
        on_run: Points = {}
        for key in client.get_run(run_id).data.metrics:
            if key.removeprefix("timing/").startswith(f"{name}/"):
                steps = on_run.setdefault(key.rpartition("/")[2], {})
                for point in client.get_metric_history(run_id, key):
                    steps.setdefault(point.step, []).append(point.value)
        on_models: Points = {}
        for model in models_of(client, run_id):
            for metric in client.get_logged_model(model.model_id).metrics or ():
                if metric.key.removeprefix("timing/").startswith(f"{name}/"):
                    steps = on_models.setdefault(metric.key.rpartition("/")[2], {})
                    steps.setdefault(metric.step, []).append(metric.value)
        assert on_run == on_models
        return on_run

    return points


@pytest.fixture(scope="session")
def checkpoints() -> Callable[[MlflowClient, str], dict[int, LoggedModel]]:
    """The checkpoints of a run by step."""

    def checkpoints(client: MlflowClient, run_id: str) -> dict[int, LoggedModel]:
        models = models_of(client, run_id)
        found = {int(m.tags["mlflow_dr.step"]): m for m in models if "mlflow_dr.step" in m.tags}
        return dict(sorted(found.items()))

    return checkpoints


def models_of(client: MlflowClient, run_id: str) -> list[LoggedModel]:
    experiment = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment], f"source_run_id = '{run_id}'"))
