"""A training that is killed, or asked to stop, and goes on: as if it had never been stopped."""

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

INTERRUPTED = 130
STEPS = 12

FLAGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 16,
    "p_max_len": 16,
    "logging_steps": 1,
    "publish_steps": 4,
    "save_total_limit": 2,
    "bf16": False,
    "experiment_name": "resume",
}
# the collection has 240 examples
VARIANTS: dict[str, dict[str, Any]] = {
    # an epoch has 8 steps
    "accumulated": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 15,
        "save_steps": 2,
    },
    # an epoch has 10 steps, and what is logged is not what is saved
    "logged every third": {
        "per_device_train_batch_size": 24,
        "logging_steps": 3,
        "save_steps": 2,
        "bf16": True,
        "grad_cache": True,
        "gc_p_chunk_size": 6,
    },
}


class Trainings:
    """Trainings, and the store that they write to."""

    def __init__(self, forked: Callable[..., Any], client: MlflowClient, **flags: Path) -> None:
        self._forked = forked
        self._flags = flags
        self.client = client

    def train(self, output: Path, *argv: str, **options: Any) -> Any:
        """Run `mlflow-dr train`.

        Args:
            output: its --output_dir.
            argv: more flags.
            options: `die` and `kill` as `forked` has them, and flags with their values.
        """
        ways = {name: options.pop(name) for name in ("die", "kill") if name in options}
        chosen = {**FLAGS, **self._flags, "output_dir": output, **options}
        pairs = [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]
        # MLflow's thread waits for a second before it sends figures; those are lost in a kill
        variables = {"MLFLOW_TRACKING_URI": self.client.tracking_uri}
        return self._forked("train", *argv, *pairs, **ways, **variables)

    def last_run(self) -> str:
        experiment = self.client.get_experiment_by_name("resume")
        return self.client.search_runs([experiment.experiment_id], max_results=1)[0].info.run_id

    def status(self, run_id: str) -> str:
        return str(self.client.get_run(run_id).info.status)

    def points(self, run_id: str, name: str = "train/loss") -> dict[int, list[float]]:
        """step -> values."""
        found: dict[int, list[float]] = {}
        for point in self.client.get_metric_history(run_id, name):
            found.setdefault(point.step, []).append(point.value)
        return dict(sorted(found.items()))

    def published(self, run_id: str) -> Counter[int]:
        """How often each step is there and complete; no checkpoint may be left pending."""
        experiment = self.client.get_run(run_id).info.experiment_id
        models = list(self.client.search_logged_models([experiment], f"source_run_id = '{run_id}'"))
        assert not [model for model in models if model.status == LoggedModelStatus.PENDING]
        ready = [model for model in models if model.status == LoggedModelStatus.READY]
        return Counter(int(model.tags["mlflow_dr.step"]) for model in ready)


