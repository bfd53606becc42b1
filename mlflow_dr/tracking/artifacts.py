"""Files that are kept with a run: per-query values, subsets, studies of fidelity, indexes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.exceptions import MlflowException
from pyarrow import csv

from mlflow_dr import compat
from mlflow_dr.collection.held_out import HELD_OUT
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.errors import DataError, NoValuesError, UsageError
from mlflow_dr.files import scratch
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import SPLIT_PARAM, TrackedRun

VALUES_FOLDER = "validation"
SUBSETS_FOLDER = "subsets"
FIDELITY_FOLDER, LOADERS_FOLDER, QA_FOLDER = "fidelity", "loaders", "qa"
INDEX_FOLDER = "indexes"
REPORT_FOLDER = "report"
HELD_OUT_FOLDER, QUERIES_FILE = "held_out", "queries.jsonl"
QUERY_ID, QUERY = "query_id", "query"
MOST_ROWS = 10_000  # of a CSV

PerQuery = Mapping[str, Mapping[Any, float]]
"""query id -> measure -> value."""


def log_per_query_values(
    run: TrackedRun,
    checkpoint: Checkpoint,
    name: str,
    per_query: PerQuery,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Store the values of each query: a column `query_id`, and one of each measure.

    Up to `MOST_ROWS` queries are also stored as CSV, with their texts, which MLflow's pages show.
    The same values give the same bytes, so writing them again changes nothing.

    Args:
        run: of the checkpoint.
        checkpoint: the validated one.
        name: of the validation.
        per_query: each query with the same measures.
        texts: of the queries, by id.

    Raises:
        TrackingError: the server did not take them.
    """
    with scratch() as directory:
        directory.mkdir()
        file = directory / _file(checkpoint)
        table = _table(per_query)
        pq.write_table(table, file)
        if len(per_query) <= MOST_ROWS:
            shown = pa.array([(texts or {}).get(query_id, "") for query_id in per_query])
            csv.write_csv(table.add_column(1, QUERY, shown), file.with_suffix(".csv"))
        with tracking_errors(f"storing the values of step {checkpoint.step}"):
            for written in sorted(directory.iterdir()):
                run.client.log_artifact(run.id, str(written), _folder(name))
            # a login page in answer to an upload also has status 200
            store = compat.artifact_store(run.client, run.id)
            stored = {entry.path for entry in store.list_artifacts(_folder(name))}
            if f"{_folder(name)}/{file.name}" not in stored:
                raise OSError("the artifact store does not list them after they were written")


def per_query_values(
    run: TrackedRun, checkpoint: Checkpoint, name: str
) -> dict[str, dict[str, float]]:
    """The stored values of each query: query id -> measure -> value.

    Raises:
        NoValuesError: there are none.
        DataError: the file is damaged.
        TrackingError: the server does not answer.
    """
    path = f"{_folder(name)}/{_file(checkpoint)}"
    with scratch() as directory:
        directory.mkdir()
        with tracking_errors(f"values of step {checkpoint.step}"):
            try:
                file = _downloaded(run, path, directory)
            except (MlflowException, OSError):
                entries = run.client.list_artifacts(run.id, _folder(name))
                if path in {entry.path for entry in entries}:
                    raise
                raise NoValuesError(
                    f"run {run.id} has no values of single queries for step {checkpoint.step} "
                    f"(no artifact {path})"
                ) from None
        try:
            table = pq.ParquetFile(file).read()
            ids = table[QUERY_ID].to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            why = " ".join(str(error).split())[:200]
            raise DataError(
                f"run {run.id}, artifact {path}: not a table of values ({why})"
            ) from error
    measures = [column for column in table.column_names if column != QUERY_ID]
    columns = [table[measure].to_pylist() for measure in measures]
    rows = zip(*columns, strict=True) if columns else ([] for _ in ids)
    return {
        query_id: dict(zip(measures, row, strict=True))
        for query_id, row in zip(ids, rows, strict=True)
    }


def stored_query_texts(run: TrackedRun, checkpoint: Checkpoint, name: str) -> dict[str, str]:
    """The texts of the queries that a validation has stored, by id; empty if it has not."""
    path = f"{_folder(name)}/{Path(_file(checkpoint)).with_suffix('.csv')}"
    with scratch() as directory:
        directory.mkdir()
        try:
            file = _downloaded(run, path, directory)
            types = csv.ConvertOptions(column_types={QUERY_ID: pa.string(), QUERY: pa.string()})
            parsing = csv.ParseOptions(newlines_in_values=True)
            table = csv.read_csv(file, parse_options=parsing, convert_options=types)
            return dict(zip(table[QUERY_ID].to_pylist(), table[QUERY].to_pylist(), strict=True))
        except (MlflowException, OSError, pa.ArrowException, KeyError):
            return {}


