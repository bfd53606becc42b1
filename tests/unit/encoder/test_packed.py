"""Texts end to end have the vectors that each has alone."""

import logging
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mlflow_dr.encoder import first_token, packed, varlen
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.packed import ATTENTION, attend, can_pack, encode_packed
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.encode import encode_batches
from mlflow_dr.stores.token_table import TokenTable, token_table
from tests.unit.encoder.packing import (
    GROUPED,
    PACKED,
    SIZES,
    T5,
    encoder_of,
    one_by_one,
    texts_of,
    varlen_by_definition,
)

PADDED: dict[str, dict[str, Any]] = {
    "MPNet": SIZES,
    "Gemma2": {**SIZES, **GROUPED, "sliding_window": 12},
    "T5": T5,
}
LENGTHS = [40, 40, 39, 33, 7, 7, 7, 2, 1]


@pytest.fixture(scope="module")
def table() -> TokenTable:
    generator = np.random.default_rng(0)
    return token_table([generator.integers(5, 100, length).tolist() for length in LENGTHS])


@pytest.fixture(autouse=True)
def no_warning_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(encode, "_warnings", set())
    yield


@pytest.mark.parametrize("kind", PACKED)
def test_packed_texts_have_the_vectors_that_each_has_alone(kind: str, table: TokenTable) -> None:
    encoder = encoder_of(kind, PACKED[kind])
    alone = one_by_one(encoder, table)
    assert can_pack(encoder)
    before = encoder.backbone.config._attn_implementation
    ids, lengths = table.packed(np.arange(len(table)))
    with torch.inference_mode():
        packed = encode_packed(encoder, torch.from_numpy(ids), texts_of(lengths))
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    assert encoder.backbone.config._attn_implementation == before != ATTENTION


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DistilBert"])
@pytest.mark.parametrize("pooling", ["cls", "cls+mean"])
def test_vectors_of_first_tokens_are_those_that_each_text_has_alone(
    kind: str, pooling: str, table: TokenTable
) -> None:
    encoder = encoder_of(kind, PACKED[kind], pooling)
    alone = one_by_one(encoder, table)
    ids, lengths = table.packed(np.arange(len(table)))
    rows: list[int] = []
    for module in encoder.backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    with torch.inference_mode():
        packed = encode_packed(encoder, torch.from_numpy(ids), texts_of(lengths))
    torch.testing.assert_close(packed, alone, rtol=0, atol=2e-6)
    is_short = pooling == "cls" and kind != "DistilBert"
    assert rows[-1] == (len(LENGTHS) if is_short else sum(LENGTHS))
    torch.testing.assert_close(one_by_one(encoder, table), alone, rtol=0, atol=0)


@pytest.mark.parametrize("kind", PADDED)
def test_other_backbones_are_padded_and_it_is_said_once(
    kind: str, table: TokenTable, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(kind, PADDED[kind])
    alone = one_by_one(encoder, table)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ((_, vectors),) = encode_batches(encoder, table, 0, [np.arange(len(table))])
    torch.testing.assert_close(vectors, alone, rtol=0, atol=2e-6)
    warned = [record.message for record in caplog.records if "padding" in record.message]
    assert len(warned) == (kind != "T5"), warned  # it takes no position numbers, so none is tried


def test_a_single_text_proves_the_backbone_too(table: TokenTable) -> None:
    encoder = encoder_of("MPNet", PADDED["MPNet"])
    ((_, vectors),) = encode_batches(encoder, table, 0, [np.array([0])])
    torch.testing.assert_close(vectors, one_by_one(encoder, table)[:1], rtol=0, atol=2e-6)


def test_an_encoder_with_a_forward_of_its_own_is_not_packed() -> None:
    class Doubled(Encoder):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input_ids, attention_mask)

    encoder = encoder_of("Bert", PACKED["Bert"])
    assert can_pack(encoder)
    assert not can_pack(Doubled(encoder.backbone, encoder.tokenizer, encoder.settings))


