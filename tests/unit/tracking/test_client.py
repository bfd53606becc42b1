import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED

from mlflow_dr.errors import ForbiddenError, TrackingError
from mlflow_dr.tracking.client import connect, server_responds, tracking_errors, tracking_uri
from mlflow_dr.tracking.runs import TrackedRun


@pytest.fixture(autouse=True)
def _uri_restored() -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    yield
    mlflow.set_tracking_uri(before)


def test_a_missing_server_is_reported_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(TrackingError, match=rf"127.0.0.1:{port} does not answer"):
        connect(f"http://127.0.0.1:{port}")
    assert time.monotonic() - start < 60


def test_a_password_in_the_uri_is_not_shown() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(TrackingError) as caught:
        connect(f"http://user:secret@127.0.0.1:{port}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://s3cretTOKEN@127.0.0.1:9",
        "http://127.0.0.1:9/?token=s3cretTOKEN",
        "http://127.0.0.1:9/?t=s3cretTOKEN",
        "postgresql+nosuch://user:s3cretTOKEN@host/db",
        "mysql+pymysql://user:s3cretTOKEN@host/db",
    ],
)
def test_no_secret_of_the_uri_is_shown(uri: str) -> None:
    with pytest.raises(TrackingError) as caught:
        connect(uri)
    assert "s3cretTOKEN" not in str(caught.value)
    assert "***" in str(caught.value)


def test_a_database_without_its_driver_names_what_to_install() -> None:
    with pytest.raises(TrackingError, match=r"'pymysql', which is not installed: pip install"):
        connect("mysql+pymysql://user@host/db")


def test_reading_does_not_create_a_database(tmp_path: Path) -> None:
    for path in (tmp_path / "mlflow.db", tmp_path / "nodir" / "x.db"):
        with pytest.raises(TrackingError, match=f"there is no tracking store .*{path}"):
            connect(f"sqlite:///{path}", may_create=False)
    assert not list(tmp_path.iterdir())
    connect(f"sqlite:///{tmp_path}/mlflow.db")
    connect(f"sqlite:///{tmp_path}/mlflow.db", may_create=False)


def test_a_store_that_cannot_be_opened_is_one_line() -> None:
    with pytest.raises(TrackingError, match="tracking store") as caught:
        connect("sqlite:////dev/null/mlflow.db")
    assert "\n" not in str(caught.value)


def test_an_unknown_scheme_is_one_line() -> None:
    with pytest.raises(TrackingError) as caught:
        connect("gopher://x")
    assert "\n" not in str(caught.value)
    assert tracking_uri() == "gopher://x"


def test_a_missing_permission_is_a_separate_error() -> None:
    doing = tracking_errors("publishing")
    with (
        pytest.raises(ForbiddenError, match=r"publishing: user .* is not allowed to do that"),
        doing,
    ):
        raise MlflowException("no", PERMISSION_DENIED)
    with pytest.raises(TrackingError) as caught, tracking_errors("publishing"):
        raise MlflowException("out of connections", INTERNAL_ERROR)
    assert not isinstance(caught.value, ForbiddenError)


@pytest.fixture
def server_with_answers() -> Iterator[Callable[[list[bytes]], str]]:
    """A server that sends these bytes, one answer after the other, and closes each connection."""
    servers: list[HTTPServer] = []

    def serve(server_responds: list[bytes]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.wfile.write(
                    server_responds.pop(0) if len(server_responds) > 1 else server_responds[0]
                )

            do_GET = do_PATCH = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


PAGE = b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Please log in.</html>"
LATER = b"HTTP/1.0 503 Service Unavailable\r\n\r\n<h1>Later</h1>"
NOTHING_THERE = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{}"


def test_a_failed_first_request_is_repeated(
    server_with_answers: Callable[[list[bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.tracking.client.SECONDS_TO_CONNECT", 60.0)
    client = connect(server_with_answers([PAGE, b"", LATER, NOTHING_THERE]))
    assert server_responds(client)


def test_a_server_that_is_not_mlflow_is_one_line(
    server_with_answers: Callable[[list[bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.tracking.client.SECONDS_TO_CONNECT", 0.2)
    uri = server_with_answers([PAGE])
    with pytest.raises(TrackingError, match=f"tracking server {uri} does not answer") as caught:
        connect(uri)
    assert "\n" not in str(caught.value)


def test_an_empty_answer_is_refused_as_run_model_and_location(
    server_with_answers: Callable[[list[bytes]], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = connect(server_with_answers([NOTHING_THERE, b"HTTP/1.0 200 OK\r\n\r\n"]))
    (tmp_path / "file").write_text("1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_id, model_id = "a" * 32, "m-" + "a" * 32
    for act in (
        partial(client.create_run, "0"),
        partial(client.get_run, run_id),
        partial(client.log_artifact, run_id, str(tmp_path / "file")),
        partial(client.create_logged_model, "0"),
        partial(client.get_logged_model, model_id),
        partial(client.log_model_artifacts, model_id, str(tmp_path)),
        partial(client.finalize_logged_model, model_id, LoggedModelStatus.READY),
    ):
        with pytest.raises(TrackingError, match="not about what was asked"), tracking_errors("it"):
            act()
    assert not any(Path.cwd().iterdir())


def test_a_late_first_answer_is_requested_again(
    server_with_answers: Callable[[list[bytes]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow_dr.tracking.client.SECONDS_TO_CONNECT", 0.0)
    assert server_responds(connect(server_with_answers([b"", NOTHING_THERE])))


CUT = b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"
HALF = b'HTTP/1.0 200 OK\r\n\r\n{"run": {'
REFUSED = (
    b"HTTP/1.0 404 Not Found\r\nContent-Type: application/json\r\n\r\n"
    b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}'
)


def run_answer(run_id: str) -> bytes:
    run = {"run": {"info": {"run_id": run_id, "experiment_id": "0", "status": "RUNNING"}}}
    return b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(run).encode()


@pytest.mark.parametrize("broken", [CUT, HALF, PAGE, NOTHING_THERE])
def test_a_request_whose_answer_breaks_off_or_makes_no_sense_is_repeated(
    broken: bytes, server_with_answers: Callable[[list[bytes]], str]
) -> None:
    run_id = "a" * 32
    client = connect(server_with_answers([NOTHING_THERE, broken, broken, run_answer(run_id)]))
    run = TrackedRun(client, client.get_run(run_id))
    assert run.fetch().info.run_id == run_id


@pytest.mark.parametrize("answers", [[PAGE, PAGE, NOTHING_THERE], [CUT, NOTHING_THERE]])
def test_a_tag_is_set_again_after_a_broken_answer(
    answers: list[bytes], server_with_answers: Callable[[list[bytes]], str]
) -> None:
    left = [NOTHING_THERE, *answers]
    connect(server_with_answers(left)).set_tag("a" * 32, "key", "value")
    assert left == [NOTHING_THERE]


def test_a_refusal_is_not_repeated(server_with_answers: Callable[[list[bytes]], str]) -> None:
    left = [NOTHING_THERE, REFUSED, run_answer("a" * 32)]
    client = connect(server_with_answers(left))
    with pytest.raises(MlflowException, match="no such run"):
        client.get_run("a" * 32)
    assert len(left) == 1
    assert client.get_run("a" * 32)


def test_a_request_that_makes_something_new_is_not_repeated(
    server_with_answers: Callable[[list[bytes]], str],
) -> None:
    left = [NOTHING_THERE, PAGE, run_answer("a" * 32), run_answer("b" * 32)]
    client = connect(server_with_answers(left))
    with pytest.raises(MlflowException):
        client.create_run("0")
    assert len(left) == 2
