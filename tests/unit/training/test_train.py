"""A whole training in this process, from flags to a run in a real store."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_dr import publish_checkpoint
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import CheckpointError, TrackingError, TrainingError, UsageError
from mlflow_dr.tracking.checkpoints import ready_steps, run_checkpoints
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.stop_request import StopWatcher, request_stop
from mlflow_dr.training import publishing
from mlflow_dr.training import train as train_module
from mlflow_dr.training.loss import Objective
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.training.publishing import Publisher
from mlflow_dr.training.resume import claimed_output, mark_complete
from mlflow_dr.training.train import train
from mlflow_dr.training.trainer import RetrieverTrainer

Make = Callable[..., Any]
IDS = torch.tensor([[2, 9, 8, 7, 3], [2, 6, 3, 0, 0]])
MASK = (IDS != 0).long()
FLAGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "publish_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "use_cpu": True,
    "warmup_steps": 0,
}


class Run(TrackedRun):
    """A run, with what the tests ask of it."""

    @property
    def status(self) -> str:
        return str(self.fetch().info.status)

    def points(self, name: str = "train/loss") -> list[tuple[int, float]]:
        mlflow.flush_async_logging()
        history = self.client.get_metric_history(self.id, name)
        return sorted((point.step, point.value) for point in history)

    def losses(self) -> list[float]:
        return [value for _, value in self.points()]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder of its own; MLflow's logging thread ends when told to, not in two seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS", "1")


@pytest.fixture
def trained(
    client: MlflowClient, experiment_name: str, folder: Path, saved: Path
) -> Callable[..., Run]:
    """A function from flags to the run of their training; of `saved` on `folder` by default."""

    def trained(
        *argv: object, model: object = saved, dataset: object = folder, **flags: Any
    ) -> Run:
        usual = {"model": model, "dataset": dataset, "experiment_name": experiment_name}
        chosen = {**usual, **FLAGS, **flags}
        given = {name: value for name, value in chosen.items() if value is not None}
        pairs = [str(arg) for name, value in given.items() for arg in (f"--{name}", value)]
        return run_of(train(parse_training([*map(str, argv), *pairs])))

    def run_of(run_id: str) -> Run:
        return Run(client, client.get_run(run_id))

    return trained


def vectors_of(trainer: RetrieverTrainer) -> torch.Tensor:
    """The vectors that the trained encoder gives now."""
    with torch.no_grad():
        return trainer._encoder.eval()(IDS, MASK)


@pytest.fixture
def last_run(client: MlflowClient, experiment: str) -> Callable[[], Run]:
    """The run that was begun last."""
    return lambda: Run(client, client.search_runs([experiment], max_results=1)[0])


@pytest.fixture
def published() -> Iterator[Callable[..., Path]]:
    """A function from a run and a step to the directory that was published."""
    with ExitStack() as fetches:

        def published(run: Run, step: int = 4) -> Path:
            (checkpoint,) = (
                checkpoint for checkpoint in run_checkpoints(run) if checkpoint.step == step
            )
            return fetches.enter_context(checkpoint_files(checkpoint))

        yield published


def test_a_training_is_a_run_with_its_losses_and_checkpoints(
    trained: Make,
    published: Make,
    folder: Path,
    saved: Path,
    trainers: list[RetrieverTrainer],
) -> None:
    run = trained(run_name="mine")
    assert (run.status, run.name) == ("FINISHED", "mine")
    assert [step for step, _ in run.points()] == [1, 2, 3, 4]
    for name in ("wait_fraction", "padding_fraction"):
        points = run.points(f"data/{name}")
        assert [step for step, _ in points] == [1, 2, 3, 4]
        assert all(0 < value < 1 for _, value in points)
    assert all(value > 50 for _, value in run.points("data/memory_private_mb"))
    assert ready_steps(run) == {0, 2, 4}
    assert len(run_checkpoints(run)) == 3
    params = run.fetch().data.params
    assert params["model"] == str(saved)
    assert (params["dataset"], params["validation_split"]) == (str(folder), "dev")
    (entry,) = run.fetch().inputs.dataset_inputs
    assert entry.dataset.name == str(folder)
    before = load_encoder(saved, normalize=True)(IDS, MASK)
    assert torch.equal(load_encoder(published(run, 0))(IDS, MASK), before)
    after = load_encoder(published(run, 4))(IDS, MASK)
    torch.testing.assert_close(after, vectors_of(trainers[-1]))
    assert not torch.allclose(after, before, atol=1e-3)


def test_training_starts_from_a_published_checkpoint(
    trained: Make, published: Make, trainers: list[RetrieverTrainer]
) -> None:
    first = trained()
    checkpoint = run_checkpoints(first)[-1]
    first.client.create_registered_model("to go on")
    first.client.create_model_version("to go on", checkpoint.uri)
    for model in (checkpoint.uri, "models:/to go on/1"):
        run = trained(model=model, normalize=True)
        assert run.fetch().data.params["model"] == model
        vectors = load_encoder(published(run, 0))(IDS, MASK)
        assert torch.equal(vectors, load_encoder(published(first, 4), normalize=True)(IDS, MASK))
    with pytest.raises(UsageError, match="the base of adapters must be a directory or a hub name"):
        trained("--lora", model=checkpoint.uri, lora_publish="adapter")


def test_a_resumed_training_keeps_the_encoder_of_an_alias(
    trained: Make, trainers: list[RetrieverTrainer], tmp_path: Path
) -> None:
    """The alias moves to another version, but the adapters keep their base."""
    first = trained()
    client = first.client
    client.create_registered_model("moving")
    for checkpoint in (run_checkpoints(first)[0], run_checkpoints(first)[-1]):
        client.create_model_version("moving", checkpoint.uri)
    client.set_registered_model_alias("moving", "best", "1")
    flags = {"model": "models:/moving@best", "output_dir": tmp_path / "out", "save_steps": 2}
    begun = trained(*LORA, **flags)
    expected = vectors_of(trainers[-1])
    assert begun.fetch().data.tags["mlflow_dr.start"] == run_checkpoints(first)[0].uri
    client.set_registered_model_alias("moving", "best", "2")
    again = trained(*LORA, "--resume_from_checkpoint", **flags)
    assert again.id == begun.id
    assert torch.equal(vectors_of(trainers[-1]), expected)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"publish_steps": 0}, {0, 4}),
        ({"publish_steps": 3, "publish_initial": False}, {3, 4}),
        ({"publish_steps": None, "publish_per_epoch": 1, "max_steps": 3}, {0, 2, 3}),
    ],
    ids=str,
)
def test_publish_steps_sets_the_published_steps(
    trained: Make, flags: dict[str, Any], steps: set[int]
) -> None:
    assert ready_steps(trained(**flags)) == steps


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[RetrieverTrainer]:
    """The trainers that were made, the latest last."""
    made: list[RetrieverTrainer] = []

    class Kept(RetrieverTrainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(train_module, "RetrieverTrainer", Kept)
    return made


@pytest.fixture
def losses(
    trainers: list[RetrieverTrainer], folder: Path, saved: Path
) -> Callable[..., list[float]]:
    """A function from flags to the losses of their training, as a rank that writes nothing."""

    def losses(model: object = saved, dataset: object = folder, **flags: Any) -> list[float]:
        chosen = {**FLAGS, "model": model, "dataset": dataset, **flags}
        argv = [str(arg) for name, value in chosen.items() for arg in (f"--{name}", value)]
        request = parse_training(argv)
        kind = train_module.trainer_kind(request)
        train_module._train_silently(request, kind, None)
        history = trainers[-1].state.log_history
        return [entry["loss"] for entry in history if "loss" in entry]

    return losses


@pytest.mark.parametrize(
    "flags",
    [
        {"grad_cache": True, "gc_q_chunk_size": 2, "gc_p_chunk_size": 3},
        {"grad_cache": True, "q_chunk_size": 1, "ctx_chunk_size": 999},
        {"gradient_checkpointing": True},
        {"activation_checkpointing": True, "grad_cache": True, "gc_p_chunk_size": 3},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"torch_compile": True, "torch_compile_backend": "eager", "grad_cache": True},
        {"attn_implementation": "eager"},
        {"token_table": False},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
def test_flags_that_change_only_memory_and_time(
    losses: Make, trainers: list[RetrieverTrainer], flags: dict[str, Any]
) -> None:
    """Step by step the same losses, without dropout."""
    expected = losses()
    assert len({round(loss, 2) for loss in expected}) > 1
    assert losses(**flags) == pytest.approx(expected, rel=1e-4)
    assert [bool(trainer._chunk_sizes) for trainer in trainers] == [False, "grad_cache" in flags]


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.5},
        {"normalize": True},
        {"train_n_passages": 3},
        {"distil_weight": 0.5, "train_n_passages": 3},
        {"distil_temperature": 5, "distil_weight": 0.5, "train_n_passages": 3},
        {"mask_duplicates": False},
        {"query_prefix": "the ship "},
        {"seed": 7},
    ],
    ids=str,
)
def test_flags_that_change_the_first_loss(
    losses: Make, scored: Path, flags: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"dataset": scored, "max_steps": 1, "train_n_passages": 1}
    if "distil_weight" in flags:
        common["train_n_passages"] = 3
    if "distil_temperature" in flags:
        common["distil_weight"] = 0.5
    if "mask_duplicates" in flags:
        line = scored.read_text().splitlines()[0]
        other = json.dumps({**json.loads(line), "query_id": "s9", "query": "ships at night"})
        scored.write_text(f"{line}\n{other}\n")
        common["per_device_train_batch_size"] = 2
    plain, changed = losses(**common)[0], losses(**{**common, **flags})[0]
    assert plain != pytest.approx(changed, rel=1e-3)


def test_gradient_checkpointing_recomputes_layers(make_small: Make, make_trainer: Make) -> None:
    """Once more for each forward pass; `--gradient_checkpointing` is the flag's older name."""
    calls = {}
    for flags in ({}, {"activation_checkpointing": True}):
        encoder: Encoder = make_small(0.2)
        encoder.untied_query_encoder = make_small(0.2, seed=1)
        counted: list[int] = []
        for part in (encoder, encoder.query_encoder):
            layer = part.backbone.encoder.layer[0].attention.self
            layer.register_forward_hook(lambda *_, seen=counted: seen.append(1))
        trainer = make_trainer(encoder, max_steps=2, **flags)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        calls[bool(flags)] = (len(counted), losses)
    assert calls[False][0] == 4
    assert calls[True][0] == 8
    assert calls[True][1] == pytest.approx(calls[False][1], rel=1e-6)


