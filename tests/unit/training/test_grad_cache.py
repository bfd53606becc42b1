"""The cached gradient is the gradient: held against a plain backward pass in fp64."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.tokenize import Tokenizing
from mlflow_dr.errors import UsageError
from mlflow_dr.training.batches import Collator, Group
from mlflow_dr.training.grad_cache import Texts, _chunked, cached_vectors
from mlflow_dr.training.loss import contrastive_loss


def batch_of(encoder: Encoder, n_queries: int, n_passages: int) -> dict[str, Texts]:
    words = ("red", "green", "blue", "white", "black", "pink", "brown")
    groups = [
        Group(
            Query(f"q{i}", f"what is {words[i % 7]}"),
            [
                Passage(f"p{i}{j}", "", " ".join([words[(i + j) % 7]] * (1 + i % 5)))
                for j in range(n_passages)
            ],
        )
        for i in range(n_queries)
    ]
    return Collator(Tokenizing(encoder.tokenizer, encoder.settings))(groups)


def with_dropout(encoder: Encoder, share: float) -> Encoder:
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = share
    return encoder.train()


class Double(nn.Module):
    """An encoder whose vectors are fp64, as its weights are."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]
        return nn.functional.normalize(states[:, 0], dim=-1)


def loss_of(vectors: Mapping[str, Tensor], temperature: float) -> Tensor:
    queries, passages = vectors["query"], vectors["passage"]
    scores = queries @ passages.T / temperature
    each = len(passages) // len(queries)
    return nn.functional.cross_entropy(scores, torch.arange(len(queries)) * each)


def gradients(models: Mapping[str, nn.Module]) -> list[Tensor]:
    unique = {id(p): p for model in models.values() for p in model.parameters()}
    return [p.grad.clone() for p in unique.values() if p.grad is not None]


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("n_passages", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradients_equal_those_of_the_whole_batch(
    tiny: Encoder, temperature: float, n_passages: int, tied: bool, accumulation: int
) -> None:
    query_model = Double(with_dropout(tiny, 0.3))
    models = {"query": query_model, "passage": query_model if tied else copy.deepcopy(query_model)}
    sizes = {"query": 3, "passage": 4}  # neither divides 7 or 21

    def encode(texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        return {role: models[role](**one) for role, one in texts.items()}

    def plain(texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        """The same chunks, so that dropout draws the same numbers, in one graph."""
        parts: dict[str, list[Tensor]] = {role: [] for role in texts}
        for chunk, _ in _chunked(texts, sizes):
            for role, vectors in encode(chunk).items():
                parts[role].append(vectors)
        return {role: torch.cat(vectors) for role, vectors in parts.items()}

    found = []
    for vectors_of in (plain, lambda texts: cached_vectors(encode, texts, sizes)):
        torch.manual_seed(1)
        for model in models.values():
            model.zero_grad()
        for _ in range(accumulation):
            texts = batch_of(tiny, 7, n_passages)
            (loss_of(vectors_of(texts), temperature) / accumulation).backward()
        found.append((gradients(models), torch.get_rng_state()))
    (expected, state_after), (got, cached_state_after) = found
    assert len(got) == len(expected) > 10
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(state_after, cached_state_after)


def test_a_loss_scale_reaches_the_gradients_once(tiny: Encoder) -> None:
    """What the fp16 scaler does: scale the loss, divide the gradients."""
    encoder = with_dropout(tiny, 0.0)
    texts = batch_of(encoder, 5, 2)

    def encode(some: Mapping[str, Texts]) -> dict[str, Tensor]:
        return {role: encoder(**one) for role, one in some.items()}

    found = []
    for scale in (1.0, 1024.0):
        encoder.zero_grad()
        vectors = cached_vectors(encode, texts, {"query": 2, "passage": 3})
        (contrastive_loss(vectors["query"], vectors["passage"], 0.05) * scale).backward()
        found.append([p.grad / scale for p in encoder.parameters() if p.grad is not None])
    for plain, scaled in zip(*found, strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_kept_and_its_cache_does_not_cut_the_graph(tiny: Encoder, inside: bool) -> None:
    encoder = with_dropout(tiny, 0.0)
    texts = batch_of(encoder, 6, 1)
    kinds: list[torch.dtype] = []
    first = next(module for module in encoder.modules() if isinstance(module, nn.Linear))
    first.register_forward_hook(lambda _m, _i, output: kinds.append(output.dtype))

    def encode(some: Mapping[str, Texts]) -> dict[str, Tensor]:
        return {role: encoder(**one) for role, one in some.items()}

    found = []
    for cached in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            vectors = (
                cached_vectors(encode, texts, {"query": 4, "passage": 4})
                if cached
                else encode(texts)
            )
            loss = contrastive_loss(vectors["query"], vectors["passage"], 0.05)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append({n: p.grad.clone() for n, p in encoder.named_parameters()})
    assert set(kinds) == {torch.bfloat16}
    for name, expected in found[0].items():
        difference = (found[1][name] - expected).norm() / expected.norm().clamp(min=1e-6)
        assert difference < 0.05, name


def test_gradients_are_reduced_once_at_the_last_chunk(tiny: Encoder) -> None:
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("quiet")
        yield
        events.append("end")

    def encode(some: Mapping[str, Texts]) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            events.append("+".join(some))
        return {role: tiny(**one) for role, one in some.items()}

    vectors = cached_vectors(encode, batch_of(tiny, 5, 1), {"query": 2, "passage": 3}, no_sync)
    contrastive_loss(vectors["query"], vectors["passage"], 1.0).backward()
    quiet = ["quiet", "query", "end", "quiet", "query", "end", "quiet", "passage", "end"]
    assert events == [*quiet, "query+passage"]


def test_a_chunk_larger_than_the_batch_is_the_batch(tiny: Encoder) -> None:
    calls: list[list[str]] = []

    def encode(some: Mapping[str, Texts]) -> dict[str, Tensor]:
        calls.append(list(some))
        return {role: tiny(**one) for role, one in some.items()}

    cached_vectors(encode, batch_of(tiny, 3, 1), {"query": 50, "passage": 50})
    assert calls == [["query", "passage"]]


def test_a_chunk_size_below_one_is_refused(tiny: Encoder) -> None:
    with pytest.raises(UsageError, match="chunk size of query is 0"):
        cached_vectors(lambda texts: {}, batch_of(tiny, 3, 1), {"query": 0, "passage": 1})
