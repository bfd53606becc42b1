"""Somebody else's process against a real server: what it leaves, and what it is asked."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import StopWatcher, request_stop

LOOP = """
import sys
import mlflow
from mlflow_dr import load_encoder, publish_checkpoint

model = load_encoder(sys.argv[1])
mlflow.start_run(run_id=sys.argv[2])
for step in range(4):
    publish_checkpoint(model, step, wait=False)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit('out of memory')"])
def test_submitted_checkpoints_are_published_before_the_process_ends(
    end: str,
    server: str,
    client: MlflowClient,
    call: Callable,
    tiny_directory: Path,
    tmp_path: Path,
    checkpoints: Callable,
) -> None:
    script = tmp_path / "loop.py"
    script.write_text(LOOP.format(end=end))
    run_id = client.create_run("0").info.run_id
    done = call("python", script, tiny_directory, run_id, MLFLOW_TRACKING_URI=server)
    assert done.returncode == (1 if end else 0), done.stderr
    assert "Traceback" not in done.stderr
    found = checkpoints(client, run_id)
    assert list(found) == [0, 1, 2, 3]
    assert {model.status.name for model in found.values()} == {"READY"}
    # MLflow ends its active run when Python ends; validators leave then
    info = client.get_run(run_id).info
    assert max(model.last_updated_timestamp for model in found.values()) <= info.end_time


def test_the_watcher_outlives_its_server(
    spare_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    client = MlflowClient(spare_server.uri)
    run = TrackedRun(client, client.create_run("0"))
    asked: list[str] = []
    watcher = StopWatcher(run, asked.append, seconds=0.1)
    try:
        spare_server.kill()
        time.sleep(1)
        assert watcher._thread.is_alive()
        spare_server.start_again()
        assert asked == []
        request_stop(run, "the curve is flat")
        deadline = time.monotonic() + 120
        while not asked and time.monotonic() < deadline:
            time.sleep(0.05)
        assert asked == ["the curve is flat"]
    finally:
        watcher.close()
        mlflow.set_tracking_uri(before)
