"""A Hugging Face hub on this machine, for the hub's own libraries (`HF_ENDPOINT`)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

Content = bytes | str | Sequence[Mapping[str, Any]]


class HubEndpoint:
    """Serves repositories by the requests that `huggingface_hub` makes, and takes uploads.

    Attributes:
        url: where it is.
        requested: `owner/name/path` of each file that was downloaded.
        token: what an upload must come with; None takes all.
        private: repositories that were made private.
        commits: the messages of all commits.
    """

    def __init__(self) -> None:
        self.token: str | None = None
        self.private: list[str] = []
        self.commits: list[str] = []
        self._repositories: dict[tuple[str, str], tuple[str, dict[str, bytes]]] = {}
        self.requested: list[str] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint._answer(self)

            def do_HEAD(self) -> None:
                endpoint._answer(self)

            def do_POST(self) -> None:
                endpoint._take(self)

            def log_message(self, *_: Any) -> None:
                """Nothing is printed."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, repo: str, files: Mapping[str, Content], revision: str = "main") -> str:
        """Make a repository of these files; returns its commit.

        Rows become Parquet, JSON lines or a table with tabs, as the path says.
        """
        contents = {path: _bytes(path, content) for path, content in files.items()}
        commit = hashlib.sha1(repr(sorted(contents.items())).encode()).hexdigest()
        for name in (revision, commit):
            self._repositories[repo, name] = commit, contents
        return commit

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository."""
        return self._repositories[repo, "main"][1]

    def _take(self, request: BaseHTTPRequestHandler) -> None:
        """Answer the requests of an upload."""
        lines = request.rfile.read(int(request.headers["Content-Length"])).splitlines()
        body: Any = [json.loads(line) for line in lines]
        path = urlsplit(request.path).path.strip("/").split("/")
        if self.token is not None and request.headers["Authorization"] != f"Bearer {self.token}":
            _send(request, 401, {"error": "Invalid username or password."})
        elif path == ["api", "repos", "create"]:
            repo = f"{body[0]['organization']}/{body[0]['name']}"
            is_new = (repo, "main") not in self._repositories
            if is_new:
                self.put(repo, {})
                self.private += [repo] if body[0].get("visibility") == "private" else []
            _send(request, 200 if is_new else 409, {"url": f"{self.url}/{repo}"})
        elif path == ["api", "validate-yaml"]:
            _send(request, 200, {"errors": [], "warnings": []})
        elif path[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in body[0]["files"]
            ]
            _send(request, 200, {"files": files})
        else:
            repo = "/".join(path[2:4])
            values = [line["value"] for line in body if line["key"] == "file"]
            added = {value["path"]: base64.b64decode(value["content"]) for value in values}
            commit = self.put(repo, {**self.files(repo), **added})
            self.commits.append(body[0]["value"]["summary"])
            address = f"{self.url}/{repo}/commit/{commit}"
            _send(request, 200, {"commitUrl": address, "commitOid": commit})

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        headers: dict[str, str] = {}
        is_model = parts[0] not in ("api", "datasets")
        if parts[:2] == ["api", "datasets"]:
            repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            found = self._repositories.get((repo, revision))
            body = json.dumps(_listing(parts, *found) if found else {}).encode()
        else:
            parts = ["models"] * is_model + parts
            parts += [""] * (5 - len(parts))
            repo, revision, path = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
            found = self._repositories.get((repo, revision))
            if found and path not in found[1]:
                found = None
            body = found[1][path] if found else b""
            if found:
                headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": found[0]}
                if request.command == "GET":
                    self.requested.append(f"{repo}/{path}")
        if not found:
            is_known = any(repo == known for known, _ in self._repositories)
            missing = "EntryNotFound" if is_model else "RevisionNotFound"
            headers = {"X-Error-Code": missing if is_known else "RepoNotFound"}
        request.send_response(200 if found else 404)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def _send(request: BaseHTTPRequestHandler, status: int, values: Mapping[str, Any]) -> None:
    body = json.dumps(values).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _listing(parts: Sequence[str], commit: str, contents: Mapping[str, bytes]) -> Any:
    """The answer to a request for a repository, or for the tree of its files."""
    if len(parts) > 4 and parts[4] == "tree":
        return [
            {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for path, body in contents.items()
        ]
    siblings = [{"rfilename": path} for path in contents]
    return {"id": "/".join(parts[2:4]), "sha": commit, "siblings": siblings}


def _bytes(path: str, content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    if isinstance(content, str):
        return content.encode()
    if path.endswith(".parquet"):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in content]), buffer)
        return buffer.getvalue()
    if path.endswith(".tsv"):
        names = list(content[0])
        lines = [names, *([str(row[name]) for name in names] for row in content)]
        return "".join("\t".join(line) + "\n" for line in lines).encode()
    lines_of_json = "".join(json.dumps(row) + "\n" for row in content).encode()
    return gzip.compress(lines_of_json) if path.endswith(".gz") else lines_of_json
