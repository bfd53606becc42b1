"""A validator that is killed, or asked to stop, and started again."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.runs import TrackedRun

QUALITY = ("mrr_at_10", "ndcg_at_10", "recall_at_100")
STEPS = [0, 3, 6, 9]
INTERRUPTED = 130


Forked = Callable[..., SimpleNamespace]


def test_a_validator_killed_at_any_moment_and_restarted_ends_as_if_undisturbed(
    forked: Forked,
    publish_noise: Callable[..., str],
    points: Callable,
    checkpoints: Callable,
    client: MlflowClient,
) -> None:
    run_id = publish_noise(*STEPS)
    again = ["validate", "--run-id", run_id]

    def recorded() -> list[int]:
        key = "mlflow_dr.validation.val"
        return [step for step, model in checkpoints(client, run_id).items() if key in model.params]

    def measured() -> list[int]:
        return sorted(points(client, run_id, "val").get("mrr_at_10", ()))

    for moment, then_recorded, then_measured in (
        ("before-claiming", [], []),
        ("after-claiming", [], []),
        ("loading", [], []),
        ("encoding", [], []),
        ("before-recording", [], []),
        ("after-recording", [0], []),
        ("before-metrics", [0], []),
        ("after-metrics", [0], [0]),
        ("before-metrics", [0, 3], [0]),
        ("after-metrics", [0, 3], [0, 3]),
    ):
        ended = forked(*again, die=(moment, signal.SIGKILL))
        assert ended.code == -signal.SIGKILL, ended.printed
        assert (recorded(), measured()) == (then_recorded, then_measured), moment

    ended = forked(*again, kill=("step 6: ", 0.3, signal.SIGKILL))
    assert ended.code in (-signal.SIGKILL, 0)  # at whatever moment that was

    for name in ("val", "calm"):
        ended = forked(*again, "--name", name)
        assert ended.code == 0, ended.printed
    disturbed, calm = points(client, run_id, "val"), points(client, run_id, "calm")
    assert disturbed.keys() == calm.keys()
    for metric, by_step in disturbed.items():
        assert sorted(by_step) == STEPS, metric
        assert all(len(values) == 1 for values in by_step.values()), metric
    for metric in QUALITY:
        assert disturbed[metric] == calm[metric]
    assert len({value for (value,) in calm["ndcg_at_10"].values()}) == len(STEPS)


def test_writing_recorded_figures_again_adds_no_point(
    publish_noise: Callable[..., str], points: Callable, server: str, client: MlflowClient
) -> None:
    from mlflow_dr.tracking.checkpoints import run_checkpoints
    from mlflow_dr.tracking.results import record_result, write_recorded
    from mlflow_dr.tracking.runs import TrackedRun

    run = TrackedRun(client, client.get_run(publish_noise(4)))
    (checkpoint,) = run_checkpoints(run)
    first = record_result(run, checkpoint, "val", {"mrr_at_10": 0.25}, ("sea", "0123"))
    before = points(client, run.id, "val")
    time.sleep(0.01)
    # another validator that had validated the same checkpoint at the same time, and was slower
    second = record_result(run, checkpoint, "val", {"mrr_at_10": 0.75}, ("sea", "0123"))
    write_recorded(run, run_checkpoints(run)[0], "val", ("sea", "0123"))
    assert first == second
    assert (
        points(client, run.id, "val")
        == before
        == {
            "mrr_at_10": {4: [0.25]},
            "lag_seconds": {4: [first["lag_seconds"]]},
        }
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["loading", "encoding"])
def test_a_validator_stopped_during_a_checkpoint_leaves_nothing_behind(
    moment: str,
    number: signal.Signals,
    forked: Forked,
    publish_noise: Callable[..., str],
    points: Callable,
    environment: dict[str, str],
    client: MlflowClient,
) -> None:
    run_id = publish_noise(1)
    before = set(Path(environment["TMPDIR"]).iterdir())
    ended = forked("validate", "--run-id", run_id, die=(moment, number))
    assert ended.code == INTERRUPTED
    assert ended.printed[-1] == "stopped"
    assert not any("Traceback" in line for line in ended.printed)
    assert set(Path(environment["TMPDIR"]).iterdir()) == before
    assert points(client, run_id, "val") == {}
    (checkpoint,) = run_checkpoints(TrackedRun(client, client.get_run(run_id)))
    assert latest_claim(checkpoint, "val").given_back


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_validator_stopped_while_waiting_ends_at_once(
    number: signal.Signals,
    forked: Forked,
    publish_noise: Callable[..., str],
    client: MlflowClient,
) -> None:
    run_id = publish_noise(1, status="RUNNING")
    argv = ["validate", "--run-id", run_id, "--poll-seconds", "1000"]
    begun = time.monotonic()
    ended = forked(*argv, kill=("step 1: ", 0.3, number))
    assert time.monotonic() - begun < 600
    assert ended.code == INTERRUPTED
    assert ended.printed[-3].startswith("step 1: ")
    assert ended.printed[-2:] == ["", "stopped"]  # click ends the terminal's line of ^C
    assert client.get_run(run_id).info.status == "RUNNING"
    client.set_terminated(run_id)


def test_a_checkpoint_that_takes_too_long_is_left_for_the_next(
    forked: Forked,
    publish_noise: Callable[..., str],
    points: Callable,
    checkpoints: Callable,
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    """The signal is that of the timer, and comes in the middle of encoding."""
    steps = [1, 2, 3]
    run_id = publish_noise(*steps)
    file = tmp_path / "validate.yaml"
    file.write_text("max_seconds: 1000\n")
    again = ["validate", "--run-id", run_id, "--config", file]
    ended = forked(*again, die=("encoding", signal.SIGALRM))
    assert ended.code == 1, ended.printed
    reason = "it took longer than 1000 s (--max-seconds)"
    assert (
        f"warning: step 1 is stopped and recorded as failed: {reason}; "
        "--retry-failed tries it again"
    ) in ended.printed
    assert sorted(points(client, run_id, "val")["mrr_at_10"]) == [2, 3]
    tag = "mlflow_dr.validation.val.failed"
    assert checkpoints(client, run_id)[1].tags[tag] == reason

    assert forked("validate", "--run-id", run_id).code == 1  # nobody tries it unasked
    assert sorted(points(client, run_id, "val")["mrr_at_10"]) == [2, 3]
    ended = forked("validate", "--run-id", run_id, "--max-seconds", 1000, "--retry-failed")
    assert ended.code == 0, ended.printed
    for metric, by_step in points(client, run_id, "val").items():
        assert {step: len(values) for step, values in by_step.items()} == dict.fromkeys(steps, 1), (
            metric
        )
