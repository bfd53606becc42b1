"""Trouble of a validator's own: what it does then, and what becomes of the checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import MissingExtraError, UnavailableError
from mlflow_dr.tracking import fetching
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.claims import latest_claim
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import State, failure_reason, validation_state
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import Metric, metric_points
from mlflow_dr.validation import encoders
from mlflow_dr.validation.scheduler import TRIES, TRIES_IN_A_ROW
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts
from tests.unit.validation.configuring import VALIDATION, configured


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    corpus = {f"p{number}": text for number, text in enumerate(texts)}
    return beir_folder(corpus, {"q1": "who counts the ships"}, dev={"q1": {"p0": 1}})


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def validated(run: TrackedRun, slept: list[float]) -> Callable[..., Counts]:
    def validated(**plan: Any) -> Counts:
        asked = configured(VALIDATION, **{"follow": False, "poll_seconds": 1.0, **plan})
        return run_validator(FollowedRun(run), asked, slept.append)

    return validated


def states(run: TrackedRun) -> list[State]:
    return [validation_state(checkpoint, "val") for checkpoint in run_checkpoints(run)]


def test_an_unreachable_store_ends_the_validator_and_fails_no_checkpoint(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The waits grow, claims are given back, and the next validator continues."""
    for step in (1, 2, 3):
        publishing(step)

    def unreachable(*_: Any) -> None:
        raise RuntimeError("Unable to locate credentials")

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "local_directory", lambda location: None)
        patched.setattr(fetching, "SECONDS_BETWEEN_TRIES", 0.0)
        patched.setattr(LocalArtifactRepository, "_download_file", unreachable)
        with pytest.raises(UnavailableError, match=r"cannot read .*Unable to locate credentials"):
            validated()
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    assert len(slept) == TRIES_IN_A_ROW - 1
    checkpoints = run_checkpoints(run)
    assert states(run) == [State.OPEN] * 3
    claims = [latest_claim(checkpoint, "val") for checkpoint in checkpoints]
    assert all(claim and claim.given_back for claim in claims)
    assert {claim.attempt for claim in claims if claim} == {TRIES_IN_A_ROW // 3}
    counts = validated()
    assert (counts.done, counts.are_good) == (3, True)


def test_a_checkpoint_that_is_unreadable_on_this_machine_is_left_to_others(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others come first; then it is tried a few times."""
    for step in (1, 2, 3):
        publishing(step)
    real = fetching._fetch

    def denied(checkpoint: Checkpoint, *more: Any) -> Path:
        if checkpoint.step == 1:
            raise PermissionError(13, "Permission denied")
        return real(checkpoint, *more)

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_fetch", denied)
        with caplog.at_level("INFO", logger="mlflow_dr"):
            counts = validated()
    assert (counts.done, counts.failed, counts.unavailable) == (2, 0, 1)
    assert not counts.are_good
    assert states(run) == [State.OPEN, State.DONE, State.DONE]
    assert slept == [1, *(2.0**number for number in range(TRIES - 1))]
    assert "step 1 is left to other validators: cannot be downloaded: [Errno 13]" in caplog.text
    assert "0 failed, 1 left that cannot be read here" in caplog.text
    assert validated().done == 1


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        (MissingExtraError("pip install 'mlflow_dr[lora]'"), 0),
        (ModuleNotFoundError("No module named 'sentencepiece'"), 0),
        (MemoryError(), TRIES),
        (OSError(23, "Too many open files in system"), TRIES),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TRIES),
    ],
    ids=repr,
)
def test_what_this_machine_lacks_does_not_fail_a_checkpoint(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    waits: int,
) -> None:
    publishing(1)

    def load(*_: Any, **__: Any) -> Encoder:
        raise error

    monkeypatch.setattr(encoders, "load_encoder", load)
    counts = validated()
    assert (counts.done, counts.failed, counts.unavailable) == (0, 0, 1)
    assert states(run) == [State.OPEN]
    assert len(slept) == waits


def test_an_interrupted_evaluation_does_not_fail_a_checkpoint(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishing(1)
    publishing(2)
    real, calls = encoders.evaluate_all, []

    def broken(*asked: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(calls) == 2:
            raise IndexError("a damaged cache, say")
        return real(*asked)

    monkeypatch.setattr(encoders, "evaluate_all", broken)
    counts = validated()
    assert (counts.done, counts.failed, counts.unavailable) == (1, 0, 1)
    assert State.FAILED not in states(run)


def _no_activation(directory: Path) -> None:
    _configure(directory, hidden_act=None)


def _wordy_width(directory: Path) -> None:
    _configure(directory, hidden_size="wide")


def _million_layers(directory: Path) -> None:
    _configure(directory, num_hidden_layers=1_000_000)


def _configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _config_list(directory: Path) -> None:
    (directory / "config.json").write_text("[1]")


def _nested(directory: Path) -> None:
    (directory / "config.json").write_text("[" * 100_000 + "]" * 100_000)


def _tokenizer_list(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("[]")


def _adapters_of_themselves(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(directory), "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))


@pytest.mark.parametrize(
    "damage",
    [
        *(_no_activation, _wordy_width, _million_layers, _config_list, _nested),
        *(_tokenizer_list, _adapters_of_themselves),
    ],
)
def test_a_malformed_checkpoint_fails_alone_and_on_one_line(
    run: TrackedRun,
    publishing: Callable[[int], str],
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    validated: Callable[..., Counts],
    slept: list[float],
    damage: Callable[[Path], None],
) -> None:
    directory = tmp_path / "malformed"
    save_encoder(directory, make_tiny(pooling="mean", normalize=True))
    damage(directory)
    publish(run, directory, 1)
    publishing(2)
    counts = validated()
    assert (counts.done, counts.failed) == (1, 1)
    assert states(run) == [State.FAILED, State.DONE]
    reason = failure_reason(run_checkpoints(run)[0], "val")
    assert 10 < len(reason) < 500
    assert "\n" not in reason
    assert slept == []


def test_a_missing_backbone_of_adapters_does_not_fail_the_checkpoint(
    run: TrackedRun,
    publishing: Callable[[int], str],
    make_tiny: Callable[..., Encoder],
    tmp_path: Path,
    validated: Callable[..., Counts],
) -> None:
    directory = tmp_path / "adapters"
    save_encoder(directory, make_tiny(pooling="mean", normalize=True))
    _adapters_of_themselves(directory)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "nowhere"), "r": 4}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    publish(run, directory, 1)
    publishing(2)
    counts = validated()
    assert (counts.done, counts.failed, counts.unavailable) == (1, 0, 1)
    assert states(run) == [State.OPEN, State.DONE]


def test_earlier_failures_are_counted(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    caplog: pytest.LogCaptureFixture,
) -> None:
    publishing(1)
    publishing(2)
    weights = Path(run_checkpoints(run)[0].location.removeprefix("file://")) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    first = validated()
    assert (first.done, first.failed, first.passed_over) == (1, 1, 0)
    with caplog.at_level("INFO", logger="mlflow_dr"):
        again = validated()
    assert (again.done, again.failed, again.passed_over) == (0, 0, 1)
    assert not again.are_good
    assert "0 failed, 1 passed over that had FAILED (--retry-failed)" in caplog.text
    weights.write_bytes(whole)
    mended = validated(retry_failed=True)
    assert (mended.done, mended.are_good) == (1, True)


def test_files_that_were_not_published_change_no_figure(
    run: TrackedRun,
    publishing: Callable[[int], str],
    make_tiny: Callable[..., Encoder],
    validated: Callable[..., Counts],
) -> None:
    publishing(1)
    first = run_checkpoints(run)[0]
    same = Path(first.location.removeprefix("file://"))
    publish(run, same, 2)
    second = Path(run_checkpoints(run)[1].location.removeprefix("file://"))
    save_encoder(second / "query", make_tiny(seed=9, pooling="cls"))
    (second / "special_tokens_map.json").write_text('{"unk_token": "the", "cls_token": "[PAD]"}')
    assert validated().done == 2
    (_, value), (_, other_value) = metric_points(run_checkpoints(run), Metric("val", "mrr_at_10"))
    assert value == other_value


@pytest.mark.parametrize(
    ("key", "value", "state"),
    [
        ("mlflow_dr.validation.val", "{", State.FAILED),
        ("mlflow_dr.validation.val", '{"values": {"mrr_at_10": "high"}}', State.FAILED),
        ("mlflow_dr.validation.val.claim.²", "{}", State.DONE),
    ],
)
def test_malformed_params_of_a_validation_are_refused(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    key: str,
    value: str,
    state: State,
) -> None:
    run.client.log_model_params(publishing(1), {key: value})
    publishing(2)
    validated(retry_failed=True)
    assert states(run) == [state, State.DONE]


def test_a_checkpoint_deleted_during_validation_is_passed_over(
    run: TrackedRun,
    publishing: Callable[[int], str],
    validated: Callable[..., Counts],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One checkpoint is deleted before its claim, and one before it is fetched."""
    ids = [publishing(step) for step in (1, 2, 3)]
    real, real_snapshot = fetching._fetch, FollowedRun.snapshot

    def snapshot(self: FollowedRun) -> Any:
        seen = real_snapshot(self)
        if len(ids) == 3:
            run.client.delete_logged_model(ids.pop(0))
        return seen

    def deleted(checkpoint: Checkpoint, *more: Any) -> Path:
        if checkpoint.step == 2:
            if len(ids) == 2:
                run.client.delete_logged_model(ids.pop(0))
            raise ConnectionError("gone")
        return real(checkpoint, *more)

    monkeypatch.setattr(FollowedRun, "snapshot", snapshot)
    monkeypatch.setattr(fetching, "_fetch", deleted)
    assert validated().are_good
    assert states(run) == [State.DONE]
    assert "step 1 is passed over: it was deleted" in caplog.text
    assert "step 2 is passed over: it was deleted" in caplog.text
