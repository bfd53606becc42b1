"""Runs: finding, opening and ending them; their params, metrics, tags and dataset inputs."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LifecycleStage,
    Metric,
    Param,
    Run,
    RunStatus,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils import name_utils
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from mlflow_dr import compat
from mlflow_dr.errors import RunGoneError, TrackingError, UsageError, did_you_mean
from mlflow_dr.tracking.client import URI_VARIABLE, connect, shown_uri, tracking_errors
from mlflow_dr.tracking.datasets import CollectionSource

log = logging.getLogger(__name__)

RUN_VARIABLE = "MLFLOW_RUN_ID"
# what a validator learns from a run; the tag has the full path of a folder, and the param what the
# user typed, because `mlflow run` may have logged it before
DATASET_PARAM, SPLIT_PARAM = "dataset", "validation_split"
DATASET_TAG = "mlflow_dr.dataset"
LONGEST_PARAM = 6000
PARAMS_PER_REQUEST, METRICS_PER_REQUEST = 100, 1000
OWN_TAGS = "mlflow_dr."
SHORT_ID, SHORTEST_ID, LONGEST_ID = 8, 4, 32  # characters
CANDIDATES = 5  # runs that an error lists
LATEST_RUNS = 200  # runs whose names are compared with an unknown name


class TrackedRun:
    """An MLflow run that is written to by its id; it never becomes the active run.

    Attributes:
        seen: the run as it was fetched last.
    """

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client = client
        self.id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.name: str = run.info.run_name or self.id
        self.seen = run

    @property
    def label(self) -> str:
        """Its name and the beginning of its id."""
        return f"{self.name} ({self.id[:SHORT_ID]})"

    def fetch(self) -> Run:
        """The current state of the run on the server."""
        with tracking_errors(f"run {self.id}"):
            self.seen = self.client.get_run(self.id)
        return self.seen

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log params that are not logged yet; `mlflow run` logs its own before a command starts."""
        logged = self.fetch().data.params
        new = [
            Param(key, str(value)[:LONGEST_PARAM])
            for key, value in params.items()
            if key not in logged and value is not None
        ]
        for start in range(0, len(new), PARAMS_PER_REQUEST):
            with tracking_errors(f"logging params of run {self.id}"):
                self.client.log_batch(self.id, params=new[start : start + PARAMS_PER_REQUEST])

    def set_param_once(self, key: str, text: str) -> str:
        """Write a param once; the first writer decides its value.

        No request is made if the run had the param when it was fetched last.

        Returns:
            The value of the param: this text, or an earlier one.

        Raises:
            TrackingError: the server does not answer.
        """
        if (known := self.seen.data.params.get(key)) is not None:
            return str(known)
        with tracking_errors(f"param {key!r} of run {self.id}"):
            try:
                # the server refuses a second value
                self.client.log_param(self.id, key, text)
            except Exception:
                stored: str | None = self.fetch().data.params.get(key)
                if stored is None:
                    raise
                return stored
        return text

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics from a thread of MLflow's, without waiting for the server."""
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, step) for key, value in values.items()]
        try:
            self.client.log_batch(self.id, metrics=metrics, synchronous=False)
        except (MlflowException, OSError) as error:
            log.warning("metrics of step %d were not logged: %s", step, error)

    def log_report(self, values: Mapping[str, float], files: Mapping[str, str]) -> None:
        """Log the results of a command: values as metrics, texts as artifacts, by their names.

        Raises:
            TrackingError: the server did not take it.
        """
        now = int(time.time() * 1000)
        metrics = [Metric(key, float(value), now, 0) for key, value in values.items()]
        with tracking_errors(f"logging to run {self.id}"):
            self.client.log_batch(self.id, metrics=metrics)
            for name, text in files.items():
                self.client.log_text(self.id, text, name)

    def log_child(
        self,
        name: str,
        params: Mapping[str, Any],
        metrics: Sequence[Mapping[str, float]],
    ) -> None:
        """Log a child run that is finished.

        Args:
            name: of the child run.
            params: its params.
            metrics: its metrics at step 0, 1, ...

        Raises:
            TrackingError: the server did not take it.
        """
        now = int(time.time() * 1000)
        points = [
            Metric(key, float(value), now, step)
            for step, values in enumerate(metrics)
            for key, value in values.items()
            if math.isfinite(value)
        ]
        child = self.create_child(name).id
        with tracking_errors(f"logging a child of run {self.id}"):
            pairs = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()]
            self.client.log_batch(child, params=pairs)
            for start in range(0, len(points), METRICS_PER_REQUEST):
                self.client.log_batch(child, points[start : start + METRICS_PER_REQUEST])
            self.client.set_terminated(child, "FINISHED")

    def create_child(self, name: str) -> TrackedRun:
        """Create a run that MLflow's pages show below this one; it is running.

        Raises:
            TrackingError: the server did not take it.
        """
        tags = {**dict(resolve_tags()), MLFLOW_PARENT_RUN_ID: self.id}
        with tracking_errors(f"creating a child of run {self.id}"):
            child = self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        return TrackedRun(self.client, child)

    def last_step(self, metric: str) -> int | None:
        """The last step that has a value of a metric; None if there is none."""
        return max((point.step for point in self.metric_history(metric)), default=None)

    def metric_history(self, metric: str) -> list[Metric]:
        """All values of a metric."""
        with tracking_errors(f"metrics of run {self.id}"):
            return list(self.client.get_metric_history(self.id, metric))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        with tracking_errors(f"tagging run {self.id}"):
            for key, value in tags.items():
                self.client.set_tag(self.id, key, value)

    def log_collection(
        self,
        name: str,
        digest: str,
        source: str,
        profile: Mapping[str, Any],
        context: str,
        collection: str | None = None,
    ) -> None:
        """Log a collection as a dataset input of the run.

        Args:
            name: of the collection.
            digest: of its contents.
            source: where it comes from.
            profile: its sizes and `split`.
            context: what it was used for, such as `training`.
            collection: what `open_collection` takes; the name when None.
        """
        origin = CollectionSource(collection or name, profile.get("split"), source)
        dataset = Dataset(
            name=name,
            digest=digest,
            source_type=origin._get_source_type(),
            source=origin.to_json(),
            profile=json.dumps(profile),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        with tracking_errors(f"logging the collection of run {self.id}"):
            self.client.log_inputs(self.id, [entry])

    @contextmanager
    def finish_on_exit(self, what: str, before: Run | None = None) -> Iterator[None]:
        """End the run with the block: FINISHED, FAILED after an error, KILLED after Ctrl-C.

        Args:
            what: what the block does, for the log.
            before: a run that continues, as it was; one that had ended stays so when its
                continuation is refused by a UsageError.
        """
        try:
            yield
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            try:
                if isinstance(error, UsageError) and before is not None and is_over(before):
                    self.finish(before.info.status, before.info.end_time)
                else:
                    self._end(status, what)
            except TrackingError as second:  # the first error says more
                log.error("%s", second)
            raise
        self._end("FINISHED", what)

    def _end(self, status: str, what: str) -> None:
        self.finish(status)
        log.info("run %s: %s %s", self.id, what, status.lower())

    def finish(self, status: str, milliseconds: int | None = None) -> None:
        """End the run with a status, after pending metrics: `FINISHED`, `FAILED` or `KILLED`."""
        with tracking_errors(f"ending run {self.id}"):
            self.client.set_terminated(self.id, status, milliseconds)


def open_run(
    client: MlflowClient,
    experiment: str | None = None,
    run_id: str | None = None,
    name: str | None = None,
    default_name: str | None = None,
) -> TrackedRun:
    """An existing run: the given one, or that of `mlflow run` or a parent process; else a new one.

    Args:
        client: of the tracking server.
        experiment: name of the experiment of a new run; MLflow's own variables when None.
        run_id: of an existing run that continues.
        name: of the run; an existing run is renamed.
        default_name: instead of a name that MLflow would choose, or has chosen.
    """
    context = dict(resolve_tags())
    if run_id := run_id or os.environ.get(RUN_VARIABLE):
        run = find_run(client, run_id)
        run.set_tags({k: v for k, v in context.items() if k.startswith(OWN_TAGS)})
        status = "RUNNING" if is_over(run.fetch()) else None
        name = name or (default_name if compat.is_generated_name(name_utils, run.name) else None)
        if status or name:
            with tracking_errors(f"updating run {run_id}"):
                client.update_run(run_id, status=status, name=name)
            run = find_run(client, run_id)
        return run
    with tracking_errors("creating a run"):
        created = client.create_run(
            _experiment(client, experiment), tags=context, run_name=name or default_name
        )
    return TrackedRun(client, created)


def find_run(client: MlflowClient, run_id: str) -> TrackedRun:
    """An existing run, by its complete id.

    Raises:
        RunGoneError: there is no run with that id, or it was deleted.
        TrackingError: the server does not answer.
    """
    run = _run_with_id(client, run_id)
    if run is None:
        raise RunGoneError(f"no run {run_id!r} on {shown_uri()}; check the id and {URI_VARIABLE}")
    check_alive(run)
    return TrackedRun(client, run)


def resolve_run(client: MlflowClient, text: str) -> TrackedRun:
    """The run that a user means: by its id, the beginning of its id, or its name.

    Raises:
        UsageError: several runs match; the message has their ids.
        RunGoneError: there is no such run (the message has the nearest name), or it was deleted.
        TrackingError: the server does not answer.
    """
    if _run_with_id(client, text) is not None:
        return find_run(client, text)
    if len(text) == LONGEST_ID and _is_hex(text):
        return find_run(client, text)  # raises
    with tracking_errors(f"looking for run {text!r}"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]

        def search(condition: str, most: int) -> list[Run]:
            newest_first = ["attributes.start_time DESC"]
            runs = client.search_runs(
                experiments, condition, max_results=most, order_by=newest_first
            )
            return list(runs)

        quote = '"' if "'" in text else "'"
        runs = search(f"attributes.run_name = {quote}{text}{quote}", CANDIDATES + 1)
        if not runs and len(text) >= SHORTEST_ID and _is_hex(text):
            runs = search(f"attributes.run_id LIKE '{text}%'", CANDIDATES + 1)
        names = [] if runs else [run.info.run_name or "" for run in search("", LATEST_RUNS)]
    if not runs:
        raise RunGoneError(
            f"no run {text!r} on {shown_uri()}{did_you_mean(text, names)}; give an id, the "
            f"beginning of one, or a run's name, and check {URI_VARIABLE}"
        )
    if len(runs) > 1:
        labels = [TrackedRun(client, run).label for run in runs[:CANDIDATES]]
        more = ", ..." if len(runs) > CANDIDATES else ""
        raise UsageError(
            f"run {text!r} could be {', '.join(labels)}{more}; give the id of the one you mean"
        )
    return TrackedRun(client, runs[0])


def _run_with_id(client: MlflowClient, run_id: str) -> Run | None:
    with tracking_errors(f"run {run_id}"):
        try:
            return client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdef" for character in text)


def check_alive(run: Run) -> None:
    """Refuse a deleted run.

    Raises:
        RunGoneError: the run was deleted.
    """
    if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
        raise RunGoneError(
            f"run {run.info.run_id} was deleted; restore it with "
            f"`mlflow runs restore --run-id {run.info.run_id}` to go on"
        )


def run_is_gone(client: MlflowClient, run_id: str) -> bool:
    """Whether a run does not exist, or was deleted; False if the server does not answer."""
    try:
        find_run(client, run_id)
    except TrackingError as error:
        return isinstance(error, RunGoneError)
    return False


def is_over(run: Run) -> bool:
    """Whether the run has ended, with any status."""
    return RunStatus.is_terminated(RunStatus.from_string(run.info.status))


def _experiment(client: MlflowClient, name: str | None) -> str:
    name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if not name:
        return os.environ.get("MLFLOW_EXPERIMENT_ID") or "0"
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


def active_run_id(asked: str | None = None) -> str:
    """The given run, else MLflow's active run of this thread, else `$MLFLOW_RUN_ID`.

    No request is made.

    Raises:
        UsageError: there is no run.
    """
    if asked:
        return asked
    if active := mlflow.active_run():
        return str(active.info.run_id)
    if named := os.environ.get(RUN_VARIABLE):
        return named
    raise UsageError(
        "no MLflow run to publish to: start one around the training (`with mlflow.start_run():`, "
        f"or report_to='mlflow' in Hugging Face's arguments), set {RUN_VARIABLE}, or give run_id"
    )


def project_run(tracking_uri: str | None = None) -> TrackedRun | None:
    """The run that `mlflow run` or another parent process created for this command, if any.

    Raises:
        TrackingError: the run is gone, or the server does not answer.
    """
    run_id = os.environ.get(RUN_VARIABLE)
    return find_run(connect(tracking_uri, may_create=False), run_id) if run_id else None


def name_collection(run: TrackedRun, collection: str, split: str) -> None:
    """Write on a run which collection and split its checkpoints are validated on.

    Args:
        run: of the checkpoints.
        collection: its name, or the full path of a folder.
        split: of the queries.

    Raises:
        UsageError: the run already has another split, and a param cannot be changed.
        TrackingError: the server did not take it.
    """
    run.set_tags({DATASET_TAG: collection})
    run.log_params({DATASET_PARAM: collection, SPLIT_PARAM: split})
    existing = run.fetch().data.params[SPLIT_PARAM]
    if existing != split:
        raise UsageError(
            f"run {run.id} already has {SPLIT_PARAM}={existing!r}, and MLflow's params cannot be "
            f"changed; leave split={split!r} out, or pass `--split {split}` to the validator"
        )
