"""The callback in Hugging Face's own Trainer and in sentence-transformers', on a real store."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
from datasets import Dataset
from mlflow import MlflowClient
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from mlflow_dr import PublishCallback
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import TrackingError, UsageError
from mlflow_dr.tracking.checkpoints import announce_checkpoint, run_checkpoints
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.runs import RUN_VARIABLE, TrackedRun
from mlflow_dr.training import publish_api
from mlflow_dr.training.callbacks import ScheduledPublishing, every_steps
from mlflow_dr.training.publishing import EncoderSource, Publisher

QUIET: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 100}


@pytest.fixture(autouse=True)
def _no_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(RUN_VARIABLE, raising=False)
    yield
    while mlflow.active_run():
        mlflow.end_run()


class BiEncoder(nn.Module):
    """A model of somebody's, with a backbone inside."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, query: Tensor, passage: Tensor) -> dict[str, Tensor]:
        vectors = [
            self.backbone(input_ids=ids, attention_mask=torch.ones_like(ids))[0].mean(1)
            for ids in (query, passage)
        ]
        scores = vectors[0] @ vectors[1].T
        return {"loss": cross_entropy(scores, torch.arange(len(scores))), "scores": scores}


def hf_trainer(
    encoder: Encoder, directory: Path, *callbacks: TrainerCallback, **arguments: Any
) -> Trainer:
    rows = [
        {"query": torch.arange(3) + 5 + row, "passage": torch.arange(6) + 5 + row}
        for row in range(16)
    ]
    options = {"report_to": "none", "max_steps": 6, "save_strategy": "no", "seed": 1, **QUIET}
    return Trainer(
        BiEncoder(encoder.backbone),
        TrainingArguments(
            output_dir=str(directory), per_device_train_batch_size=4, **{**options, **arguments}
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        data_collator=default_data_collator,
        processing_class=encoder.tokenizer,
        callbacks=list(callbacks),
    )


def callback(*arguments: Any, **more: Any) -> PublishCallback:
    return PublishCallback(
        *arguments, part=lambda model: model.backbone, pooling="mean", normalize=True, **more
    )


def steps(run: TrackedRun) -> list[int]:
    checkpoints = run_checkpoints(run)
    assert all(checkpoint.ready for checkpoint in checkpoints)
    return [checkpoint.step for checkpoint in checkpoints]


def test_hugging_face_trainer_publishes_the_first_the_last_and_every_few_steps(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    with mlflow.start_run(run_id=run.id):
        hf_trainer(tiny, tmp_path, callback(every=4)).train()
        assert steps(run) == [0, 4, 6]
    first, _, last = run_checkpoints(run)
    with checkpoint_files(last) as directory:
        found = load_encoder(directory, safetensors_only=True)
    assert torch.equal(next(found.backbone.parameters()), next(tiny.backbone.parameters()))
    assert (found.settings.pooling, found.settings.normalize) == ("mean", True)
    with checkpoint_files(first) as directory:
        before = next(load_encoder(directory).parameters())
    assert not torch.equal(next(found.backbone.parameters()), before)


def test_checkpoints_are_published_when_the_trainer_saves(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    with mlflow.start_run(run_id=run.id):
        publishing = callback(initial=False, final=False)
        hf_trainer(tiny, tmp_path, publishing, save_strategy="steps", save_steps=2).train()
    assert steps(run) == [2, 4, 6]


def test_only_the_first_and_the_last_step_are_published(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    hf_trainer(tiny, tmp_path, callback(every=0, run_id=run.id)).train()
    assert steps(run) == [0, 6]


def test_the_run_of_the_trainers_own_callback_ends_after_the_last_checkpoint_is_ready(
    run: TrackedRun,
    experiment_name: str,
    tiny: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment_name)
    trainer = hf_trainer(
        tiny,
        tmp_path,
        callback(every=100),
        EarlyStoppingCallback(early_stopping_patience=1),  # stops between two epochs
        report_to="mlflow",
        max_steps=50,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        label_names=["passage"],  # or there is no eval_loss
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it never gets better
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step < 50
    mine = mlflow.last_active_run()
    assert mine is not None and mine.info.run_id != run.id
    tracked = TrackedRun(run.client, run.client.get_run(mine.info.run_id))
    assert steps(tracked) == [0, trainer.state.global_step]
    info = tracked.fetch().info
    assert info.status == "FINISHED"
    assert max(checkpoint.ready_ms for checkpoint in run_checkpoints(tracked)) <= info.end_time


def test_resumed_training_publishes_nothing_twice(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}

    class Killed(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    first = make_tiny(pooling="mean")
    publishing = callback(every=1, run_id=run.id)
    with pytest.raises(KeyboardInterrupt):
        hf_trainer(first, tmp_path, publishing, Killed(), **saving).train()
    publishing._close()  # what the end of the process does
    left = announce_checkpoint(run, 6, "abc")  # announced by the killed trainer
    before = {
        checkpoint.step: checkpoint.model_id
        for checkpoint in run_checkpoints(run)
        if checkpoint.ready
    }
    assert sorted(before) == [0, 1, 2, 3, 4, 5]

    again = make_tiny(pooling="mean")
    hf_trainer(again, tmp_path, callback(every=1, run_id=run.id), **saving).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    ready = [checkpoint for checkpoint in run_checkpoints(run) if checkpoint.ready]
    assert [checkpoint.step for checkpoint in ready] == [0, 1, 2, 3, 4, 5, 6]
    assert {
        checkpoint.step: checkpoint.model_id for checkpoint in ready if checkpoint.step < 6
    } == before
    (abandoned,) = [checkpoint for checkpoint in run_checkpoints(run) if not checkpoint.ready]
    assert (abandoned.model_id, abandoned.pending) == (left, False)


def test_sentence_transformers_trainer_publishes(
    run: TrackedRun, tiny: Encoder, texts: list[str], tmp_path: Path
) -> None:
    save_encoder(tmp_path / "start", tiny)
    model = SentenceTransformer(str(tmp_path / "start"), device="cpu")
    with mlflow.start_run(run_id=run.id):
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=str(tmp_path / "out"),
                max_steps=4,
                per_device_train_batch_size=4,
                save_strategy="no",
                report_to="mlflow",
                **QUIET,
            ),
            train_dataset=Dataset.from_dict({"query": texts, "passage": texts[::-1]}),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[PublishCallback(every=3)],
        ).train()
        assert steps(run) == [0, 3, 4]
    assert "train_loss" in run.fetch().data.metrics
    with checkpoint_files(run_checkpoints(run)[-1]) as directory:
        ours = load_encoder(directory, safetensors_only=True)
        theirs = SentenceTransformer(str(directory), device="cpu")
    weights = model[0].auto_model.state_dict()
    assert ours.settings.pooling == "mean" and ours.settings.normalize
    for name, value in ours.backbone.state_dict().items():
        assert torch.equal(value, weights[name])
    expected = model.eval().encode(texts, convert_to_tensor=True)
    assert torch.allclose(theirs.encode(texts, convert_to_tensor=True), expected, atol=1e-6)


def test_without_a_run_training_does_not_begin(tiny: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no MLflow run to publish to"):
        hf_trainer(tiny, tmp_path, callback(every=1)).train()
    with pytest.raises(UsageError, match="every is -1"):
        PublishCallback(-1)


def test_a_model_that_cannot_be_published_raises_before_the_first_step(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    trainer = hf_trainer(tiny, tmp_path, PublishCallback(1, run_id=run.id))
    with pytest.raises(UsageError, match="a BiEncoder cannot be published"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_other_ranks_publish_nothing_and_need_no_run(tiny: Encoder) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=False, global_step=0)
    publishing = callback(every=1)
    nothing: Any = None
    publishing.on_train_begin(nothing, state, nothing, model=BiEncoder(tiny.backbone))
    state.global_step = 1
    publishing.on_step_end(nothing, state, nothing)
    publishing.on_save(nothing, state, nothing)
    publishing.on_log(nothing, state, nothing, logs={"train_runtime": 1.0})
    publishing.on_train_end(nothing, state, nothing)


def test_a_schedule_with_a_publisher_leaves_it_open(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    publisher = Publisher(run, EncoderSource(tiny), published={4: "m-4"})
    publishing = ScheduledPublishing(publisher.publish, every_steps(2), initial=False)
    hf_trainer(tiny, tmp_path, publishing).train()
    assert publisher.last_step == 6
    publisher.publish(7)
    publisher.close()
    assert steps(run) == [2, 6, 7]


def test_a_callback_may_be_used_in_a_second_training(
    run: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    other = TrackedRun(run.client, run.client.create_run(run.experiment_id))
    publishing = callback(every=4)
    for tracked in (run, other):
        with mlflow.start_run(run_id=tracked.id):
            hf_trainer(tiny, tmp_path, publishing).train()
    assert steps(run) == steps(other) == [0, 4, 6]


class Quick(Publisher):
    """A publisher that retries without waiting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "pause": 0.0})


@pytest.fixture
def refusing(client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrackedRun:
    """A run whose artifacts would lie below a file."""
    monkeypatch.setattr(publish_api, "Publisher", Quick)
    (tmp_path / "a file").write_text("")
    experiment = client.create_experiment(f"no store {tmp_path}", str(tmp_path / "a file" / "x"))
    return TrackedRun(client, client.create_run(experiment))


def test_training_stops_when_nothing_can_be_published_and_the_last_is_kept(
    refusing: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    publishing = callback(every=1000, run_id=refusing.id)
    trainer = hf_trainer(tiny, out, publishing, max_steps=100_000)
    with pytest.raises(TrackingError, match=r"was not published: .*Not a directory") as caught:
        trainer.train()
    assert trainer.state.global_step < 100_000
    (kept,) = out.glob("unpublished-*")
    assert str(kept) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kept.name == f"unpublished-{trainer.state.global_step}"
    weights = next(load_encoder(kept, safetensors_only=True).backbone.parameters())
    assert torch.equal(weights, next(tiny.backbone.parameters()))


def test_a_refusal_in_one_of_several_processes_raises_at_once(
    refusing: TrackedRun, tiny: Encoder, tmp_path: Path
) -> None:
    """The others are in their next step; torchrun ends them when this process fails."""
    publishing = callback(every=1000, run_id=refusing.id)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0)
    arguments: Any = SimpleNamespace(world_size=2, output_dir=str(tmp_path / "out"))
    nothing: Any = None
    model = BiEncoder(tiny.backbone)
    publishing.on_train_begin(arguments, state, nothing, model, tiny.tokenizer)
    publisher: Any = publishing._publisher
    publisher.wait()
    state.global_step = 1
    with pytest.raises(TrackingError, match="step 0 was not published"):
        publishing.on_step_end(arguments, state, nothing)
