"""A training that is killed, or asked to stop, and goes on: as if it had never been stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
        "dataloader_num_workers": 1,
    },
}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    printed: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.printed)


class Trainings:
    """Trainings in forks of one process, and the store that they write to."""

    def __init__(self, process: subprocess.Popen, client: MlflowClient, **flags: Path) -> None:
        self._process = process
        self._flags = flags
        self.client = client

    def train(
        self,
        output: Path,
        *words: str,
        die: tuple[str, signal.Signals] = ("nowhere", signal.SIGKILL),
        kill: tuple[str, float, signal.Signals] | None = None,
        **flags: Any,
    ) -> Ended:
        """Run `mlflow-dr train`.

        Args:
            output: its --output_dir.
            words: more flags.
            die: a place at which the training sends itself a signal.
            kill: a beginning of a line that it prints, seconds from there, and a signal.
            flags: flags with their values.
        """
        chosen = {**FLAGS, **self._flags, "output_dir": output, **flags}
        pairs = [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]
        command = ["1", die[0], die[1].name, "train", *words, *pairs]
        print(*command, file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline().removeprefix("started "))
        printed: list[str] = []
        for line in self._process.stdout:
            if line.startswith("ended "):
                return Ended(int(line.split()[1]), printed)
            printed.append(line.rstrip())
            if kill is not None and line.startswith(kill[0]):
                time.sleep(kill[1])
                os.kill(pid, kill[2])
                kill = None
        pytest.fail("\n".join(printed))

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
        """How often each step is there and whole; nothing else may be left on its way."""
        experiment = self.client.get_run(run_id).info.experiment_id
        models = list(self.client.search_logged_models([experiment], f"source_run_id = '{run_id}'"))
        assert not [one for one in models if one.status == LoggedModelStatus.PENDING]
        ready = [one for one in models if one.status == LoggedModelStatus.READY]
        return Counter(int(one.tags["mlflow_dr.step"]) for one in ready)


@pytest.fixture(scope="module")
def trainings(
    start: Callable[..., subprocess.Popen],
    collection: Path,
    tiny_directory: Path,
    tmp_path_factory: Any,
) -> Iterator[Trainings]:
    """MLflow's thread waits for a second before it sends figures, and those are lost in a kill."""
    room = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{room}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment("resume", (room / "artifacts").as_uri())
    script = Path(__file__).parent / "forked_trainings.py"
    variables = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1"}
    process = start(sys.executable, script, stdin=subprocess.PIPE, **variables)
    yield Trainings(process, client, dataset=collection, model=tiny_directory)
    process.stdin.close()
    process.wait(timeout=10)
    process.stdout.close()


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
def test_killed_at_any_place_and_resumed_it_ends_as_if_undisturbed(
    trainings: Trainings, tmp_path: Path, variant: str, places: list[str]
) -> None:
    flags = VARIANTS[variant]
    undisturbed = trainings.train(tmp_path / "one", **flags)
    assert undisturbed.code == 0, undisturbed.text
    expected = trainings.last_run()
    resume: list[str] = []
    for place in places:
        ended = trainings.train(tmp_path / "two", *resume, die=(place, signal.SIGKILL), **flags)
        assert ended.code == -signal.SIGKILL, f"{place}: {ended.text}"
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


def test_killed_at_any_moment_and_resumed_it_ends_as_if_undisturbed(
    trainings: Trainings, tmp_path: Path
) -> None:
    """At moments that nobody chose; each gets a bit further."""
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
def test_asked_to_stop_it_saves_publishes_and_says_so(
    trainings: Trainings, tmp_path: Path, number: signal.Signals
) -> None:
    flags = {"save_steps": 100, "max_steps": 500, "logging_steps": 1}
    ended = trainings.train(tmp_path, kill=("step 4 of", 0.0, number), **flags)
    assert ended.code == INTERRUPTED, ended.text
    assert ended.printed[-1].endswith("stopped")
    assert "Traceback" not in ended.text
    assert "stopping after this step; once more to stop at once" in ended.text
    run_id = trainings.last_run()
    assert trainings.status(run_id) == "KILLED"
    last = max(trainings.points(run_id))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert max(trainings.published(run_id)) == last


def test_a_damaged_newest_checkpoint_is_passed_over(trainings: Trainings, tmp_path: Path) -> None:
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


def test_a_loss_that_is_no_number_is_one_line_and_a_failed_run(
    trainings: Trainings, tmp_path: Path, tiny_directory: Path
) -> None:
    from mlflow_dr.encoder.directory import load_encoder, save_encoder

    encoder = load_encoder(tiny_directory)
    next(encoder.parameters()).data.fill_(float("nan"))
    save_encoder(tmp_path / "broken", encoder)
    ended = trainings.train(tmp_path / "out", model=tmp_path / "broken", publish_initial=False)
    assert ended.code == 1
    assert ended.printed[-1].startswith("error: the loss of step 1 is nan (queries 'q")
    assert "Traceback" not in ended.text
    assert trainings.status(trainings.last_run()) == "FAILED"
