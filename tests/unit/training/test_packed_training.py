"""Texts end to end in training: the same loss and the same gradients as with padding.

Here our attention computes each length by itself, as in encoding on a processor; on a GPU a kernel
takes its place, which `tests/unit/encoder/test_packed.py` is about.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlflow_dr.encoder import first_token, packed
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.training import bi_encoder
from mlflow_dr.training.batches import Texts
from mlflow_dr.training.bi_encoder import (
    BiEncoder,
    can_train_packed,
    encode_end_to_end,
    packing_defect,
)

Make = Callable[..., Any]
LENGTHS = [5 + 37 * i % 90 for i in range(40)]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training decides as if there were the kernel."""
    monkeypatch.setattr(bi_encoder, "has_varlen", lambda *_: True)


def make_known(texts: Texts) -> Texts:
    return {**texts, "lengths": texts["attention_mask"].sum(dim=1).numpy()}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_and_gradients_are_those_of_padded_texts(
    make_small: Make, make_texts: Make, as_on_a_gpu: None, pooling: str
) -> None:
    encoder: Encoder = make_small(pooling=pooling, normalize=True).double()
    texts = make_known(make_texts(LENGTHS))
    weights = torch.randn(len(LENGTHS), 16, generator=torch.Generator().manual_seed(1)).double()
    assert can_train_packed(encoder, torch.device("cpu"))
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for encode in (bi_encoder._encode, encode_end_to_end):
        encoder.zero_grad()
        vectors = encode(encoder, texts)
        (vectors * weights).mean().backward()
        found.append((vectors, [weight.grad for weight in encoder.parameters()]))
    (expected, expected_grads), (vectors, grads) = found
    torch.testing.assert_close(vectors, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sizes", [None, {"query": 2, "passage": 3}], ids=str)
def test_the_losses_of_a_training_are_the_same(
    make_small: Make,
    make_trainer: Make,
    monkeypatch: pytest.MonkeyPatch,
    sizes: dict[str, int] | None,
) -> None:
    encoder = make_small(normalize=True)
    losses: list[list[float]] = []
    called: list[int] = []
    plain = bi_encoder.encode_end_to_end
    monkeypatch.setattr(
        bi_encoder, "encode_end_to_end", lambda *args: called.append(1) or plain(*args)
    )
    for is_packed in (False, True):
        monkeypatch.setattr(bi_encoder, "has_varlen", lambda *_, packed=is_packed: packed)
        trainer = make_trainer(
            copy.deepcopy(encoder), max_steps=8, learning_rate=1e-2, chunk_sizes=sizes
        )
        assert not called
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(called) > 16
    assert losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_dropout_of_attention_recomputing_and_a_choice_of_attention_keep_padding(
    make_small: Make, make_texts: Make, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bi_encoder, "encode_end_to_end", lambda *_: pytest.fail("packed"))
    assert not can_train_packed(make_small(dropout=0.1), torch.device("cpu"))
    texts = {"passage": make_known(make_texts(LENGTHS))}
    recomputing = BiEncoder(make_small())
    recomputing.activation_checkpointing_enable()
    for model in (BiEncoder(make_small(dropout=0.1)), BiEncoder(make_small(), packs=False)):
        assert model(texts)["passage"].shape == (len(LENGTHS), 16)
    assert recomputing(texts)["passage"].shape == (len(LENGTHS), 16)


@pytest.mark.parametrize("fault", ["vectors", "gradients", "error"])
def test_what_is_not_proven_is_padded_and_it_is_said_once(
    make_small: Make,
    make_texts: Make,
    as_on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, vectors: Tensor) -> Tensor:
            return vectors.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.flip(0)

    plain = bi_encoder.encode_packed

    def wrong(*arguments: Any) -> Tensor:
        vectors = plain(*arguments)
        if fault == "error":
            raise RuntimeError("no kernel for this")
        return vectors.flip(0) if fault == "vectors" else WrongGradient.apply(vectors)

    monkeypatch.setattr(bi_encoder, "encode_packed", wrong)
    encoder = make_small()
    texts = make_known(make_texts(LENGTHS))
    expected = bi_encoder._encode(encoder.eval(), texts)
    model = BiEncoder(encoder).train()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = model({"passage": texts})["passage"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("each passage is padded in training, which is slower (")
    assert ("no kernel for this" if fault == "error" else f"{fault} differ") in message
    assert all(module.training for module in model.modules())


def test_a_frozen_encoder_is_proven_by_its_vectors(make_small: Make, make_texts: Make) -> None:
    encoder = make_small().requires_grad_(False)
    assert packing_defect(encoder, make_known(make_texts(LENGTHS))) == ""
    assert packing_defect(encoder, make_texts([3])) == ""


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_gpu_is_not_asked_for_anything(
    make_small: Make, make_texts: Make, monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    """Fake tensors have no answers; the kernel computes the attention, forward and backward."""
    for module in (bi_encoder, packed, first_token):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
    encoder = make_small(pooling=pooling).bfloat16()
    texts = make_known(make_texts(LENGTHS))
    with FakeTensorMode(allow_non_fake_inputs=True):
        vectors = encode_end_to_end(encoder, texts)
        assert vectors.shape == (len(LENGTHS), 16)
        vectors.sum().backward()
        with pytest.raises(Exception, match="_local_scalar"):
            vectors.sum().item()
