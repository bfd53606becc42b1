"""Checkpoints on a real server, validators as processes, and a count of the results."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mlflow import MlflowClient

from benchmarks.faulting.process import Process, all_ended
from benchmarks.server import Server
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.encoder.backbone import tiny_encoder
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import MlflowDrError
from mlflow_dr.tracking.artifacts import per_query_values
from mlflow_dr.tracking.checkpoints import checkpoint_by_id, publish
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.results import State, validation_state
from mlflow_dr.tracking.runs import TrackedRun

PASSAGES, QUERIES, WORDS = 400, 60, 900  # enough that untrained encoders differ
MEASURES = "mrr@10 ndcg@10"
METRICS = ("mrr_at_10", "ndcg_at_10")
STARTS = 4  # how often a validator is started if it ends with an error

COUNTS = (
    *("checkpoints", "points", "doubled", "lost", "different", "failed", "unkept"),
    *("tracebacks", "surprises"),
)

Points = dict[str, dict[int, list[float]]]
"""metric -> step -> values."""


def points(client: MlflowClient, run_id: str, name: str) -> Points:
    """The points that a validation's metrics have on a run."""
    found: Points = {}
    for metric in METRICS:
        steps = found.setdefault(metric, {})
        for point in client.get_metric_history(run_id, f"{name}/{metric}"):
            steps.setdefault(point.step, []).append(point.value)
    return found


@dataclass
class Row:
    """The result of a scenario.

    Attributes:
        scenario: its name.
        checkpoints: number of sound checkpoints.
        points: number of their points, over all metrics.
        doubled: points beyond the first of a metric and a step.
        lost: points that are missing.
        different: points whose value differs from an undisturbed run.
        failed: sound checkpoints that are FAILED.
        unkept: sound checkpoints without readable per-query values.
        tracebacks: number of tracebacks in the output of the validators.
        surprises: validators that did not end in time, or that ended with an unexpected
            exit code.
        codes: the exit codes of each validator, one for each start.
        seconds: time from the first start to the last end.
        notes: anything else.
    """

    scenario: str
    checkpoints: int = 0
    points: int = 0
    doubled: int = 0
    lost: int = 0
    different: int = 0
    failed: int = 0
    unkept: int = 0
    tracebacks: int = 0
    surprises: int = 0
    codes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all counts of errors are 0."""
        wrong = set(COUNTS) - {"checkpoints", "points"}
        return not any(getattr(self, name) for name in wrong)


class Scene:
    """A server, encoders of several steps, and the figures of an undisturbed validator.

    Args:
        server: a running server.
        workdir: the folder for all files.
        count: number of sound checkpoints in each scenario.
    """

    def __init__(self, server: Server, workdir: Path, count: int) -> None:
        self.server = server
        self.workdir = workdir
        self.client = connect(server.uri)
        self.steps = list(range(10, 10 * count + 10, 10))
        os.environ["MLFLOW_DR_CACHE"] = str(workdir / "cache")
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self.collection = _written_collection(workdir / "collection")
        for step in self.steps:
            save_encoder(self.encoder(step), _tiny(self.collection, step))
        run = self.new_run("undisturbed")
        self.publish(run)
        self.client.set_terminated(run.id)
        all_ended([self.validator(run, "undisturbed")])
        self.right = points(self.client, run.id, "val")
        self.config = self.config_of(run)
        if any(
            len(self.right[metric].get(step, ())) != 1 for metric in METRICS for step in self.steps
        ):
            raise SystemExit(
                "the undisturbed validator did not write one point for each metric and step"
            )

    def encoder(self, step: int) -> Path:
        """The directory of the sound encoder of a step."""
        return self.workdir / "encoders" / f"step-{step}"

    def new_run(self, name: str, store: str | None = None) -> TrackedRun:
        """A run in a new experiment; `store` is the URI of its artifacts."""
        experiment = self.client.create_experiment(name, artifact_location=store)
        run = TrackedRun(self.client, self.client.create_run(experiment, run_name=name))
        run.log_params({"dataset": str(self.collection), "validation_split": "dev"})
        return run

    def publish(self, run: TrackedRun, steps: Sequence[int] = ()) -> dict[int, str]:
        """Publish the sound encoders, or those of these steps; their model ids by step."""
        return {step: publish(run, self.encoder(step), step) for step in steps or self.steps}

    def validator(
        self,
        run: TrackedRun,
        name: str,
        variables: Mapping[str, str] | None = None,
        uri: str | None = None,
        before: Sequence[str] = (),
        starts: int = 1,
        expected: int | None = 0,
        more_flags: Sequence[str] = (),
        of_experiment: bool = False,
    ) -> Process:
        """A validator of a run, or, once, of its experiment.

        All validators share a cache and a temporary directory.
        """
        experiment = self.client.get_experiment(run.experiment_id).name
        follow = ["--experiment", experiment, "--once"] if of_experiment else ["--run-id", run.id]
        follow += ["--measures", MEASURES, "--poll-seconds", "0.5"]
        log = self.workdir / f"{experiment}, {name}.log"
        environment = {**self.variables(uri), **(variables or {})}
        return Process(
            ["validate", *follow, *more_flags], environment, log, name, before, starts, expected
        )

    def variables(self, uri: str | None = None) -> dict[str, str]:
        """Environment variables of a process that uses the server, or its proxy."""
        temporary = self.workdir / "tmp"
        temporary.mkdir(exist_ok=True)
        return {
            "MLFLOW_TRACKING_URI": uri or self.server.uri,
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
        }

    def row(
        self,
        scenario: str,
        run: TrackedRun,
        sound: Mapping[int, str],
        validators: Sequence[Process],
        seconds: float,
        undisturbed: str | None = None,
    ) -> Row:
        """Count the results of a run's sound checkpoints; the server is asked directly.

        They are compared with the validation `undisturbed` of the run, or with the scene's.
        """
        right = points(self.client, run.id, undisturbed) if undisturbed else self.right
        config = self.config_of(run, undisturbed) if undisturbed else self.config
        row = Row(scenario, len(sound), seconds=seconds)
        written = points(self.client, run.id, "val")
        for metric in METRICS:
            for step in sound:
                values = written[metric].get(step, [])
                row.points += len(values)
                row.doubled += max(0, len(values) - 1)
                row.lost += not values
                row.different += sum([value] != right[metric].get(step) for value in values)
        if (other := self.config_of(run)) != config:
            row.different += 1
            row.notes.append(f"the configuration of the validation differs: {other}")
        row.doubled += self._doubled_others(run, sound)
        for model_id in sound.values():
            checkpoint = checkpoint_by_id(self.client, model_id)
            row.failed += "mlflow_dr.validation.val.failed" in checkpoint.tags
            if validation_state(checkpoint, "val") is State.DONE:
                try:
                    per_query_values(run, checkpoint, "val")
                except MlflowDrError:
                    row.unkept += 1
        for validator in validators:
            row.codes.append(f"{validator.name} {','.join(map(str, validator.codes)) or '-'}")
            row.tracebacks += validator.tracebacks
            row.surprises += not validator.is_as_expected
        return row

    def _doubled_others(self, run: TrackedRun, sound: Mapping[int, str]) -> int:
        """Duplicate points of metrics that differ from run to run, such as seconds."""
        names = {name for name in self.client.get_run(run.id).data.metrics if "val/" in name}
        names -= {f"val/{metric}" for metric in METRICS}
        histories = [self.client.get_metric_history(run.id, name) for name in names]
        steps = [point.step for history in histories for point in history if point.step in sound]
        return len(steps) - len(names) * len(set(steps))

    def config_of(self, run: TrackedRun, name: str = "val") -> str | None:
        """The configuration that a run has recorded for a validation's name."""
        return self.client.get_run(run.id).data.params.get(f"mlflow_dr.validation.{name}")


