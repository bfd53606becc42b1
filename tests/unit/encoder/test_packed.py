"""Texts end to end have the vectors that each has alone."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from mlflow_dr.encoder import first_token, packed, varlen
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.packed import ATTENTION, attend, can_pack, encode_packed
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.retrieval import encode
from mlflow_dr.retrieval.encode import encode_batches
from mlflow_dr.stores.token_table import TokenTable, token_table

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 100,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}  # fewer heads of keys than of queries
DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
T5 = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PACKED: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    "DistilBert": DISTIL,
    "ModernBert": {
        **SIZES,
        **SPECIAL,
        "num_hidden_layers": 3,
        "local_attention": 16,
        "global_attn_every_n_layers": 3,
    },
    "Electra": {**SIZES, "embedding_size": 16},
    "Llama": {**SIZES, **GROUPED},
    "Qwen3": {**SIZES, **GROUPED},
    "Mistral": {**SIZES, **GROUPED, "sliding_window": 12},
}
PADDED: dict[str, dict[str, Any]] = {
    "MPNet": SIZES,
    "Gemma2": {**SIZES, **GROUPED, "sliding_window": 12},
    "T5": T5,
}
LENGTHS = [40, 40, 39, 33, 7, 7, 7, 2, 1]


def encoder_of(kind: str, settings: dict[str, Any], pooling: str = "mean") -> Encoder:
    """A small encoder with random weights, large enough that attention matters."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}EncoderModel" if kind == "T5" else f"{kind}Model")
    backbone = model(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    config = EncoderConfig(
        pooling=pooling, normalize=True, query_max_length=64, passage_max_length=64
    )
    return Encoder(backbone, SimpleNamespace(pad_token_id=0), config).eval()


@pytest.fixture(scope="module")
def table() -> TokenTable:
    generator = np.random.default_rng(0)
    return token_table([generator.integers(5, 100, length).tolist() for length in LENGTHS])


@pytest.fixture(autouse=True)
def no_warning_given(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(encode, "_warnings", set())
    yield


@torch.inference_mode()
def one_by_one(encoder: Encoder, table: TokenTable) -> torch.Tensor:
    texts = [torch.from_numpy(table[row].astype(np.int64))[None] for row in range(len(table))]
    return torch.cat([encoder(ids, torch.ones_like(ids)) for ids in texts])


@pytest.mark.parametrize("kind", PACKED)
def test_packed_texts_have_the_vectors_that_each_has_alone(kind: str, table: TokenTable) -> None:
    encoder = encoder_of(kind, PACKED[kind])
    alone = one_by_one(encoder, table)
    assert can_pack(encoder)
    before = encoder.backbone.config._attn_implementation
    ids, lengths = table.packed(np.arange(len(table)))
    with torch.inference_mode():
        packed = encode_packed(encoder, torch.from_numpy(ids), lengths.tolist())
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
        packed = encode_packed(encoder, torch.from_numpy(ids), lengths.tolist())
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
    assert encode_of_batch(np.arange(4)).shape == (4, 32)


def test_gradients_of_packed_texts_are_those_of_texts_alone(table: TokenTable) -> None:
    encoder = encoder_of("Bert", PACKED["Bert"])
    weight = encoder.backbone.encoder.layer[0].attention.self.query.weight
    ids, lengths = table.packed(np.arange(4))
    (found,) = torch.autograd.grad(
        encode_packed(encoder, torch.from_numpy(ids), lengths.tolist())[:, 0].sum(), [weight]
    )
    texts = [torch.from_numpy(table[row].astype(np.int64))[None] for row in range(4)]
    alone = torch.cat([encoder(text, torch.ones_like(text)) for text in texts])
    (expected,) = torch.autograd.grad(alone[:, 0].sum(), [weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_cannot_be_computed_is_refused(option: str) -> None:
    states = torch.zeros(1, 4, 3, 8)
    texts = PackedTexts([2, 1], torch.device("cpu"))
    module, asked = SimpleNamespace(is_causal=False), dict[str, Any]({option: 1.0})
    attend(module, states, states, states, None, packed_texts=texts)
    with pytest.raises(NotImplementedError, match=option):
        attend(module, states, states, states, None, packed_texts=texts, **asked)


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_ends: torch.Tensor,
    key_ends: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` is documented to compute, text by text."""
    parts = []
    sizes = query_ends.diff().tolist(), key_ends.diff().tolist()
    assert (max(sizes[0]), max(sizes[1])) == (max_q, max_k)
    assert query_ends.dtype == key_ends.dtype == torch.int32
    for queries, keys, values in zip(
        query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True
    ):
        # the last query is at the place of the last key
        places = torch.arange(len(queries)) + len(keys) - len(queries)
        offsets = torch.arange(len(keys)) - places[:, None]
        left, right = window_size
        mask = (offsets >= -left) | (left < 0)
        mask &= (offsets <= right) | (right < 0)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in (queries, keys, values)),
            attn_mask=mask,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        parts.append(attended.transpose(0, 1))
    return torch.cat(parts)


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
        vectors = encode_packed(encoder, torch.from_numpy(ids), lengths.tolist())
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
        vectors = encode_packed(encoder, token_ids, lengths.tolist())
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
    texts = PackedTexts([length] * 3, torch.device("cpu"))
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