def _downloaded(run: TrackedRun, path: str, directory: Path) -> Path:
    # MlflowClient.download_artifacts calls every error "no such path"
    file = directory / Path(path).name
    compat.download_file(compat.artifact_store(run.client, run.id), path, str(file))
    return file


def _table(per_query: PerQuery) -> pa.Table:
    measures = list(next(iter(per_query.values())))
    columns = {
        measure: pa.array([values[measure] for values in per_query.values()], pa.float64())
        for measure in measures
    }
    return pa.table({QUERY_ID: pa.array(list(per_query), pa.string()), **columns})


def _folder(name: str) -> str:
    return f"{VALUES_FOLDER}/{name}"


def _file(checkpoint: Checkpoint) -> str:
    return f"step-{checkpoint.step:08}-{checkpoint.model_id}.parquet"


def log_subset(
    run: TrackedRun, name: str, passages: Callable[[], pa.Table], about: Mapping[str, Any]
) -> None:
    """Store the subset of a validation with the run, unless it is stored already.

    Args:
        run: of the validation.
        name: of the validation, which has one subset on a run.
        passages: gives columns `passage_id` and `origin`.
        about: how it was chosen, sizes, digest.

    Raises:
        TrackingError: the server did not take it.
    """
    table, text = f"{name}.parquet", f"{name}.json"
    with tracking_errors(f"storing subset {name!r} of run {run.id}"), scratch() as directory:
        stored = {file.path for file in run.client.list_artifacts(run.id, SUBSETS_FOLDER)}
        if f"{SUBSETS_FOLDER}/{text}" in stored:
            return
        directory.mkdir()
        pq.write_table(passages(), directory / table, compression="zstd")
        (directory / text).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in (table, text):  # the text comes last and shows that both are stored
            run.client.log_artifact(run.id, str(directory / file), SUBSETS_FOLDER)


def keep_held_out(run: TrackedRun, held_out: Topics | None) -> None:
    """Store the training queries that a run holds out, unless they are stored already.

    Args:
        run: of the training, which may be resumed.
        held_out: None if the training holds none out.

    Raises:
        UsageError: the run has trained with other queries held out, or with none.
        TrackingError: the server did not take them.
    """
    split = run.fetch().data.params.get(SPLIT_PARAM)
    if held_out is None:
        if split == HELD_OUT:
            raise UsageError(
                f"run {run.id} holds queries out of training; give --validation_fraction and "
                "--seed as before"
            )
        return
    if split == HELD_OUT and held_out_topics(run).digest == held_out.digest:
        return
    if split is not None:
        raise UsageError(
            f"run {run.id} has been trained without holding out these queries; give the data, "
            "--validation_fraction and --seed as before, or begin a new run"
        )
    lines = [
        json.dumps({**query._asdict(), "relevant": held_out.qrels[query.id]}) + "\n"
        for query in held_out.queries
    ]
    with tracking_errors(f"storing held-out queries of run {run.id}"), scratch() as directory:
        directory.mkdir()
        (directory / QUERIES_FILE).write_text("".join(lines), encoding="utf-8")
        run.client.log_artifact(run.id, str(directory / QUERIES_FILE), HELD_OUT_FOLDER)


def held_out_topics(run: TrackedRun) -> Topics:
    """The training queries that a run holds out, with their relevant passages.

    Raises:
        TrackingError: it has none, or they cannot be fetched.
    """
    path = f"{HELD_OUT_FOLDER}/{QUERIES_FILE}"
    with tracking_errors(f"fetching held-out queries of run {run.id}"), scratch() as directory:
        directory.mkdir()
        file = _downloaded(run, path, directory)
        records = list(map(json.loads, file.read_text(encoding="utf-8").splitlines()))
    qrels = {record["id"]: record.pop("relevant") for record in records}
    return Topics([Query(**record) for record in records], qrels)


def log_study(run: TrackedRun, files: Iterable[Path], folder: str) -> None:
    """Log the files of a study into a folder; later ones replace them.

    Raises:
        TrackingError: the server did not take it.
    """
    with tracking_errors(f"storing the study of {folder} with run {run.id}"):
        for file in files:
            run.client.log_artifact(run.id, str(file), folder)


def log_index(run: TrackedRun, checkpoint: Checkpoint, directory: Path) -> None:
    """Store an index, its manifest last; a later one of the same name replaces it.

    Args:
        run: of the checkpoint.
        checkpoint: whose vectors are indexed.
        directory: the index.

    Raises:
        TrackingError: the server did not take it.
    """
    step = f"step-{checkpoint.step:08}-{checkpoint.model_id}"
    with tracking_errors(f"storing the index with run {run.id}"):
        for name in ("docid", "index", "manifest.json"):
            folder = f"{INDEX_FOLDER}/{step}/{directory.name}"
            run.client.log_artifact(run.id, str(directory / name), folder)
