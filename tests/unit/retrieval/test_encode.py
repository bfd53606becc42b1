"""Encoding a token table: which rows go into which batch, and the vectors that come out."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.packed import encode_packed
from mlflow_dr.errors import CheckpointError, DeviceError
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.encode import (
    check_finite,
    encode_all,
    encode_batches,
    encode_to_host,
    plan_batches,
    tokens_per_batch,
)
from mlflow_dr.stores.token_table import TokenTable, token_table

LENGTHS = np.random.default_rng(0).integers(1, 40, size=200)


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True)


@pytest.fixture
def table(encoder: Encoder) -> TokenTable:
    """60 texts of 1 to 39 random tokens."""
    generator = np.random.default_rng(1)
    size = len(encoder.tokenizer)
    return token_table([generator.integers(5, size, n).tolist() for n in LENGTHS[:60]])


@pytest.mark.parametrize(
    ("width", "on_cpu", "on_cuda"),
    [
        (64, 4096, 262144),
        (128, 4096, 196608),
        (384, 4096, 65536),
        (768, 2048, 32768),
        (1024, 1536, 24576),
        (4096, 1024, 6144),
        (8192, 1024, 6144),
    ],
)
def test_batches_of_wide_backbones_have_fewer_tokens(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, width: int, on_cpu: int, on_cuda: int
) -> None:
    monkeypatch.setattr(encoder.backbone.config, "hidden_size", width)
    assert tokens_per_batch(encoder, torch.device("cpu")) == on_cpu
    assert tokens_per_batch(encoder, torch.device("cuda:1")) == on_cuda


@pytest.mark.parametrize("max_tokens", [1, 39, 100, 1000, 10**6])
def test_every_row_is_in_one_batch(max_tokens: int) -> None:
    batches = plan_batches(LENGTHS, max_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))


@pytest.mark.parametrize("max_tokens", [39, 100, 1000])
def test_the_padded_size_of_a_batch_stays_within_the_budget(max_tokens: int) -> None:
    sizes = [len(rows) * LENGTHS[rows].max() for rows in plan_batches(LENGTHS, max_tokens)]
    assert max(sizes) <= max_tokens
    # and uses it: one more text as long as the longest would exceed it
    longest = [LENGTHS[rows].max() for rows in plan_batches(LENGTHS, max_tokens)]
    assert all(s + n > max_tokens for s, n in zip(sizes[:-1], longest[:-1], strict=True))


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    batches = plan_batches(np.array([3, 50, 2, 60]), max_tokens=10)
    assert [rows.tolist() for rows in batches] == [[3], [1], [0, 2]]


@pytest.mark.parametrize("factor", [1, 5000])
def test_the_longest_rows_come_first_and_equal_ones_in_their_order(factor: int) -> None:
    """Also those of more tokens than a number of 16 bits can count."""
    lengths = factor * LENGTHS
    order = np.concatenate(plan_batches(lengths, 100)).tolist()
    assert order == sorted(range(200), key=lambda row: (-lengths[row], row))


def test_only_some_rows_are_planned_by_their_own_lengths() -> None:
    rows = np.arange(3, 200, 7)
    batches = plan_batches(LENGTHS, 100, rows)
    assert sorted(np.concatenate(batches).tolist()) == rows.tolist()
    own = plan_batches(LENGTHS[rows], 100)
    assert [rows[places].tolist() for places in own] == [batch.tolist() for batch in batches]


def test_vectors_of_a_shard_have_the_bits_of_the_whole(encoder: Encoder, table: TokenTable) -> None:
    batches = plan_batches(table.lengths, 64)
    vectors = np.zeros((60, 128), np.float32)
    for shard in range(7):
        for rows, batch in encode_batches(encoder, table, 0, batches[shard::7]):
            vectors[rows] = batch
    whole = {rows[0]: batch for rows, batch in encode_batches(encoder, table, 0, batches)}
    for rows in batches:
        np.testing.assert_array_equal(vectors[rows], whole[rows[0]].numpy())


def test_no_rows_are_no_batches() -> None:
    assert plan_batches(np.array([], dtype=np.int64), 100) == []


def test_vectors_do_not_depend_on_the_budget_of_a_batch(
    encoder: Encoder, table: TokenTable
) -> None:
    def vectors(max_tokens: int) -> torch.Tensor:
        found = torch.full((60, 128), torch.nan)
        for rows, batch in encode_batches(
            encoder, table, 0, plan_batches(LENGTHS[:60], max_tokens)
        ):
            assert batch.dtype == torch.float32
            found[torch.from_numpy(rows)] = batch
        return found

    alone = vectors(1)
    for max_tokens in (64, 500, 10**6):
        torch.testing.assert_close(vectors(max_tokens), alone, rtol=0, atol=1e-5)


def test_vectors_on_the_host_are_those_of_encode_batches(
    encoder: Encoder, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, of which this is a part, each is waited for when the next batch is begun."""
    batches = plan_batches(table.lengths, 64)
    expected = list(encode_batches(encoder, table, 0, batches))
    steps: list[tuple[str, int]] = []

    def begin(vectors: torch.Tensor) -> Callable[[], torch.Tensor]:
        number = sum(step == "begun" for step, _ in steps)
        steps.append(("begun", number))

        def wait() -> torch.Tensor:
            steps.append(("waited", number))
            return torch.zeros_like(expected[number][1])

        return wait

    found = list(encode_to_host(encoder, table, 0, batches))
    for (rows, vectors), (expected_rows, expected_vectors) in zip(found, expected, strict=True):
        assert rows.tolist() == expected_rows.tolist()
        torch.testing.assert_close(vectors, expected_vectors, rtol=0, atol=0)
    meta = [(rows, vectors.to("meta")) for rows, vectors in expected[:3]]
    monkeypatch.setattr(encode, "encode_batches", lambda *_: meta)
    monkeypatch.setattr(encode, "begin_host_copy", begin)
    found = list(encode_to_host(encoder, table, 0, batches))
    assert [rows.tolist() for rows, _ in found] == [rows.tolist() for rows, _ in meta]
    assert steps == [
        *(("begun", 0), ("begun", 1), ("waited", 0)),
        *(("begun", 2), ("waited", 1), ("waited", 2)),
    ]


