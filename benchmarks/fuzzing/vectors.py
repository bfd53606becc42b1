"""Folders of vectors: ours with their manifests, and Parquet files of other programs."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fuzzing import damage
from benchmarks.fuzzing.case import Case, Kind, UnreadableError

IDS = [f"p{number}" for number in range(20)]
NUMBERS = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)


def vectors(chance: Random, workdir: Path) -> Case:
    from mlflow_dr.retrieval.vectors import open_vectors

    folder = workdir / "some-vectors"
    if chance.random() < 0.4:
        _other(folder)
    else:
        _ours(folder, chance.choice(("parquet", "npy")), chance.choice((1, 1, 2)))
    path = chance.choice(sorted(folder.iterdir()))
    if path.suffix == ".json" and chance.random() < 0.8:
        tree, how = damage.tree(chance, json.loads(path.read_bytes()))
        path.write_bytes(damage.dumped(chance, tree))
    else:
        how = damage.file(chance, path)

    def read() -> Any:
        opened = open_vectors(folder)
        return dict(zip(opened.ids.to_pylist(), opened.read().tolist(), strict=True))

    return Case(f"{path.name}: {how}", read, lambda: _right(folder), ("some-vectors",))


def _ours(folder: Path, file_format: str, shards: int) -> None:
    import torch

    from mlflow_dr.retrieval.vector_manifest import VectorManifest
    from mlflow_dr.retrieval.vector_writer import write_shard

    for shard in range(shards):
        manifest = VectorManifest(
            kind="passages",
            dataset="d",
            split=None,
            texts=len(IDS),
            texts_digest="t",
            encoder="e",
            encoder_digest="x",
            settings={"pooling": "mean"},
            dimension=4,
            similarity="dot",
            dtype="fp32",
            vector_dtype="fp32",
            file_format=file_format,  # type: ignore[arg-type]
            tokens_per_batch=1,
            shard=shard,
            shards=shards,
        )
        batches = [np.arange(start, 20, 4) for start in range(4)][shard::shards]
        write_shard(
            folder,
            manifest,
            batches,
            pa.chunked_array([IDS]),
            lambda some: ((rows, torch.from_numpy(NUMBERS[rows])) for rows in some),
            quiet=True,
        )


def _other(folder: Path) -> None:
    folder.mkdir()
    table = pa.table({"_id": IDS, "embedding": pa.array(list(NUMBERS))})
    pq.write_table(table, folder / "0.parquet")


def _right(folder: Path) -> dict[str, list[float]]:
    """What a plain reader makes of the files; bytes of vectors may be damaged unseen."""
    found: dict[str, list[float]] = {}
    try:
        for path in sorted(folder.glob("*.parquet")):
            ids, values = pq.ParquetFile(path).read().columns
            found |= dict(zip(ids.to_pylist(), values.to_pylist(), strict=True))
        for path in sorted(folder.glob("*.npy")):
            names = path.with_suffix(".ids").read_bytes().decode().split("\n")[:-1]
            found |= dict(zip(names, np.load(path).tolist(), strict=True))
    except Exception as error:
        raise UnreadableError(str(error)) from error
    if len(found) != len(IDS) or not np.isfinite(list(found.values())).all():
        raise UnreadableError("vectors are missing")
    return found


KINDS = [Kind("vectors", vectors, 5)]
