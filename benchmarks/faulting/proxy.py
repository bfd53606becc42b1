"""An HTTP proxy that disturbs some of the answers of a tracking server, by a seeded choice."""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

STATUSES = (500, 502, 503, 429)
LOGIN_PAGE = b"<!DOCTYPE html><html><body><form>Please log in to continue.</form></body></html>\n"
ARTIFACTS = "/mlflow-artifacts/artifacts/"
NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Fault(Enum):
    """What happens to a request."""

    CUT = "the connection is closed in the middle of the answer"
    DELAYED = "the answer comes after the client's time-out"
    REQUEST_LOST = "the connection is closed before the server has the request"
    ANSWER_LOST = "the connection is closed after the server has the request"
    STATUS = "status 500, 502, 503 or 429, with or without the server having the request"
    LOGIN = "a login page with status 200, and the server does not have the request"
    TRUNCATED = "status 200 and half of the answer, whose length seems right"
    EMPTY = "status 200 and nothing else, with or without the server having the request"
    FLIPPED = "one byte of an artifact is changed"


class Answer(NamedTuple):
    """An answer of the server."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Proxy:
    """Passes requests on to a server on loopback, and disturbs some of them.

    Args:
        uri: the server.
        rate: share of the requests that are disturbed, from 0 to 1.
        faults: the kinds of faults, which occur equally often.
        seed: random seed.
        delay: seconds by which an answer is late.

    Attributes:
        requests: number of requests.
        faults: number of faults of each kind.
    """

    def __init__(
        self,
        uri: str,
        rate: float,
        faults: Collection[Fault] = tuple(Fault),
        seed: int = 0,
        delay: float = 3.0,
    ) -> None:
        self.requests = 0
        self.faults: Counter[Fault] = Counter()
        self.delay = delay
        self.upstream = urlsplit(uri).netloc
        self._rate = rate
        self._kinds = sorted(faults, key=lambda fault: fault.name)
        self._left: list[Fault] = []
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    def draw(self, is_file: bool) -> tuple[Fault | None, float]:
        """The fault of the next request, and its position in the answer, from 0 to 1."""
        with self._lock:
            self.requests += 1
            if self._chance.random() >= self._rate:
                return None, 0.0
            fault = self._next(is_file)
            if fault is None:
                return None, 0.0
            self.faults[fault] += 1
            return fault, self._chance.random()

    def _next(self, is_file: bool) -> Fault | None:
        """The next possible kind; all kinds come in random order before one is repeated."""
        fits = [kind for kind in self._left if is_file or kind is not Fault.FLIPPED]
        if not fits:
            self._left += self._chance.sample(self._kinds, len(self._kinds))
            fits = [kind for kind in self._left if is_file or kind is not Fault.FLIPPED]
        if fits:
            self._left.remove(fits[0])
        return fits[0] if fits else None

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that have closed the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are counted, not printed."""

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _pass_on(self) -> None:
        body = self._body()
        proxy = self.server.proxy
        fault, position = proxy.draw(self.command == "GET" and ARTIFACTS in self.path)
        if fault is Fault.REQUEST_LOST:
            self._hang_up()
            return
        if fault is Fault.LOGIN:
            self._send(Answer(200, [("Content-Type", "text/html")], LOGIN_PAGE))
            return
        if fault in (Fault.STATUS, Fault.EMPTY):
            if position < 0.5:
                self._ask(body)
            status = STATUSES[int(position * 1000) % len(STATUSES)]
            reply = {Fault.STATUS: (status, b"<h1>Error</h1>"), Fault.EMPTY: (200, b"")}[fault]
            self._send(Answer(reply[0], [("Content-Type", "text/html")], reply[1]))
            return
        try:
            answer = self._ask(body)
        except OSError:
            self._hang_up()
            return
        half = int(position * len(answer.body))
        if fault is Fault.ANSWER_LOST:
            self._hang_up()
        elif fault is Fault.CUT:
            self._send(answer, upto=half)
        elif fault is Fault.TRUNCATED:
            self._send(answer._replace(body=answer.body[: max(1, half)]))
        elif fault is Fault.FLIPPED and answer.body:
            flipped = bytearray(answer.body)
            flipped[half] ^= 1
            self._send(answer._replace(body=bytes(flipped)))
        else:
            if fault is Fault.DELAYED:
                time.sleep(proxy.delay)
            self._send(answer)

    def _body(self) -> bytes:
        """The whole body of the request."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _ask(self, body: bytes) -> Answer:
        """Forward the request and return the answer."""
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in NOT_FORWARDED
        }
        connection = http.client.HTTPConnection(self.server.proxy.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in NOT_FORWARDED
            ]
            return Answer(answer.status, kept, answer.read())
        except http.client.HTTPException as error:  # the server was killed
            raise OSError(str(error)) from error
        finally:
            connection.close()

    def _send(self, answer: Answer, upto: int | None = None) -> None:
        """Send the answer; with `upto`, send only that many bytes of the body."""
        with suppress(OSError):  # a client that did not wait
            self.send_response_only(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[:upto])
            self.wfile.flush()
        if upto is not None:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
