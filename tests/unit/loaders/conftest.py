"""Stores of forty short passages, and a tokenizer for them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from mlflow_dr.collection.corpus import cached_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.loaders.cell import Workload
from mlflow_dr.stores.store import store_directory

if TYPE_CHECKING:
    from mlflow_dr.encoder.model import Encoder

N_PASSAGES = 40


@pytest.fixture
def lookup_directory(own_cache: Path) -> Path:
    """Files of the stores `lookup` and `memory`; passage n has the text of n words."""
    passages = [
        Passage(f"p{row}", "", " ".join(["ship", "harbour"][: 1 + row % 2] * (1 + row // 2)))
        for row in range(N_PASSAGES)
    ]
    return store_directory("lookup", cached_corpus("key", passages))


@pytest.fixture
def workload(
    lookup_directory: Path, make_tiny: Callable[..., "Encoder"], tmp_path: Path
) -> Workload:
    """Fifty batches of eight documents, and the directory of a tiny encoder."""
    from mlflow_dr.encoder.saving import save_encoder

    save_encoder(tmp_path / "encoder", make_tiny())
    rows = np.random.default_rng(0).integers(N_PASSAGES, size=400)
    np.save(tmp_path / "rows.npy", rows)
    return Workload(
        directory=str(lookup_directory),
        rows=str(tmp_path / "rows.npy"),
        tokenizer=str(tmp_path / "encoder"),
        max_length=16,
        batch_size=8,
        samples=400,
        model_batches=3,
        device="cpu",
    )