def merged(scenario: str, rows: Sequence[Row]) -> Row:
    """Sum the rows of several runs; exit codes are listed only for validators that failed."""
    whole = Row(scenario)
    for row in rows:
        for name in COUNTS:
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
        whole.codes += [code for code in row.codes if not code.endswith(" 0")]
        whole.notes += row.notes
        whole.seconds += row.seconds
    whole.codes.append(f"others {len(rows) - len(whole.codes)} x 0")
    return whole


def _written_collection(folder: Path) -> Path:
    """Write passages of random words, and queries of three words of a passage, in BEIR's layout."""
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("abcdefghiklmnoprstu", k=5)) for _ in range(WORDS)]
    passages = [chance.choices(vocabulary, k=chance.randint(5, 30)) for _ in range(PASSAGES)]
    queries = [chance.sample(passage, 3) for passage in chance.sample(passages, QUERIES)]
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", passages), ("queries", queries)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"_id": f"{name[0]}{number}", "text": " ".join(text)}) + "\n")
    with (folder / "qrels" / "dev.tsv").open("w", encoding="utf-8") as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for number, query in enumerate(queries):
            found = next(row for row, text in enumerate(passages) if set(query) <= set(text))
            file.write(f"q{number}\tc{found}\t1\n")
    return folder


def _tiny(collection: Path, step: int) -> Encoder:
    corpus = open_collection(str(collection)).corpus()
    texts = [passage.text for batch in corpus.batches() for passage in batch]
    torch.manual_seed(step)
    return tiny_encoder(texts, EncoderConfig(pooling="mean", normalize=True)).eval()
