import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mlflow_dr.tracking.server import ServerClock

HOUR = 3600


@pytest.fixture
def server_an_hour_ahead() -> Iterator[str]:
    """A server whose clock is an hour ahead of ours."""

    class Ahead(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + HOUR)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Ahead)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_clock_uses_the_servers_time(server_an_hour_ahead: str) -> None:
    ahead = ServerClock(server_an_hour_ahead).now_ms() / 1000 - time.time()
    assert ahead == pytest.approx(HOUR, abs=3)


def test_the_clock_works_with_a_user_in_the_uri(server_an_hour_ahead: str) -> None:
    uri = server_an_hour_ahead.replace("://", "://user:secret@")
    ahead = ServerClock(uri).now_ms() / 1000 - time.time()
    assert ahead == pytest.approx(HOUR, abs=3)


@pytest.mark.parametrize(
    "uri", ["sqlite:///mlflow.db", "http://127.0.0.1:9", "http://user:secret@127.0.0.1:port"]
)
def test_without_a_server_the_clock_is_local(uri: str) -> None:
    assert ServerClock(uri).now_ms() / 1000 == pytest.approx(time.time(), abs=1)
