"""Recorded computations give what the computation gives, for every batch of their shape."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mlflow_dr.background import ahead
from mlflow_dr.encoder import first_token, graphs, packed
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.encode import encode_batches, plan_batches
from mlflow_dr.stores.token_table import TokenTable, token_table
from tests.counted_waits import CountedWaits
from tests.unit.encoder.packing import PACKED, encoder_of, one_by_one, varlen_by_definition

CPU = torch.device("cpu")
N_TOKENS = 128


class Replayed:
    """Records as CUDA does, where there is none: what is replayed has the first call's tensors.

    Attributes:
        n_recorded: how many graphs were recorded.
        n_replayed: how many times they were used.
        change: of the results of replays.
        error: raised instead of recording.
    """

    n_recorded = n_replayed = 0
    change = 0.0
    error: Exception | None = None

    def record(self, compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], Any]:
        if self.error is not None:
            raise self.error
        result = compute()
        self.n_recorded += 1

        def replay() -> None:
            self.n_replayed += 1
            result.copy_(compute()).mul_(torch.linspace(1, 1 + self.change, result.shape[-1]))

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replayed]:
    """Encoding as on CUDA: batches are filled, and recorded after two of a shape."""
    recorder = Replayed()
    for module in (packed, first_token, encode):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_definition)
    monkeypatch.setattr(graphs, "Recorder", lambda device: recorder)
    monkeypatch.setattr(graphs, "BATCHES_BEFORE_RECORDING", 2)
    monkeypatch.setattr(encode, "tokens_per_batch", lambda *_: N_TOKENS)
    monkeypatch.setattr(encode, "_warnings", set())
    yield recorder


@pytest.fixture(scope="module")
def table() -> TokenTable:
    """300 texts of 1 to 40 tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(6, 3, 300).astype(int), 1, 40)
    return token_table([generator.integers(5, 100, length).tolist() for length in lengths])


def batches_of(table: TokenTable) -> list[np.ndarray]:
    return plan_batches(table.lengths, N_TOKENS)


def vectors_of(encoder: Encoder, table: TokenTable) -> torch.Tensor:
    vectors = torch.full((len(table), 32), torch.nan)
    kept = list(encode_batches(encoder, table, 0, batches_of(table)))  # none is overwritten
    for rows, batch in kept:
        vectors[rows] = batch
    return vectors


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", PACKED)
def test_recorded_batches_have_the_vectors_of_texts_alone(
    kind: str, pooling: str, table: TokenTable, recorder: Replayed
) -> None:
    encoder = encoder_of(kind, PACKED[kind], pooling)
    vectors = vectors_of(encoder, table)
    torch.testing.assert_close(vectors, one_by_one(encoder, table), rtol=0, atol=2e-6)
    assert recorder.n_recorded >= 2
    assert recorder.n_replayed > len(batches_of(table)) / 2


def test_batches_have_one_number_of_tokens_and_few_other_shapes(
    table: TokenTable, recorder: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first batch, whose texts prove the backbone, and those far from full."""
    encoder = encoder_of("Bert", PACKED["Bert"])
    sizes: list[int] = []
    real = encode.encode_packed

    def watched(encoder: Encoder, ids: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(ids))
        return real(encoder, ids, *others)

    monkeypatch.setattr(encode, "encode_packed", watched)
    vectors_of(encoder, table)
    batches = batches_of(table)
    own = [int(table.lengths[rows].sum()) for rows in batches]
    expected = [N_TOKENS if size >= 0.875 * N_TOKENS else size for size in own]
    assert sizes[1:] == expected
    assert expected.count(N_TOKENS) > 0.6 * len(batches)


def test_vectors_have_the_same_bits_recorded_or_not(
    table: TokenTable, recorder: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So shards have the bits of the whole, wherever recording begins in each."""
    encoder = encoder_of("Bert", PACKED["Bert"], "cls")
    recorded = vectors_of(encoder, table)
    monkeypatch.setattr(graphs, "BATCHES_BEFORE_RECORDING", 1000)
    n_replayed = recorder.n_replayed
    torch.testing.assert_close(vectors_of(encoder, table), recorded, rtol=0, atol=0)
    assert recorder.n_replayed == n_replayed


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (1e-6, None, "token vectors differ"),
        (0.0, RuntimeError("operation not permitted when stream is capturing"), "not permitted"),
        (0.0, torch.OutOfMemoryError("no memory left"), "no memory left"),
    ],
)
def test_where_recording_fails_nothing_is_recorded_and_it_is_said_once(
    table: TokenTable,
    recorder: Replayed,
    caplog: pytest.LogCaptureFixture,
    change: float,
    error: Exception | None,
    reason: str,
) -> None:
    recorder.change, recorder.error = change, error
    encoder = encoder_of("Bert", PACKED["Bert"])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            vectors = vectors_of(encoder, table)
    torch.testing.assert_close(vectors, one_by_one(encoder, table), rtol=0, atol=2e-6)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("BertModel is encoded without CUDA graphs, which may be slower (")
    assert reason in message
    assert recorder.n_replayed <= 2


