"""What replaces what checkpoints say is tried before a validation's name stands for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.encoder.backbone import tiny_encoder
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.tracking.following import FollowedDirectory, FollowedRun
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import run_validations
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts
from tests.unit.validation.configuring import VALIDATION, configured


@pytest.fixture
def folder(beir_folder: Callable[..., Path], texts: list[str]) -> Path:
    corpus = {f"p{number}": text for number, text in enumerate(texts)}
    return beir_folder(corpus, {"q1": "who counts the ships"}, dev={"q1": {"p0": 1}})


def no_sleep(seconds: float) -> None:
    raise AssertionError(f"slept {seconds} s")


def validated(run: TrackedRun, validation: dict[str, Any] = VALIDATION, **changes: Any) -> Counts:
    plan = configured(validation, follow=False, **changes)
    return run_validator(FollowedRun(run), plan, no_sleep)


def test_a_length_that_no_checkpoint_allows_reserves_no_name(
    run: TrackedRun, publishing: Callable[[int], str]
) -> None:
    publishing(1)
    with pytest.raises(UsageError, match="passage_max_length is 100000"):
        validated(run, p_max_len=100_000)
    assert run_validations(run).get("val") is None
    assert validated(run, p_max_len=16).done == 1
    with pytest.raises(UsageError, match="another configuration"):
        validated(run)


def test_a_tokenizer_that_does_not_fit_reserves_no_name(
    run: TrackedRun, publishing: Callable[[int], str], tmp_path: Path
) -> None:
    publishing(1)
    with pytest.raises(UsageError, match="not a directory"):
        validated(run, tokenizer=str(tmp_path / "nowhere"))
    many = [f"{letter}{other} word" for letter in "abcdefghij" for other in "klmnopqrst"]
    save_encoder(tmp_path / "larger", tiny_encoder(many * 3, EncoderConfig()))
    with pytest.raises(UsageError, match="step 1 cannot be read with tokenizer"):
        validated(run, tokenizer=str(tmp_path / "larger"))
    assert run_validations(run).get("val") is None
    assert validated(run).done == 1


def test_a_name_is_reserved_with_the_first_checkpoint(
    run: TrackedRun, publishing: Callable[[int], str], folder: Path
) -> None:
    with pytest.raises(UsageError, match="no split 'test'"):
        validated(run, {**VALIDATION, "split": "test"}, pooling="max")
    assert validated(run, pooling="max").done == 0
    assert run_validations(run).get("val") is None
    publishing(1)
    assert validated(run, pooling="max").done == 1
    assert (run_validations(run).get("val") or {})["pooling"] == "max"


def test_a_directory_that_has_no_checkpoints_yet(
    run: TrackedRun, folder: Path, tmp_path: Path, make_tiny: Callable[..., Encoder]
) -> None:
    run.log_params({"dataset": str(folder), "validation_split": "dev"})
    (tmp_path / "output").mkdir()

    def save(seconds: float) -> None:
        if not (tmp_path / "output/checkpoint-3").exists():
            save_encoder(tmp_path / "output/checkpoint-3", make_tiny())
        elif run_validations(run).get("val"):
            run.finish("FINISHED")

    plan = configured(VALIDATION, pooling="mean", poll_seconds=0.01)
    followed = FollowedDirectory(run, tmp_path / "output", is_mine=False)
    assert run_validator(followed, plan, save).done == 1
