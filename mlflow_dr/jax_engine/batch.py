"""Batches of our collator as NumPy arrays of few shapes, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlflow_dr.jax_engine.step import IDS, IS_REAL, KEYS, MASK, TEACHER
from mlflow_dr.training.batches import PASSAGE, QUERY

MULTIPLE = 32
"""Passages are padded to a multiple of this many tokens."""


def padded_length(longest: int, limit: int) -> int:
    """The next multiple of 32 tokens, or the longest text that there can be if that is shorter."""
    return max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, limit))


def local_batch(
    inputs: Mapping[str, Any],
    n_queries: int,
    lengths: Mapping[str, int],
    pad_ids: Mapping[str, int],
    with_teacher: bool = False,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    """This process's part of a batch, see `mlflow_dr.jax_engine.step.Batch`.

    Args:
        inputs: what our collator gives.
        n_queries: number of queries; a short batch is filled up with copies of its last query,
            which have no part in the loss.
        lengths: role -> tokens to which its texts are padded.
        pad_ids: role -> token id that pads.
        with_teacher: whether to take a teacher's scores.
        dtype: number format of scores.
    """
    n_real = len(inputs[QUERY]["input_ids"])
    group = len(inputs[PASSAGE]["input_ids"]) // n_real
    rows = {QUERY: n_queries, PASSAGE: n_queries * group}
    batch: dict[str, np.ndarray] = {}
    for role, count in rows.items():
        texts = inputs[role]
        for name, values, pad in (
            (IDS, texts["input_ids"], pad_ids[role]),
            (MASK, texts["attention_mask"], 0),
        ):
            padding = ((0, 0), (0, lengths[role] - values.shape[1]))
            wide = np.pad(values.numpy().astype(np.int32), padding, constant_values=pad)
            batch[name.format(role)] = _filled(wide, count)
    # two keys of one batch are only equal by chance if they differ by 2^32
    batch[KEYS] = _filled(inputs["keys"].numpy().astype(np.int32), rows[PASSAGE])
    if with_teacher:
        batch[TEACHER] = _filled(inputs["teacher"].numpy().astype(dtype), n_queries)
    batch[IS_REAL] = (np.arange(n_queries) < n_real).astype(dtype)
    return batch


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows, and copies of the last one up to a number of rows."""
    missing = count - len(rows)
    return np.pad(rows, ((0, missing), *((0, 0) for _ in rows.shape[1:])), mode="edge")