def test_broken_weights_are_no_failure_of_recording(
    table: TokenTable, recorder: Replayed, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of("Bert", PACKED["Bert"])
    encode_of_batch = encode._BatchEncoder(encoder, table, 0)
    for rows in batches_of(table)[:6]:
        encode_of_batch(rows, lambda rows=rows: encode_of_batch.prepare(rows))
    encoder.backbone.encoder.layer[0].output.dense.weight.data[:] = torch.nan
    assert vectors_of(encoder, table).isnan().all()
    assert not caplog.records


def test_wide_backbones_are_neither_filled_nor_recorded(
    table: TokenTable, recorder: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "WIDEST_FOR_GRAPHS", 16)
    encoder = encoder_of("Bert", PACKED["Bert"])
    vectors = vectors_of(encoder, table)
    torch.testing.assert_close(vectors, one_by_one(encoder, table), rtol=0, atol=2e-6)
    assert recorder.n_recorded == 0
    encode_of_batch = encode._BatchEncoder(encoder, table, 0)
    assert not any(encode_of_batch.prepare(rows).fillers for rows in batches_of(table))


def test_a_shard_is_padded_as_the_whole_where_packing_fails(
    table: TokenTable, recorder: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever its batches were prepared: before it was known, or after."""
    encoder = encoder_of("Bert", PACKED["Bert"])
    shapes: list[torch.Size] = []
    encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    monkeypatch.setattr(encode, "encode_packed", lambda *_: 1 / 0)
    batches = batches_of(table)[:8]
    encode_of_batch = encode._BatchEncoder(encoder, table, 0)
    prepared = [encode_of_batch.prepare(rows) for rows in batches]
    assert any(batch.fillers for batch in prepared)
    for rows, batch in zip(batches, prepared, strict=True):
        encode_of_batch(rows, lambda batch=batch: batch)
    assert [shape[0] for shape in shapes[-8:]] == [len(rows) for rows in batches]


def test_a_graph_has_nothing_of_the_batch_that_was_recorded(
    table: TokenTable,
    recorder: Replayed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An attention that goes by the texts' lengths on the host cannot be recorded."""
    encoder = encoder_of("Bert", PACKED["Bert"])
    expected = one_by_one(encoder, table)
    monkeypatch.setattr(packed, "has_varlen", lambda *_: False)
    torch.testing.assert_close(vectors_of(encoder, table), expected, rtol=0, atol=2e-6)
    assert recorder.n_replayed == 0
    assert "encoded without CUDA graphs" in caplog.text


def test_an_encoder_leaves_the_memory_with_its_graphs(
    table: TokenTable, recorder: Replayed
) -> None:
    """Without waiting for Python's garbage collector."""
    encoder = encoder_of("Bert", PACKED["Bert"])
    weight = weakref.ref(encoder.backbone.embeddings.word_embeddings.weight)
    gc.collect()
    gc.disable()
    try:
        vectors_of(encoder, table)
        assert recorder.n_recorded
        del encoder
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("n_texts", "expected"),
    [(1, 1), (2, 2), (3, 4), (1000, 1024), (40_000, 65_535), (65_535, 65_535), (70_000, 70_000)],
)
def test_the_number_of_texts_is_rounded_up_to_what_the_kernel_takes(
    n_texts: int, expected: int
) -> None:
    texts = graphs._in_few_shapes(PackedTexts.of([3] * n_texts, CPU))
    assert len(texts.ends) == expected + 1
    assert texts.longest == 64
    assert texts.ends[n_texts:].tolist() == [3 * n_texts] * (expected - n_texts + 1)


def test_batches_may_be_prepared_by_a_thread(table: TokenTable, recorder: Replayed) -> None:
    encoder = encoder_of("Bert", PACKED["Bert"])
    expected = vectors_of(encoder, table)
    vectors = torch.full_like(expected, torch.nan)
    encode_of_batch = encode._BatchEncoder(encoder, table, 0)
    with torch.inference_mode():
        for rows, batch in ahead(encode_of_batch.prepare, batches_of(table)):
            vectors[rows] = encode_of_batch(rows, batch)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", PACKED)
def test_nothing_is_asked_of_the_device_while_it_is_recorded(
    kind: str,
    pooling: str,
    table: TokenTable,
    recorder: Replayed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA refuses to record that."""
    waits: list[int] = []
    record = recorder.record

    def counted(compute: Callable[[], torch.Tensor]) -> Any:
        with monkeypatch.context() as patch, CountedWaits() as counted:
            patch.setattr(
                "torch.nn.attention.varlen.varlen_attn", lambda query, *_, **__: query.clone()
            )
            compute()
        waits.append(counted.waits)
        return record(compute)

    monkeypatch.setattr(recorder, "record", counted)
    vectors_of(encoder_of(kind, PACKED[kind], pooling), table)
    assert waits
    assert not any(waits)


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", PACKED)
def test_a_gpu_records(
    kind: str, pooling: str, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoder = encoder_of(kind, PACKED[kind], pooling)
    expected = one_by_one(encoder, table)
    recorded: list[int] = []
    record = graphs.Recorder.record

    def counted(self: graphs.Recorder, compute: Callable[[], torch.Tensor]) -> Any:
        recorded.append(1)
        return record(self, compute)

    monkeypatch.setattr(graphs.Recorder, "record", counted)
    monkeypatch.setattr(graphs, "BATCHES_BEFORE_RECORDING", 2)
    monkeypatch.setattr(encode, "tokens_per_batch", lambda *_: N_TOKENS)
    monkeypatch.setattr(encode, "_warnings", set())
    vectors = vectors_of(encoder.to("cuda", torch.bfloat16), table)
    likeness = torch.nn.functional.cosine_similarity(vectors, expected)
    assert likeness.min() > 0.99
    assert recorded
    assert not encode._warnings