def test_encode_all_keeps_the_order_of_the_rows(encoder: Encoder, table: TokenTable) -> None:
    vectors = encode_all(encoder, table, pad_id=0)
    assert vectors.shape == (60, 128)
    for row in (0, 17, 59):
        ids = torch.from_numpy(table[row].astype(np.int64))[None]
        with torch.no_grad():
            alone = encoder(ids, torch.ones_like(ids))
        torch.testing.assert_close(vectors[row : row + 1], alone, rtol=0, atol=1e-5)


def test_no_gradients_are_kept(encoder: Encoder, table: TokenTable) -> None:
    batches = [np.arange(10), np.arange(10, 60)]
    assert not any(batch.requires_grad for _, batch in encode_batches(encoder, table, 0, batches))


def test_weights_with_nan_are_refused(encoder: Encoder, table: TokenTable) -> None:
    encoder.backbone.encoder.layer[1].output.dense.weight.data[3, 3] = torch.nan
    with pytest.raises(CheckpointError, match="NaN or infinity for 60 of 60 query vectors"):
        encode_all(encoder, table, 0, "query")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_vectors_that_are_not_finite_are_counted(value: float) -> None:
    vectors = torch.zeros(5, 3)
    check_finite(vectors, "passage")
    vectors[1, 0] = vectors[4, 2] = vectors[4, 1] = value
    message = re.escape("for 2 of 5 passage vectors; the weights are broken or overflow")
    with pytest.raises(CheckpointError, match=message):
        check_finite(vectors, "passage")


def test_a_device_that_is_out_of_memory_gets_smaller_batches(
    encoder: Encoder,
    table: TokenTable,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once; later batches are small from the beginning."""

    def limited(encoder: Encoder, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("no memory left")
        return real(encoder, ids, *others)

    real, sizes = encode_packed, list[int]()
    batches = plan_batches(table.lengths, 256)
    whole = [vectors for _, vectors in encode_batches(encoder, table, 0, batches)]
    monkeypatch.setattr(encode, "encode_packed", limited)
    most = 200
    with caplog.at_level("WARNING"):
        parts = [vectors for _, vectors in encode_batches(encoder, table, 0, batches)]
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert sum(size > most for size in sizes) == 1
    assert [r.message for r in caplog.records] == [
        "cpu is out of memory: batches are encoded in 2 parts"
    ]
    most = 5
    with pytest.raises(DeviceError, match="cpu has too little memory for a text of 39 tokens"):
        list(encode_batches(encoder, table, 0, [np.argsort(-table.lengths)[:2]]))
