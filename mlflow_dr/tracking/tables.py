"""Per-query values of checkpoints: a parquet file of each validation of each, beside the run.

A column `query_id` and one of each measure, named as the measure is (`mrr@10`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from mlflow.exceptions import MlflowException

from mlflow_dr.errors import DataError, NoValuesError
from mlflow_dr.files import scratch
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun

FOLDER = "validation"
QUERY_ID = "query_id"

PerQuery = Mapping[str, Mapping[Any, float]]
"""query id -> measure -> value."""


def log_values(run: TrackedRun, checkpoint: Checkpoint, name: str, per_query: PerQuery) -> None:
    """Keep the values of each query; two requests, and one more for the first of a run.

    The same values give the same bytes, so writing them again changes nothing.

    Args:
        run: the run that the checkpoint belongs to.
        checkpoint: what was validated.
        name: the validation's name.
        per_query: each query with the same measures.

    Raises:
        TrackingError: the server did not take them.
    """
    with scratch() as room:
        room.mkdir()
        file = room / _file(checkpoint)
        pq.write_table(_table(per_query), file)
        with tracking_errors(f"keeping the values of step {checkpoint.step}"):
            run.client.log_artifact(run.id, str(file), _folder(name))
            # a login page in place of the store's answer has status 200, too
            store = run.client._tracking_client._get_artifact_repo(run.id)
            there = {one.path for one in store.list_artifacts(_folder(name))}
            if f"{_folder(name)}/{file.name}" not in there:
                raise OSError("the artifact store does not list them after they were written")


def values_of(run: TrackedRun, checkpoint: Checkpoint, name: str) -> dict[str, dict[str, float]]:
    """The values of each query, as `log_values` has kept them: query id -> measure -> value.

    Raises:
        NoValuesError: nobody has kept any.
        DataError: the file is damaged.
        TrackingError: the server does not answer.
    """
    path = f"{_folder(name)}/{_file(checkpoint)}"
    with scratch() as room:
        room.mkdir()
        with tracking_errors(f"values of step {checkpoint.step}"):
            try:
                file = Path(run.client.download_artifacts(run.id, path, str(room)))
            except (MlflowException, OSError):
                there = run.client.list_artifacts(run.id, _folder(name))
                if path in {one.path for one in there}:
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
            raise DataError(f"run {run.id}, artifact {path}: no table of values ({why})") from error
    measures = [column for column in table.column_names if column != QUERY_ID]
    columns = [table[measure].to_pylist() for measure in measures]
    rows = zip(*columns, strict=True) if columns else ([] for _ in ids)
    return {
        query_id: dict(zip(measures, row, strict=True))
        for query_id, row in zip(ids, rows, strict=True)
    }


def _table(per_query: PerQuery) -> pa.Table:
    measures = list(next(iter(per_query.values())))
    columns = {
        measure: pa.array([values[measure] for values in per_query.values()], pa.float64())
        for measure in measures
    }
    return pa.table({QUERY_ID: pa.array(list(per_query), pa.string()), **columns})


def _folder(name: str) -> str:
    return f"{FOLDER}/{name}"


def _file(checkpoint: Checkpoint) -> str:
    return f"step-{checkpoint.step:08}-{checkpoint.model_id}.parquet"
