import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from mlflow_dr.errors import TrainingError, UsageError
from mlflow_dr.reader.config import ReaderPredictConfig, ReaderTrainConfig
from mlflow_dr.reader.model import load_reader
from mlflow_dr.reader.prediction import predict_answers
from mlflow_dr.reader.training import RUN_FILE, ReaderTrainer, train_reader
from mlflow_dr.tracking.checkpoints import run_checkpoints
from mlflow_dr.tracking.runs import find_run


@pytest.fixture
def config(
    write_results: Callable[..., Path],
    make_reader: Callable[[], Any],
    tokenizer: Any,
    tmp_path: Path,
    client: MlflowClient,
) -> ReaderTrainConfig:
    make_reader().backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    return ReaderTrainConfig(
        train_file=write_results(),
        model=str(tmp_path / "backbone"),
        output_dir=tmp_path / "reader",
        batch_size=1,
        passages_per_question=3,
        sequence_length=64,
        learning_rate=0.02,
        max_steps=24,
        device="cpu",
        dtype="fp32",
        tracking_uri=client.tracking_uri,
        log_batch_step=2,
    )


def test_a_reader_learns_the_answer_of_a_question(
    config: ReaderTrainConfig, client: MlflowClient, tmp_path: Path
) -> None:
    done = train_reader(config)
    assert done is not None
    assert (done.steps, done.questions) == (24, 1)
    assert done.real_tokens > 0.9
    run = client.get_run((tmp_path / "reader" / RUN_FILE).read_text())
    assert run.info.run_name.startswith(f"{config.train_file.stem}-reader-backbone-")
    text = run.data.tags["mlflow.note.content"]
    assert f"Trains **{config.model}** on {config.train_file}." in text
    predict = ReaderPredictConfig(
        reader=str(tmp_path / "reader"),
        results=config.train_file,
        eval_top_docs=(5,),
        sequence_length=64,
        device="cpu",
        dtype="fp32",
    )
    assert predict_answers(predict)["em@5"] == 0.5  # the other question has no passage with it
    with pytest.raises(UsageError, match="--resume continues"):
        train_reader(config)
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        train_reader(config.replaced(resume=True))
    (tmp_path / "reader" / "checkpoint-99").mkdir()
    train_reader(config.replaced(force=True, max_steps=1, dropout=0.0))
    saved = load_reader(str(tmp_path / "reader"))[0].config
    assert (saved.hidden_dropout_prob, saved.attention_probs_dropout_prob) == (0.0, 0.0)
    assert not (tmp_path / "reader" / "checkpoint-99").exists()


def test_ctrl_c_ends_after_the_step_and_the_training_is_resumed(
    config: ReaderTrainConfig, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = ReaderTrainer.compute_loss

    def interrupted(trainer: ReaderTrainer, *arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return compute(trainer, *arguments, **options)

    saved = config.replaced(max_steps=6, save_steps=100)
    with monkeypatch.context() as patch:
        patch.setattr(ReaderTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_reader(saved)
    run = find_run(client, (config.output_dir / RUN_FILE).read_text())
    assert run.fetch().info.status == "KILLED"
    assert [checkpoint.step for checkpoint in run_checkpoints(run)] == [3]
    assert not (config.output_dir / "config.json").exists()
    done = train_reader(saved.replaced(resume=True))
    assert done is not None and done.steps == 6
    assert [checkpoint.step for checkpoint in run_checkpoints(run)] == [3, 6]


def test_a_resumed_training_ends_with_the_same_weights(
    config: ReaderTrainConfig, tmp_path: Path, client: MlflowClient
) -> None:
    whole = config.replaced(max_steps=4, save_steps=2)
    train_reader(whole)
    expected = load_reader(str(tmp_path / "reader"))[0].state_dict()
    run_id = (tmp_path / "reader" / RUN_FILE).read_text()
    (tmp_path / "reader" / "checkpoint-4").rename(tmp_path / "aside")
    train_reader(whole.replaced(resume=True))
    resumed = load_reader(str(tmp_path / "reader"))[0].state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0)
    run = find_run(client, run_id)
    assert [checkpoint.step for checkpoint in run_checkpoints(run)] == [4]
    losses = client.get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in losses) == [2, 4]
    assert run.fetch().info.status == "FINISHED"


def test_a_loss_that_is_no_number_ends_the_training(config: ReaderTrainConfig) -> None:
    with pytest.raises(TrainingError, match="try a lower --learning-rate"):
        train_reader(config.replaced(learning_rate=1e30))