@pytest.fixture(scope="module")
def trainings(
    forked: Callable[..., Any],
    collection: Path,
    tiny_directory: Path,
    empty_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trainings:
    directory = tmp_path_factory.mktemp("store")
    shutil.copy(empty_store, directory / "mlflow.db")
    client = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    client.create_experiment("resume", (directory / "artifacts").as_uri())
    return Trainings(forked, client, dataset=collection, model=tiny_directory)


@pytest.mark.parametrize(
    ("variant", "places"),
    [
        (
            "accumulated",
            [
                *("beginning-1", "step-3", "saving-1", "marking-1", "marked-1", "uploading-1"),
                *("rotating-2", "finishing-1"),
            ],
        ),
        ("logged every third", ["step-2", "marked-2", "saving-2", "uploading-1", "marked-1"]),
    ],
)
def test_a_training_killed_at_any_point_and_resumed_ends_the_same(
    trainings: Trainings, tmp_path: Path, variant: str, places: list[str]
) -> None:
    flags = VARIANTS[variant]
    undisturbed = trainings.train(tmp_path / "one", **flags)
    assert undisturbed.code == 0, undisturbed.text
    expected = trainings.last_run()
    resume: list[str] = []
    workers = {"dataloader_num_workers": 1}  # change nothing, and take seconds to start
    for moment in places:
        die = (moment, signal.SIGKILL)
        ended = trainings.train(tmp_path / "two", *resume, die=die, **flags, **workers)
        workers = {}
        assert ended.code == -signal.SIGKILL, f"{moment}: {ended.text}"
        resume = ["--resume_from_checkpoint"]
    ended = trainings.train(tmp_path / "two", *resume, **flags)
    assert ended.code == 0, ended.text
    run_id = trainings.last_run()
    assert run_id != expected
    _assert_same(trainings, run_id, expected)


def _assert_same(trainings: Trainings, run_id: str, expected: str) -> None:
    """One point of one value for each step, every checkpoint once, and a good end."""
    ours, theirs = trainings.points(run_id), trainings.points(expected)
    assert ours.keys() == theirs.keys()
    for step, values in theirs.items():
        assert ours[step] == pytest.approx(values, rel=1e-6), step
    name = "train/learning_rate"
    assert trainings.points(run_id, name) == trainings.points(expected, name)
    assert trainings.published(run_id) == trainings.published(expected)
    assert trainings.status(run_id) == trainings.status(expected) == "FINISHED"


def test_a_training_killed_at_any_time_and_resumed_ends_the_same(
    trainings: Trainings, tmp_path: Path
) -> None:
    """Training is killed at unplanned moments, each a little later than the one before."""
    flags = {"save_steps": 1, "logging_steps": 1, "save_total_limit": STEPS}
    assert trainings.train(tmp_path / "one", **flags).code == 0
    expected = trainings.last_run()
    chance = random.Random()
    moments = [(step, chance.uniform(0, 0.3)) for step in (1, 4, 7, 10)]
    resume: list[str] = []
    for step, seconds in moments:
        line = f"step {step} of {STEPS}"
        kill = (line, seconds, signal.SIGKILL)
        ended = trainings.train(tmp_path / "two", *resume, kill=kill, **flags)
        assert ended.code in (-signal.SIGKILL, 0), ended.text
        resume = ["--resume_from_checkpoint"]
    ended = trainings.train(tmp_path / "two", *resume, **flags)
    assert ended.code == 0, f"{moments}: {ended.text}"
    _assert_same(trainings, trainings.last_run(), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_publishes(
    trainings: Trainings, tmp_path: Path, number: signal.Signals
) -> None:
    flags = {"save_steps": 100, "max_steps": 500, "logging_steps": 1}
    ended = trainings.train(tmp_path, kill=("step 4 of", 0.0, number), **flags)
    assert ended.code == INTERRUPTED, ended.text
    assert ended.printed[-1].endswith("stopped")
    assert "Traceback" not in ended.text
    assert "stopping after this step; send the signal again to stop at once" in ended.text
    run_id = trainings.last_run()
    assert trainings.status(run_id) == "KILLED"
    last = max(trainings.points(run_id))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert max(trainings.published(run_id)) == last


def test_a_damaged_newest_checkpoint_is_not_used(trainings: Trainings, tmp_path: Path) -> None:
    flags = {"save_steps": 4}
    assert trainings.train(tmp_path, die=("finishing-1", signal.SIGKILL), **flags).code != 0
    run_id = trainings.last_run()
    weights = tmp_path / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ended = trainings.train(tmp_path, "--resume_from_checkpoint", **flags)
    assert ended.code == 0, ended.text
    assert f"resuming run {run_id} from checkpoint-8" in ended.text
    points = trainings.points(run_id)
    assert list(points) == list(range(1, STEPS + 1))
    assert all(len(values) == 1 for values in points.values())
    assert trainings.status(run_id) == "FINISHED"


def test_nothing_to_resume_is_one_line(trainings: Trainings, tmp_path: Path) -> None:
    ended = trainings.train(tmp_path / "out", "--resume_from_checkpoint")
    assert ended.code == 2
    (line,) = ended.printed
    assert line.startswith(f"error: {tmp_path}/out: no training was started there")


def test_a_nan_loss_is_one_line_and_a_failed_run(
    trainings: Trainings, tmp_path: Path, tiny_directory: Path
) -> None:
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.encoder.saving import save_encoder

    encoder = load_encoder(tiny_directory)
    next(encoder.parameters()).data.fill_(float("nan"))
    save_encoder(tmp_path / "broken", encoder)
    ended = trainings.train(tmp_path / "out", model=tmp_path / "broken", publish_initial=False)
    assert ended.code == 1
    assert ended.printed[-1].startswith("error: the loss of step 1 is nan (queries 'q")
    assert "Traceback" not in ended.text
    assert trainings.status(trainings.last_run()) == "FAILED"
