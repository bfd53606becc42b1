import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from forks import Forks
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.claims import Claims, HeartbeatMonitor, Owner, latest_claim
from mlflow_dr.tracking.client import AT_ONCE
from mlflow_dr.tracking.runs import TrackedRun

ELSEWHERE = Owner("elsewhere", 7, "another boot", 1, "token")


@pytest.fixture
def published(run: TrackedRun, tmp_path: Path) -> TrackedRun:
    (tmp_path / "weights").write_text("1")
    publish(run, tmp_path, 5)
    return run


def only(run: TrackedRun) -> Checkpoint:
    (checkpoint,) = run_checkpoints(run)
    return checkpoint


def test_one_of_eight_simultaneous_claims_wins(published: TrackedRun) -> None:
    """Each validator has seen the checkpoint without a claim."""
    checkpoint = only(published)
    claims = [Claims(published.client, replace(ELSEWHERE, token=str(n))) for n in range(8)]
    start = threading.Barrier(8)
    won: list[str] = []

    def race(claimant: Claims) -> None:
        start.wait()
        if claimant.claim(checkpoint, "val"):
            won.append(claimant.owner.token)

    threads = [threading.Thread(target=race, args=(claimant,)) for claimant in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (token,) = won
    claim = latest_claim(only(published), "val")
    assert claim is not None
    assert (claim.attempt, claim.given_back) == (1, False)
    assert claim.owner == replace(ELSEWHERE, token=token)


def test_giving_back_does_not_wait_long_for_a_server_that_drops_packets(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Giving back makes one request for all validations of a checkpoint and does not retry."""
    monkeypatch.setitem(AT_ONCE, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    claims, checkpoint = Claims(published.client), only(published)
    for name in ("val", "test"):
        assert claims.claim(checkpoint, name)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        claims._client = MlflowClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        claims.drop(checkpoint, "val", "test", finished=False)
        assert time.monotonic() - start < 30
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert "was not renewed" in caplog.text
    claims.close()


def test_a_claim_whose_answer_was_lost_is_still_ours(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = published.client._tracking_client.log_model_params

    def lost(model_id: str, params: dict[str, str]) -> None:
        real(model_id, params)
        raise MlflowException("connection reset")

    monkeypatch.setattr(published.client._tracking_client, "log_model_params", lost)
    assert Claims(published.client).claim(only(published), "val")


def test_validations_are_claimed_apart(published: TrackedRun) -> None:
    checkpoint = only(published)
    assert Claims(published.client, ELSEWHERE).claim(checkpoint, "val")
    assert Claims(published.client).claim(checkpoint, "test")
    assert latest_claim(only(published), "val").owner == ELSEWHERE
    assert latest_claim(only(published), "other") is None


def beats(published: TrackedRun) -> int:
    """How often the claim was renewed."""
    return int(latest_claim(only(published), "val").beat.rpartition(": ")[2] or 0)


def test_a_heartbeat_is_renewed_until_the_work_is_finished(published: TrackedRun) -> None:
    claims = Claims(published.client, every=0.02)
    checkpoint = only(published)
    assert claims.claim(checkpoint, "val")
    deadline = time.monotonic() + 120
    while beats(published) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    claims.drop(checkpoint, "val", finished=True)
    claims.close()
    assert beats(published) >= 2
    assert not latest_claim(only(published), "val").given_back


def test_a_renewal_that_fails_is_tried_again(
    published: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = published.client.set_logged_model_tags, [1, 2]

    def unreliable(model_id: str, tags: dict[str, str]) -> None:
        if failures:
            failures.pop()
            raise MlflowException("no route to host")
        real(model_id, tags)

    monkeypatch.setattr(published.client, "set_logged_model_tags", unreliable)
    claims = Claims(published.client, every=0.02)
    assert claims.claim(only(published), "val")
    deadline = time.monotonic() + 120
    while not latest_claim(only(published), "val").beat and time.monotonic() < deadline:
        time.sleep(0.02)
    claims.close()
    assert "was not renewed: MlflowException: no route to host" in caplog.text
    assert latest_claim(only(published), "val").given_back


@pytest.mark.parametrize("finished", [False, True])
def test_unfinished_work_is_given_back(published: TrackedRun, finished: bool) -> None:
    claims = Claims(published.client, ELSEWHERE)
    assert claims.claim(only(published), "val")
    claims.drop(only(published), "val", finished=finished)
    checkpoint = only(published)
    assert latest_claim(checkpoint, "val").given_back is not finished
    assert HeartbeatMonitor(patience=60).is_free(checkpoint, "val") is not finished
    if not finished:
        assert Claims(published.client).claim(checkpoint, "val")
        again = only(published)
        assert latest_claim(again, "val").attempt == 2
        assert not latest_claim(again, "val").given_back


def test_a_claim_is_free_when_its_heartbeat_has_stood_still(
    published: TrackedRun, client: MlflowClient
) -> None:
    """By our own clock, of which only time between two looks counts."""
    now = 0.0
    watchman = HeartbeatMonitor(patience=60, longest_gap=10, clock=lambda: now)
    assert Claims(client, ELSEWHERE).claim(only(published), "val")

    def free_after(seconds: float, beat: str | None = None) -> bool:
        nonlocal now
        now += seconds
        if beat:
            tags = {"mlflow_dr.validation.val.heartbeat": beat}
            client.set_logged_model_tags(only(published).model_id, tags)
        return watchman.is_free(only(published), "val")

    assert not free_after(1000)
    assert not any(free_after(10) for _ in range(5))
    assert not free_after(10, beat="1: 1")
    assert not free_after(3600)  # nobody could look, so it counts for 10 s
    assert not any(free_after(10) for _ in range(4))
    assert free_after(10)


def test_the_owner_is_known_to_be_gone_on_its_own_machine_only(
    forks: Forks, tmp_path: Path
) -> None:
    me = Owner.me()
    assert not me.is_dead
    assert replace(me, started=me.started + 1).is_dead  # the id was given to another process
    assert not replace(me, started=me.started + 1, room="another boot").is_dead
    code = (
        "import json; from mlflow_dr.tracking.claims import Owner; "
        "print(json.dumps(vars(Owner.me())))"
    )
    ended = forks.call("python", "-c", code, variables={}, directory=tmp_path)
    owner = Owner.parse(ended.stdout)
    assert owner is not None
    assert owner.is_dead


@pytest.mark.parametrize("value", ["", "{}", "[]", "null", '{"host": 1}'])
def test_a_malformed_claim_has_no_owner(value: str) -> None:
    assert Owner.parse(value) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "7",
        "{",
        "[" * 5000,
        '{"host": 1, "pid": 1, "room": "", "started": 1, "token": 1}',
    ],
    ids=lambda text: text[:20],
)
def test_a_malformed_owner_is_ignored(text: str) -> None:
    assert Owner.parse(text) is None


def test_a_claim_without_a_valid_number_is_ignored(run: TrackedRun, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    model_id = publish(run, tmp_path, 1)
    keys = {
        f"mlflow_dr.validation.val.claim.{number}": "{}" for number in ("²", "0", "-1", "9" * 4900)
    }
    for key, value in keys.items():
        if len(key) < 250:
            run.client.log_model_params(model_id, {key: value})
    (checkpoint,) = run_checkpoints(run)
    assert latest_claim(checkpoint, "val") is None
