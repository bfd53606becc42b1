from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from mlflow_dr.errors import DataError, NoValuesError, TrackingError
from mlflow_dr.tracking.artifacts import log_per_query_values, per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, announce_checkpoint, run_checkpoints
from mlflow_dr.tracking.runs import TrackedRun


class ObjectStoreError(Exception):
    """As botocore's, of no kind that others share."""


VALUES = {
    "q1": {"mrr@10": 0.5, "recall@100": 1.0},
    "q/2 é": {"mrr@10": 0.0, "recall@100": 1 / 3},
}


@pytest.fixture
def checkpoint(run: TrackedRun) -> Checkpoint:
    announce_checkpoint(run, 1200, "")
    (checkpoint,) = run_checkpoints(run)
    return checkpoint


def folder(run: TrackedRun) -> Path:
    return Path(run.fetch().info.artifact_uri.removeprefix("file://")) / "validation"


def test_values_come_back_as_they_were(run: TrackedRun, checkpoint: Checkpoint) -> None:
    log_per_query_values(run, checkpoint, "val", VALUES)
    found = per_query_values(run, checkpoint, "val")
    assert found == VALUES
    assert list(found) == list(VALUES)


def test_the_file_is_a_column_of_each_measure(run: TrackedRun, checkpoint: Checkpoint) -> None:
    log_per_query_values(run, checkpoint, "on the sea", VALUES)
    (path,) = folder(run).rglob("*.parquet")
    assert path.relative_to(folder(run)).as_posix() == (
        f"on the sea/step-00001200-{checkpoint.model_id}.parquet"
    )
    table = pq.read_table(path)
    assert dict(zip(table.column_names, map(str, table.schema.types), strict=True)) == {
        "query_id": "string",
        "mrr@10": "double",
        "recall@100": "double",
    }


def test_writing_them_again_changes_nothing(run: TrackedRun, checkpoint: Checkpoint) -> None:
    log_per_query_values(run, checkpoint, "val", VALUES)
    (path,) = folder(run).rglob("*.parquet")
    before = path.read_bytes()
    log_per_query_values(run, checkpoint, "val", VALUES)
    assert [path.read_bytes() for path in folder(run).rglob("*.parquet")] == [before]


def test_an_error_of_an_object_store_is_one_of_the_server(
    run: TrackedRun, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_artifact(*_: Any) -> None:
        raise ObjectStoreError("could not connect to\nthe endpoint")

    monkeypatch.setattr(LocalArtifactRepository, "log_artifact", log_artifact)
    with pytest.raises(TrackingError, match="values of step 1200: could not connect to the"):
        log_per_query_values(run, checkpoint, "val", VALUES)


def test_validations_and_checkpoints_have_files_of_their_own(run: TrackedRun) -> None:
    for step in (1, 1, 2):
        announce_checkpoint(run, step, "")
    published = run_checkpoints(run)
    expected = {}
    for number, checkpoint in enumerate(published):
        for name in ("val", "test"):
            values = {"q": {"mrr@10": number + len(name) / 10}}
            log_per_query_values(run, checkpoint, name, values)
            expected[number, name] = values
    for (number, name), values in expected.items():
        assert per_query_values(run, published[number], name) == values


def test_missing_per_query_values_are_reported(run: TrackedRun, checkpoint: Checkpoint) -> None:
    message = rf"run {run.id} has no values of single queries for step 1200 \(no artifact valid"
    with pytest.raises(NoValuesError, match=message):
        per_query_values(run, checkpoint, "val")
    log_per_query_values(run, checkpoint, "val", VALUES)
    with pytest.raises(NoValuesError):
        per_query_values(run, checkpoint, "test")


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more", None])
def test_a_damaged_file(run: TrackedRun, checkpoint: Checkpoint, damage: bytes | None) -> None:
    log_per_query_values(run, checkpoint, "val", VALUES)
    (path,) = folder(run).rglob("*.parquet")
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(DataError, match=rf"run {run.id}, artifact validation/val/.*: not a table"):
        per_query_values(run, checkpoint, "val")


def test_a_table_with_other_columns_is_refused(run: TrackedRun, checkpoint: Checkpoint) -> None:
    log_per_query_values(run, checkpoint, "val", VALUES)
    (path,) = folder(run).rglob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns("query_id"), path)
    with pytest.raises(DataError, match="query_id"):
        per_query_values(run, checkpoint, "val")


def test_a_store_that_cannot_be_written(run: TrackedRun, checkpoint: Checkpoint) -> None:
    directory = folder(run)
    directory.parent.mkdir(parents=True)
    directory.write_text("a file where the folder would be")
    with pytest.raises(TrackingError, match="storing the values of step 1200: "):
        log_per_query_values(run, checkpoint, "val", VALUES)