def test_batches_are_packed_where_it_is_proven(
    table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of("Bert", PACKED["Bert"])
    monkeypatch.setattr(encoder, "forward", None)
    encode_of_batch = encode._BatchEncoder(encoder, table, 0)
    encode_of_batch._is_packed = True
    rows = np.arange(4)
    assert encode_of_batch(rows, partial(encode_of_batch.prepare, rows)).shape == (4, 32)


def test_gradients_of_packed_texts_are_those_of_texts_alone(table: TokenTable) -> None:
    encoder = encoder_of("Bert", PACKED["Bert"])
    weight = encoder.backbone.encoder.layer[0].attention.self.query.weight
    ids, lengths = table.packed(np.arange(4))
    (found,) = torch.autograd.grad(
        encode_packed(encoder, torch.from_numpy(ids), texts_of(lengths))[:, 0].sum(), [weight]
    )
    texts = [torch.from_numpy(table[row].astype(np.int64))[None] for row in range(4)]
    alone = torch.cat([encoder(text, torch.ones_like(text)) for text in texts])
    (expected,) = torch.autograd.grad(alone[:, 0].sum(), [weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_cannot_be_computed_is_refused(option: str) -> None:
    states = torch.zeros(1, 4, 3, 8)
    texts = PackedTexts.of([2, 1], torch.device("cpu"))
    module, asked = SimpleNamespace(is_causal=False), dict[str, Any]({option: 1.0})
    attend(module, states, states, states, None, packed_texts=texts)
    with pytest.raises(NotImplementedError, match=option):
        attend(module, states, states, states, None, packed_texts=texts, **asked)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", PACKED)
def test_the_kernel_of_cuda_is_called_as_it_is_documented(
    kind: str, pooling: str, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(kind, PACKED[kind], pooling)
    alone = one_by_one(encoder, table)
    calls: list[int] = []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return varlen_by_definition(*arguments, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", watched)
    for module in (packed, first_token):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
    ids, lengths = table.packed(np.arange(len(table)))
    with torch.inference_mode():
        vectors = encode_packed(encoder, torch.from_numpy(ids), texts_of(lengths))
    torch.testing.assert_close(vectors, alone, rtol=0, atol=2e-6)
    config = encoder.backbone.config
    assert len(calls) == config.num_hidden_layers


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", PACKED)
def test_a_batch_asks_nothing_of_the_device(
    kind: str, pooling: str, table: TokenTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would be waited for, by a question or by a copy that does not go through `on_device`.

    Fake tensors have no answers. CUDA's kernel computes the attention here.
    """
    copied: list[torch.device] = []
    from_numpy = torch.from_numpy

    def counted(array: np.ndarray, device: torch.device) -> torch.Tensor:
        copied.append(device)
        return from_numpy(array)

    def refused(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("a tensor was made of the host's numbers")

    monkeypatch.setattr(varlen, "on_device", counted)
    for module in (packed, first_token):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
    encoder = encoder_of(kind, PACKED[kind], pooling).bfloat16()
    ids, lengths = table.packed(np.arange(len(table)))
    token_ids = from_numpy(ids)
    for name in ("from_numpy", "tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, refused)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        vectors = encode_packed(encoder, token_ids, texts_of(lengths))
        assert vectors.shape == (len(LENGTHS), 32)
        assert vectors.dtype == torch.float32
        with pytest.raises(Exception, match="_local_scalar"):
            vectors.sum().item()
    assert len(copied) == 1  # the ends of the texts


def states_of(length: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of 3 texts and 4 heads, bf16."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 4, 3 * length, 16, generator=generator).bfloat16() for _ in range(3)
    )
    return query * scale, key, value


@torch.inference_mode()
def attended(states: tuple[torch.Tensor, ...], length: int) -> torch.Tensor:
    """What `attend` gives for these texts."""
    texts = PackedTexts.of([length] * 3, torch.device("cpu"))
    found, _ = attend(SimpleNamespace(is_causal=False), *states, None, packed_texts=texts)
    return found


def exactly(states: tuple[torch.Tensor, ...], length: int) -> torch.Tensor:
    """The same in fp64."""
    query, key, value = (part[0].unflatten(1, (3, length)).double() for part in states)
    weights = (query @ key.transpose(2, 3) / 4).softmax(dim=-1)
    return (weights @ value).flatten(1, 2).transpose(0, 1)[None]


@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_attention_by_exponentials(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []

    def watched(*args: Any) -> torch.Tensor | None:
        found = by_exponentials(*args)
        used.append(found is not None)
        return found

    by_exponentials = packed._attend_by_exponentials
    monkeypatch.setattr(packed, "_attend_by_exponentials", watched)
    states = states_of(length)
    found = attended(states, length).double()
    assert used == [True]
    torch.testing.assert_close(found, exactly(states, length), rtol=0, atol=0.02)


@pytest.mark.parametrize("sign", [1, -1])
def test_exponentials_that_overflow_or_vanish_are_not_used(sign: int) -> None:
    """Products of all tokens with one key are 200 in size; a softmax does not mind."""
    length = 8
    query, key, value = states_of(length)
    query, key = torch.ones_like(query), torch.zeros_like(key)
    key[:] = sign * 50
    states = query, key, value
    found = attended(states, length).double()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, exactly(states, length), rtol=0, atol=0.02)


def test_attention_to_nan_is_nan() -> None:
    query, key, value = states_of(8)
    query[0, 0, 0, 0] = torch.nan
    assert bool(attended((query, key, value), 8)[0, 0, 0].isnan().all())


def test_long_texts_do_not_have_all_their_weights_in_memory() -> None:
    settings = packed._Attention(None, is_causal=False, window=None, dropout=0.0)
    with torch.inference_mode():
        for length, expected in ((512, True), (513, False)):
            states = torch.zeros(1, 1, length, 2, dtype=torch.bfloat16)
            assert packed._suits_exponentials(states, states, settings) is expected