def test_a_compiled_encoder_is_published_and_saved_under_its_own_names(
    trained: Make, published: Make, trainers: list[RetrieverTrainer], tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    run = trained(
        torch_compile=True,
        torch_compile_backend="eager",
        output_dir=tmp_path / "out",
        save_steps=4,
    )
    assert counters["stats"]["unique_graphs"] > 0
    for directory in (published(run), tmp_path / "out" / "checkpoint-4"):
        vectors = load_encoder(directory, safetensors_only=True)(IDS, MASK)
        torch.testing.assert_close(vectors, vectors_of(trainers[-1]))


LORA = ("--lora", "--lora_r", "4", "--lora_alpha", "64", "--lora_dropout", "0.2")


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_lora_is_published_merged_or_as_adapters(
    trained: Make,
    published: Make,
    saved: Path,
    trainers: list[RetrieverTrainer],
    kind: str,
) -> None:
    """With the vectors of the encoder that is trained."""
    directory = published(trained(*LORA, "--lora_publish", kind))
    assert (directory / "adapter_model.safetensors").exists() == (kind == "adapter")
    assert (directory / "model.safetensors").exists() == (kind == "merged")
    vectors = load_encoder(directory, safetensors_only=True)(IDS, MASK)
    torch.testing.assert_close(vectors, vectors_of(trainers[-1]), rtol=1e-5, atol=1e-5)
    assert (vectors - load_encoder(saved, normalize=True)(IDS, MASK)).abs().max() > 1e-3


@pytest.mark.parametrize("start", ["two encoders", "models:/", "tiny"])
def test_missed_checkpoints_of_adapters_are_published(
    trained: Make,
    published: Make,
    make_untied_encoder: Callable[..., Encoder],
    tmp_path: Path,
    start: str,
) -> None:
    """As it would have been published."""
    model = start
    if start == "two encoders":
        save_encoder(tmp_path / "untied", make_untied_encoder())
        model = str(tmp_path / "untied")
    elif start == "models:/":
        model = run_checkpoints(trained(max_steps=1))[0].uri
    flags = {"model": model, "output_dir": tmp_path / "out", "save_steps": 2}
    first = trained(*LORA, **flags)
    before = load_encoder(published(first, 2))
    for checkpoint in run_checkpoints(first):
        if checkpoint.step == 2:
            first.client.delete_logged_model(checkpoint.model_id)
    assert ready_steps(first) == {0, 4}
    again = trained(*LORA, "--resume_from_checkpoint", **flags)
    assert again.id == first.id
    assert again.status == "FINISHED"
    assert ready_steps(again) == {0, 2, 4}
    made_up = load_encoder(published(again, 2))
    for republished, original in zip(
        made_up.distinct_encoders, before.distinct_encoders, strict=True
    ):
        torch.testing.assert_close(republished(IDS, MASK), original(IDS, MASK))


def test_two_encoders_are_published(
    trained: Make, published: Make, trainers: list[RetrieverTrainer]
) -> None:
    loaded = load_encoder(published(trained("--untie_encoder")))
    torch.testing.assert_close(loaded(IDS, MASK), vectors_of(trainers[-1]))
    queries = trainers[-1]._encoder.query_encoder.eval()(IDS, MASK)
    torch.testing.assert_close(loaded.query_encoder(IDS, MASK), queries)
    assert not torch.allclose(loaded(IDS, MASK), queries, atol=1e-3)


def test_a_mixture_is_shown_with_all_its_parts(trained: Make, folder: Path, scored: Path) -> None:
    run = trained(dataset=f"{folder}@1+{scored}@2", train_n_passages=1)
    entries = run.fetch().inputs.dataset_inputs
    assert {entry.dataset.name for entry in entries} == {str(folder), str(scored)}
    assert run.fetch().data.params["dataset"] == str(folder)


def test_files_without_judgements_train_with_a_warning(
    trained: Make, scored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(dataset=scored, train_n_passages=2)
    assert run.status == "FINISHED"
    assert (
        "validators cannot evaluate on it; name a collection that has some by --validation_dataset"
        in caplog.text
    )


def test_nan_weights_end_the_run_as_failed(
    trained: Make, saved: Path, tmp_path: Path, last_run: Make
) -> None:
    broken = load_encoder(saved)
    next(broken.parameters()).data.fill_(float("nan"))
    save_encoder(tmp_path / "broken", broken)
    with pytest.raises(TrainingError, match=r"loss of step 1 is nan \(queries 'q\d'") as caught:
        trained(model=tmp_path / "broken")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert last_run().status == "FAILED"


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that has this process sent SIGTERM in the step that it names."""
    plain = Objective.__call__

    def at(step: int) -> None:
        steps: list[int] = []

        def counted(*arguments: Any) -> Any:
            steps.append(1)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*arguments)

        monkeypatch.setattr(Objective, "__call__", counted)

    return at


SAVING = {"save_steps": 100, "max_steps": 7}


def test_a_resumed_training_has_the_same_run_and_losses(
    trained: Make,
    last_run: Make,
    signalled: Callable[[int], None],
    tmp_path: Path,
) -> None:
    """Training resumes in its second epoch. No step is published twice, and each has one point."""
    undisturbed = trained(**SAVING, output_dir=tmp_path / "one")
    stopped = 3
    signalled(stopped)
    with pytest.raises(KeyboardInterrupt):
        trained(**SAVING, output_dir=tmp_path / "two")
    first = last_run()
    assert first.status == "KILLED"
    assert [step for step, _ in first.points()] == list(range(1, stopped + 1))
    assert (tmp_path / "two" / f"checkpoint-{stopped}").is_dir()
    resumed = trained("--resume_from_checkpoint", **SAVING, output_dir=tmp_path / "two")
    assert resumed.id == first.id
    assert resumed.status == "FINISHED"
    for name in ("train/loss", "data/wait_p99_ms", "data/samples_per_second"):
        assert [step for step, _ in resumed.points(name)] == list(range(1, 8))
    assert resumed.losses() == pytest.approx(undisturbed.losses(), rel=1e-6)
    steps = [checkpoint.step for checkpoint in run_checkpoints(resumed)]
    assert sorted(steps) == sorted({0, 2, 4, 6, 7, stopped})
    means = [
        json.loads(run.fetch().data.tags["mlflow_dr.training_summary"])["mean_loss"]
        for run in (resumed, undisturbed)
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def test_resuming_a_finished_training_does_nothing_twice(trained: Make, tmp_path: Path) -> None:
    options = {"save_steps": 4, "output_dir": tmp_path / "out"}
    first = trained(**options)
    again = trained("--resume_from_checkpoint", **options)
    assert again.id == first.id
    assert again.status == "FINISHED"
    assert len(run_checkpoints(again)) == 3
    assert [step for step, _ in again.points()] == [1, 2, 3, 4]
    info = again.fetch().info
    for refused in ({"validation_fraction": 0.2, "learning_rate": 1}, {"model": "nowhere/there"}):
        with pytest.raises(UsageError):
            trained("--resume_from_checkpoint", **{**options, **refused})
        assert (again.status, again.seen.info.end_time) == (info.status, info.end_time)
    assert "mlflow_dr.resumed" not in again.seen.data.tags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "nowhere/at/all"}, "not a directory"),
        ({"model": "tiny", "tokenizer_name": "bert-base-uncased"}, "cannot be used with tiny"),
        ({"fix_ctx_encoder": True}, "fix_ctx_encoder"),
    ],
)
def test_an_encoder_that_cannot_be_trained_starts_no_run(
    trained: Make,
    client: MlflowClient,
    experiment: str,
    flags: dict[str, Any],
    message: str,
) -> None:
    before = client.search_runs([experiment])
    with pytest.raises(UsageError, match=message):
        trained(**flags)
    assert len(client.search_runs([experiment])) == len(before)


def test_without_a_checkpoint_resuming_starts_no_run(
    trained: Make, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    before = client.search_runs([experiment])
    with pytest.raises(UsageError, match="no training was started there") as caught:
        trained("--resume_from_checkpoint", output_dir=tmp_path / "nowhere")
    assert "\n" not in str(caught.value)
    assert len(client.search_runs([experiment])) == len(before)


def test_checkpoints_of_another_training_are_removed_only_on_request(
    trained: Make, tmp_path: Path
) -> None:
    options = {"save_steps": 2, "output_dir": tmp_path / "out"}
    first = trained(**options)
    with pytest.raises(UsageError, match="remove them by --overwrite_output_dir"):
        trained(**options)
    assert (tmp_path / "out" / "checkpoint-4").is_dir()
    second = trained("--overwrite_output_dir", **{**options, "max_steps": 2})
    assert second.id != first.id
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_request_on_the_run_ends_the_training(
    trained: Make, last_run: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After the step that runs; it is published, and the run has come to a good end."""
    plain = Objective.__call__
    steps: list[int] = []

    def asked_in_step_3(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            (watcher,) = (
                thread for thread in threading.enumerate() if thread.name == "stop-watcher"
            )
            request_stop(last_run(), "good enough")
            watcher.join(30)
        return plain(*arguments)

    monkeypatch.setattr(Objective, "__call__", asked_in_step_3)
    monkeypatch.setattr(train_module, "StopWatcher", partial(StopWatcher, seconds=0.05))
    with caplog.at_level(logging.INFO, "mlflow_dr"):
        run = trained(max_steps=50)
    assert [step for step, _ in run.points()] == [1, 2, 3]
    assert max(ready_steps(run)) == 3
    assert run.status == "FINISHED"
    assert "training ended as asked: good enough" in caplog.text


@pytest.fixture
def no_store(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Run]:
    """A function to the run of the experiment whose artifacts would lie below a file."""
    monkeypatch.setattr(train_module, "Publisher", partial(Publisher, pause=0.0))
    (tmp_path / "a file").write_text("")
    location = str(tmp_path / "a file" / "x")
    experiment = client.create_experiment(f"no store {tmp_path}", location)
    return lambda: Run(client, client.search_runs([experiment])[0])


def test_training_stops_and_fails_if_nothing_can_be_published(
    trained: Make, no_store: Make, tmp_path: Path, trainers: list[RetrieverTrainer]
) -> None:
    """The last encoder and a checkpoint to resume from are kept."""
    flags = {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1000}
    with pytest.raises(TrackingError, match=r"training has stopped: step .*Not a directory") as bad:
        trained(experiment_name=f"no store {tmp_path}", output_dir=tmp_path / "out", **flags)
    last = trainers[-1].state.global_step
    assert 0 < last < 100_000
    assert no_store().status == "FAILED"
    kept = tmp_path / "out" / f"unpublished-{last}"
    assert f"saved in {kept}" in str(bad.value)
    assert "continue it with --resume_from_checkpoint" in str(bad.value)
    assert "\n" not in str(bad.value)
    assert len(str(bad.value)) < 500 + len(str(kept))
    torch.testing.assert_close(load_encoder(kept)(IDS, MASK), vectors_of(trainers[-1]))
    assert (tmp_path / "out" / f"checkpoint-{last}").is_dir()


def test_training_fails_if_its_last_checkpoint_is_not_published(
    trained: Make,
    last_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainers: list[RetrieverTrainer],
) -> None:
    """For a reason that might have passed; those before are published."""
    plain = publishing.upload_checkpoint
    away = [True]

    def broken(run: TrackedRun, model_id: str, directory: Path, step: int) -> None:
        if step == 4 and away:
            raise MlflowException("no route to host")
        plain(run, model_id, directory, step)

    monkeypatch.setattr(publishing, "upload_checkpoint", broken)
    monkeypatch.setattr(train_module, "Publisher", partial(Publisher, pause=0.0))
    with pytest.raises(TrackingError, match="step 4 was not published: no route to host") as bad:
        trained(output_dir=tmp_path / "out")
    assert last_run().status == "FAILED"
    assert ready_steps(last_run()) == {0, 2}
    kept = tmp_path / "out" / "unpublished-4"
    assert f"saved in {kept}" in str(bad.value)
    torch.testing.assert_close(load_encoder(kept)(IDS, MASK), vectors_of(trainers[-1]))
    away.clear()
    assert publish_checkpoint(kept, 4, run_id=last_run().id)
    assert ready_steps(last_run()) == {0, 2, 4}


def test_a_damaged_checkpoint_is_not_resumed_from(
    trained: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"output_dir": tmp_path / "out", "save_steps": 2}
    first = trained(**flags)
    path = tmp_path / "out" / "checkpoint-4" / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.INFO, "mlflow_dr"):
        again = trained("--resume_from_checkpoint", **flags)
    assert (again.id, again.status) == (first.id, "FINISHED")
    assert (
        "checkpoint-4: optimizer.pt has other bytes than were saved; this checkpoint is not used"
        in caplog.text
    )
    assert f"resuming run {first.id} from checkpoint-2" in caplog.text
    assert [step for step, _ in again.points()] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_training_is_one_error_line(trained: Make, tmp_path: Path) -> None:
    """Files that are as they were saved, and of another kind."""
    flags = {"output_dir": tmp_path / "out", "save_steps": 2, "max_steps": 2}
    run = trained(**flags)
    directory = tmp_path / "out" / "checkpoint-2"
    contents = {
        "optimizer.pt": [{}, {"state": 3, "param_groups": []}, torch.zeros(3)],
        "scheduler.pt": [[], torch.zeros(3)],
        "rng_state.pth": [{"python": 3}, None],
        "trainer_state.json": ["[]", "{", '{"global_step": "x"}', '{"surprise": 1}'],
        "mlflow_dr_progress.json": ["[]", "{", "{}", '{"loss": [], "total": 0, "logged": 0}'],
    }
    flags["max_steps"] = 3
    for name, values in contents.items():
        path = directory / name
        sound = path.read_bytes()
        for value in values:
            if isinstance(value, str):
                path.write_text(value)
            else:
                torch.save(value, path)
            mark_complete(directory, run.id)
            with pytest.raises(CheckpointError, match=f"checkpoint-2: .*{name}") as caught:
                trained("--resume_from_checkpoint", **flags)
            assert "\n" not in str(caught.value)
        path.write_bytes(sound)
    mark_complete(directory, run.id)
    assert trained("--resume_from_checkpoint", **flags).status == "FINISHED"


def test_a_second_training_in_one_output_directory_is_refused(
    trained: Make, client: MlflowClient, experiment: str, tmp_path: Path
) -> None:
    """It is refused before it has a run; a training that saves nothing may share the directory."""
    flags = {"output_dir": tmp_path / "out"}
    before = len(client.search_runs([experiment]))
    with claimed_output(tmp_path / "out", None, saves=True):
        with pytest.raises(UsageError, match=r"another training .* is writing there"):
            trained(save_steps=2, **flags)
        assert len(client.search_runs([experiment])) == before
        assert trained(**flags).status == "FINISHED"


def test_changed_flags_of_a_resumed_training_are_logged_and_noted(
    trained: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Params are written once and keep the first ones."""
    flags = {"output_dir": tmp_path / "out", "save_steps": 2, "save_total_limit": 3}
    first = trained(**flags)
    caplog.clear()
    more = {**flags, "max_steps": 6, "learning_rate": "5e-3", "logging_steps": 2}
    second = trained("--resume_from_checkpoint", **more)
    assert second.id == first.id
    (message,) = (text for text in caplog.messages if "resuming with changed flags" in text)
    assert "learning_rate 0.005 (was 0.01), max_steps 6 (was 4); they hold from" in message
    data = second.fetch().data
    assert data.params["max_steps"] == "4"
    noted = {"checkpoint-4": {"learning_rate": "0.005", "max_steps": "6"}}
    assert json.loads(data.tags["mlflow_dr.resumed"]) == noted
    assert max(step for step, _ in second.points()) == 6
    caplog.clear()
    trained("--resume_from_checkpoint", **more)
    assert "resuming with changed flags" not in caplog.text
    trained("--resume_from_checkpoint", **{**more, "max_steps": 7})
    assert "max_steps 7 (was 6)" in caplog.text
    noted["checkpoint-6"] = {"max_steps": "7"}
    assert json.loads(second.fetch().data.tags["mlflow_dr.resumed"]) == noted


def test_system_metrics_are_on_the_run_unless_mlflow_logs_none(
    trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At MLflow's own interval, and further where a training is resumed."""
    name = "system/cpu_utilization_percentage"
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    assert trained(max_steps=1).points(name) == []
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    flags = {"output_dir": tmp_path / "out", "save_steps": 4}
    first = trained(**flags)
    steps = [step for step, _ in first.points(name)]
    assert steps == list(range(len(steps))) and steps
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    again = trained("--resume_from_checkpoint", **{**flags, "max_steps": 8})
    more = [step for step, _ in again.points(name)]
    assert more == list(range(len(more))) and len(more) > len(steps)


def test_a_damaged_checkpoint_is_not_published_when_resumed(
    trained: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"output_dir": tmp_path / "out", "save_steps": 2}
    first = trained(**flags)
    for checkpoint in run_checkpoints(first):
        if checkpoint.step == 2:
            first.client.delete_logged_model(checkpoint.model_id)
    path = tmp_path / "out" / "checkpoint-2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert ready_steps(trained("--resume_from_checkpoint", **flags)) == {0, 4}
    assert "checkpoint-2: model.safetensors has other bytes than were saved" in caplog.text
    assert "step 2 was not published before the training was stopped" in caplog.text
