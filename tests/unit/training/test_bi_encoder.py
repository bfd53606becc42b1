"""Queries and passages to vectors: which weights, and in which pieces."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlflow_dr.encoder.model import Encoder, untie
from mlflow_dr.training.batches import Texts, cut, inverse
from mlflow_dr.training.bi_encoder import (
    TOKENS_PER_BATCH,
    BiEncoder,
    batches_of_similar_length,
    encode_in_batches,
)
from mlflow_dr.training.grad_cache import cached_vectors

LONG = [5 + 37 * i % 90 for i in range(120)]  # 6,000 tokens, of 120 x 94 padded


def calls_of(encoder: Encoder) -> list[tuple[int, ...]]:
    """Filled with the shape of the token ids of each call."""
    shapes: list[tuple[int, ...]] = []
    encoder.register_forward_pre_hook(
        lambda _m, _a, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_batches_give_the_vectors_and_gradients_of_one_padded_batch(
    make_small: Callable[..., Encoder],
    make_texts: Callable[..., Texts],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    encoder = make_small(normalize=True).to(dtype)
    texts = make_texts(LONG)
    weights = torch.randn(len(LONG), 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    unsplit = encoder(**texts)
    (unsplit * weights).mean().backward()
    expected = {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    shapes = calls_of(encoder)
    vectors = encode_in_batches(encoder, texts)
    assert len(shapes) > 3
    torch.testing.assert_close(vectors, unsplit, rtol=tolerance, atol=tolerance)
    (vectors * weights).mean().backward()
    assert expected
    for name, weight in encoder.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=tolerance)


def test_batches_keep_to_their_tokens_and_have_little_padding(
    make_small: Callable[..., Encoder], make_texts: Callable[..., Texts]
) -> None:
    encoder = make_small()
    shapes = calls_of(encoder)
    encode_in_batches(encoder, make_texts(LONG))
    sizes = [rows * length for rows, length in shapes]
    assert max(sizes) <= TOKENS_PER_BATCH["cpu"]
    assert sum(rows for rows, _ in shapes) == len(LONG)
    assert sum(sizes) < 1.25 * sum(LONG) < 0.7 * len(LONG) * max(LONG)


@pytest.mark.parametrize("lengths", [[5, 9, 40], [64] * 32, [60] * 50, [1]], ids=len)
def test_small_batches_are_not_split(
    make_small: Callable[..., Encoder], make_texts: Callable[..., Texts], lengths: list[int]
) -> None:
    encoder = make_small()
    shapes = calls_of(encoder)
    encode_in_batches(encoder, make_texts(lengths))
    assert shapes == [(len(lengths), max(lengths))]


def test_queries_and_passages_have_their_own_weights(
    make_small: Callable[..., Encoder], make_texts: Callable[..., Texts]
) -> None:
    texts = make_texts([3, 8, 5])
    encoder = make_small().eval()
    with torch.no_grad():
        tied = BiEncoder(encoder)({"query": texts, "passage": texts})
        assert torch.equal(tied["query"], tied["passage"])
        untie(encoder)
        for weight in encoder.query_encoder.parameters():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        apart = BiEncoder(encoder)({"passage": texts, "query": texts})
        assert torch.equal(apart["passage"], tied["passage"])
        assert not torch.allclose(apart["query"], tied["query"])
        assert torch.equal(apart["query"], encoder.query_encoder(**texts))
        assert list(BiEncoder(encoder)({"query": texts})) == ["query"]


def test_inverse_undoes_an_order() -> None:
    groups = [torch.tensor([4, 1]), torch.tensor([0, 3, 2])]
    assert torch.cat(groups)[inverse(groups)].tolist() == [0, 1, 2, 3, 4]


def test_cutting_leaves_out_columns_of_padding(make_texts: Callable[..., Texts]) -> None:
    texts = {**make_texts([2, 7, 4]), "lengths": np.array([2, 7, 4])}
    some, rows = cut(texts, np.array([2, 0]))
    assert rows.tolist() == [2, 0]
    assert some["input_ids"].tolist() == texts["input_ids"][[2, 0], :4].tolist()
    assert some["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert some["lengths"].tolist() == [4, 2]


def test_a_gpu_has_batches_of_similar_length_where_they_have_less_padding() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.gamma(6, 80 / 6, 512).astype(int), 5, 128)
    batches = batches_of_similar_length(lengths, 128, "cuda")
    assert sorted(np.concatenate(batches).tolist()) == list(range(512))
    sizes = [len(rows) * int(lengths[rows].max()) for rows in batches]
    assert len(batches) > 2
    assert max(sizes) <= 16384
    assert sum(sizes) < 0.75 * 512 * 128
    for few in (lengths[:128], np.full(512, 128), np.full(1024, 120)):
        (rows,) = batches_of_similar_length(few, 128, "cuda")
        assert rows.tolist() == list(range(len(few)))
    assert len(batches_of_similar_length(lengths, 128, "mps")) == 1


class Summing(torch.nn.Module):
    """An encoder that asks nothing of its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (self.table(input_ids) * attention_mask[..., None]).sum(dim=1)


def test_lengths_on_the_host_spare_a_gpu_all_waiting(
    make_texts: Callable[..., Texts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no answers; the gradient cache cuts batches in the same way."""
    texts, encoder = make_texts(LONG), Summing()
    known = {**texts, "lengths": np.array(LONG)}
    expected = encoder(**texts)
    torch.testing.assert_close(encode_in_batches(encoder, known), expected)
    sizes = {"passage": 50}

    def encode(texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        return {role: encode_in_batches(encoder, values) for role, values in texts.items()}

    found = cached_vectors(encode, {"passage": known}, sizes)
    torch.testing.assert_close(found["passage"], expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encode_in_batches(encoder, known).sum().backward()
        cached_vectors(encode, {"passage": known}, sizes)["passage"].sum().backward()
        with pytest.raises(Exception, match="numpy"):
            encode_in_batches(encoder, {name: values + 0 for name, values in texts.items()})


def test_processes_that_share_weights_make_equally_many_calls(
    make_small: Callable[..., Encoder], make_texts: Callable[..., Texts]
) -> None:
    encoder = make_small()
    shapes = calls_of(encoder)
    BiEncoder(encoder, in_batches=False)({"passage": make_texts(LONG)})
    assert shapes == [(len(LONG), max(LONG))]
