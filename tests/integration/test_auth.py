"""A tracking server that asks for names and passwords."""

import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from werkzeug.security import generate_password_hash

Call = Callable[..., subprocess.CompletedProcess]
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "of all runs here"}
EDITOR = {"MLFLOW_TRACKING_USERNAME": "editor", "MLFLOW_TRACKING_PASSWORD": "editor of runs"}
READER = {"MLFLOW_TRACKING_USERNAME": "reader", "MLFLOW_TRACKING_PASSWORD": "reader of runs"}


class GuardedServer(NamedTuple):
    """The server's address, and a run of the administrator's with one checkpoint."""

    uri: str
    run_id: str
    unvalidated: str


@pytest.fixture(scope="module")
def guarded_server(
    serve: Callable, publish_noise: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> GuardedServer:
    pytest.importorskip("flask_wtf")
    directory = tmp_path_factory.mktemp("guarded")
    uri, _ = serve(directory, directory / "artifacts", None, "--app-name", "basic-auth")
    before = mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ADMIN.items():
            patched.setenv(name, value)
        mlflow.set_tracking_uri(uri)
        try:
            for user in (READER, EDITOR):
                name, password = user.values()
                _post(f"{uri}/api/2.0/mlflow/users/create", username=name, password=password)
            _post(
                f"{uri}/api/3.0/mlflow/users/permissions/grant",
                **{"username": "editor", "resource_type": "experiment", "resource_id": "0"},
                permission="EDIT",
            )
            _hash_quickly(directory / "basic_auth.db")
            run_ids = [publish_noise(1, client=MlflowClient(uri)) for _ in range(2)]
        finally:
            mlflow.set_tracking_uri(before)
    return GuardedServer(uri, *run_ids)


def _hash_quickly(database: Path) -> None:
    """The server checks the password at each request, and its own hashes take 50 ms each."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for user in (ADMIN, READER, EDITOR):
            name, password = user.values()
            hashed = generate_password_hash(password, "pbkdf2:sha256:1")
            changed = connection.execute(
                "UPDATE users SET password_hash = ? WHERE username = ?", (hashed, name)
            )
            assert changed.rowcount == 1


def _post(address: str, **values: str) -> None:
    requests.post(address, json=values, auth=tuple(ADMIN.values()), timeout=600).raise_for_status()


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ({}, "the tracking server requires a user and a password; set MLFLOW_TRACKING_USERNAME"),
        ({**READER, "MLFLOW_TRACKING_PASSWORD": "wrong"}, "does not know user 'reader'"),
        (
            READER,
            "user 'reader' is not allowed to do that: publishing and validating need the "
            "permission EDIT",
        ),
    ],
    ids=["nobody", "wrong password", "too few rights"],
)
def test_a_user_without_edit_permission_gets_the_reason(
    call: Call, guarded_server: GuardedServer, user: dict[str, str], says: str
) -> None:
    ended = call(
        *("mlflow-dr", "validate", "--run-id", guarded_server.run_id, "--once"),
        MLFLOW_TRACKING_URI=guarded_server.uri,
        **user,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last


def test_mlflows_own_variables_are_enough(call: Call, guarded_server: GuardedServer) -> None:
    argv: list[Any] = ["mlflow-dr", "validate", "--run-id", guarded_server.run_id]
    ended = call(*argv, MLFLOW_TRACKING_URI=guarded_server.uri, **ADMIN)
    assert ended.returncode == 0, ended.stderr
    assert "step 1: mrr_at_10" in ended.stderr


def test_a_user_without_delete_permission_gets_the_reason_and_changes_nothing(
    call: Call, guarded_server: GuardedServer
) -> None:
    argv: list[Any] = ["mlflow-dr", "prune", "--run-id", guarded_server.unvalidated]
    argv += ["--keep", "every:2", "--unvalidated"]
    ended = call(*argv, MLFLOW_TRACKING_URI=guarded_server.uri, **EDITOR)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: deleting the files of step 1")
    assert "user 'editor' is not allowed to do that" in line
    assert "deleting files MANAGE" in line
    ended = call(*argv, MLFLOW_TRACKING_URI=guarded_server.uri, **ADMIN)
    assert ended.stdout.splitlines()[0].endswith("delete: no rule of every:2 keeps it")
    assert " 0 files" not in ended.stdout
