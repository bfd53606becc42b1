"""Subsets as artifacts of a run: which passages, where they come from, and how they were chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_dr.files import scratch
from mlflow_dr.tracking.client import tracking_errors
from mlflow_dr.tracking.runs import TrackedRun

FOLDER = "subsets"


def log_subset(
    run: TrackedRun, name: str, passages: Callable[[], pa.Table], about: Mapping[str, Any]
) -> None:
    """Keep the subset of a validation with the run, unless it is there already.

    Args:
        run: which.
        name: the validation's, which stands for one subset on a run.
        passages: gives columns `passage_id` and `origin`.
        about: how it was chosen, sizes, digest.

    Raises:
        TrackingError: the server did not take it.
    """
    table, text = f"{name}.parquet", f"{name}.json"
    with tracking_errors(f"keeping subset {name!r} of run {run.id}"), scratch() as room:
        there = {file.path for file in run.client.list_artifacts(run.id, FOLDER)}
        if f"{FOLDER}/{text}" in there:
            return
        room.mkdir()
        pq.write_table(passages(), room / table, compression="zstd")
        (room / text).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        for file in (table, text):  # the text last: with it, both are there
            run.client.log_artifact(run.id, str(room / file), FOLDER)
