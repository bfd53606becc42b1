"""The cached gradient is the gradient: held against a plain backward pass."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie, with_projection
from mlflow_dr.errors import UsageError
from mlflow_dr.training.batches import Texts
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.grad_cache import cached_vectors
from mlflow_dr.training.loss import Objective

RAGGED = {"query": 2, "passage": 3}


class Encode:
    """The bi-encoder; remembers the texts of each call, and whether it had a graph."""

    def __init__(self, encoder: Encoder) -> None:
        self.bi_encoder = BiEncoder(encoder)
        self.calls: list[tuple[bool, dict[str, Texts]]] = []

    def __call__(self, texts: Mapping[str, Texts]) -> dict[str, Tensor]:
        self.calls.append((torch.is_grad_enabled(), dict(texts)))
        bare = {
            role: {name: inputs[name] for name in ("input_ids", "attention_mask")}
            for role, inputs in texts.items()
        }
        return self.bi_encoder(bare)

    def first_pass(self) -> list[dict[str, Texts]]:
        return [texts for with_graph, texts in self.calls if not with_graph]

    def graphs(self) -> list[dict[str, Texts]]:
        return [texts for with_graph, texts in self.calls if with_graph]


Batch = dict[str, Texts]


@pytest.fixture
def make_batch(make_texts: Callable[..., Texts]) -> Callable[..., Batch]:
    """Texts of both roles, of many lengths; each carries its row number beside its tokens."""

    def make(n_queries: int, n_passages: int, seed: int = 0) -> Batch:
        lengths = {
            "query": [2 + 3 * i % 5 for i in range(n_queries)],
            "passage": [3 + 5 * i % 11 for i in range(n_queries * n_passages)],
        }
        batch = {role: dict(make_texts(some, seed)) for role, some in lengths.items()}
        for role_texts in batch.values():
            n, length = role_texts["input_ids"].shape
            role_texts["row"] = torch.arange(n)[:, None].expand(n, length)
        return batch

    return make


def joined(encode: Encode, calls: Sequence[Mapping[str, Texts]]) -> dict[str, Tensor]:
    """The vectors of a whole batch that is encoded in several calls."""
    parts: dict[str, list[Tensor]] = {}
    rows: dict[str, list[Tensor]] = {}
    for texts in calls:
        for role, vectors in encode(texts).items():
            parts.setdefault(role, []).append(vectors)
            rows.setdefault(role, []).append(texts[role]["row"][:, 0])
    return {role: torch.cat(parts[role])[torch.cat(rows[role]).argsort()] for role in parts}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def both(
    encoder: Encoder,
    batches: Sequence[Batch],
    objective: Objective,
    sizes: Mapping[str, int],
    same_calls: bool = False,
    backward: Callable[[Tensor], object] = Tensor.backward,
    mode: Callable[[], Any] = nullcontext,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of accumulated batches with the cache, and without it.

    Losses, vectors and the random state afterwards are compared here.

    Args:
        encoder: in training mode.
        batches: accumulated.
        objective: the loss.
        sizes: of chunks.
        same_calls: without the cache, too, one call for each chunk, so that dropout is the same;
            else one call for the whole batch.
        backward: of the loss.
        mode: autocast.
    """
    encode = Encode(encoder.train())
    found: list[tuple[list[Tensor], dict[str, Tensor], Tensor]] = []
    chunked: list[list[dict[str, Texts]]] = []
    for cached in (True, False):
        torch.manual_seed(3)
        encoder.zero_grad()
        values = []
        for number, batch in enumerate(batches):
            with mode():
                if cached:
                    vectors = cached_vectors(encode, batch, sizes)
                    chunked.append(encode.first_pass())
                else:
                    vectors = joined(encode, chunked[number] if same_calls else [batch])
                loss = objective(vectors["query"], vectors["passage"]) / len(batches)
            backward(loss)
            encode.calls.clear()
            values += [loss.detach(), *(vector.detach() for vector in vectors.values())]
        found.append((values, gradients(encoder), torch.get_rng_state()))
    (ours, got, after_ours), (theirs, expected, after_theirs) = found
    if mode is nullcontext:
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert torch.equal(after_ours, after_theirs)
    assert got.keys() == expected.keys()
    return got, expected


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert any(value.abs().max() > 1e-6 for value in expected.values())
    for name, value in expected.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_passages", [1, 3])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_the_gradient_equals_that_of_the_whole_batch(
    make_small: Callable[..., Encoder],
    make_batch: Callable[..., Batch],
    temperature: float,
    n_passages: int,
    tied: bool,
) -> None:
    """In fp64 to 1e-12; 5 queries in chunks of 2 and 5 or 15 passages in chunks of 4: ragged."""
    encoder = make_small(normalize=True).double()
    if not tied:
        untie(encoder)
        for weight in encoder.untied_query_encoder.parameters():  # type: ignore[union-attr]
            weight.data += 0.1 * torch.randn(weight.shape, dtype=weight.dtype)
    for accumulation in (1, 2, 3, 4):
        batches = [make_batch(5, n_passages, seed) for seed in range(accumulation)]
        sizes = {"query": 2, "passage": 4}
        # the first dimensions have a loss of their own every other time
        dims = (3, 8)[: 2 * (accumulation % 2)]
        objective = Objective(temperature, matryoshka_dims=dims, normalize=True)
        got, expected = both(encoder, batches, objective, sizes)
        assert_equal(got, expected)
        assert len(got) == (37 if tied else 2 * 37)


@pytest.mark.parametrize(
    ("dropout", "tied", "projection", "lora"),
    [c for c in product([0.0, 0.3], [True, False], [True, False], [True, False]) if any(c[2:])]
    + [(0.3, True, False, False), (0.3, False, False, False)],
)
def test_dropout_projection_and_adapters(
    make_small: Callable[..., Encoder],
    make_batch: Callable[..., Batch],
    dropout: float,
    tied: bool,
    projection: bool,
    lora: bool,
) -> None:
    encoder = make_small(dropout)
    if projection:
        encoder = with_projection(encoder, None, 6)
    if not tied:
        untie(encoder)
    if lora:
        add_lora(encoder, "base", rank=2, alpha=4, dropout=dropout)
    encoder = encoder.double()
    for name, weight in encoder.named_parameters():
        if ".lora_B." in name or name.startswith("untied_query_encoder"):
            weight.data += 0.1 * torch.randn(weight.shape, dtype=weight.dtype)
    batches = [make_batch(5, 2, seed) for seed in range(2)]
    got, expected = both(encoder, batches, Objective(0.05), RAGGED, same_calls=dropout > 0)
    assert_equal(got, expected)
    if lora:
        assert all(".lora_" in name or "head." in name for name in got)
    assert any("head." in name for name in got) == projection


def test_dropout_draws_anew_in_each_chunk(
    make_small: Callable[..., Encoder], make_texts: Callable[..., Texts]
) -> None:
    """One text eight times, in four chunks, gives eight vectors."""
    encoder = make_small(0.3).train()
    text = make_texts([6])
    texts = {name: values.expand(8, -1) for name, values in text.items()}
    batch = {"query": texts, "passage": texts}
    vectors = cached_vectors(BiEncoder(encoder), batch, {"query": 2, "passage": 2})["query"]
    distances = torch.cdist(vectors, vectors) + torch.eye(8)
    assert distances.min() > 1e-3


def test_the_second_pass_does_not_change_the_random_state(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    """By a loss that samples, for example."""
    vectors = cached_vectors(Encode(make_small(0.3).train()), make_batch(5, 1), RAGGED)
    torch.rand(1)
    before = torch.get_rng_state()
    Objective()(vectors["query"], vectors["passage"]).backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "scaled"), [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_half_precision_adds_no_error_of_its_own(
    make_small: Callable[..., Encoder],
    make_batch: Callable[..., Batch],
    dtype: torch.dtype,
    scaled: bool,
    inside: bool,
) -> None:
    """As near to the fp64 gradient as the plain pass is, which is what its rounding allows.

    A half-precision gradient is that of another rounding for every shape of the batch, so cached
    and plain cannot be equal; measured: both are off by 0.1 % (fp16) or 0.8 % (bf16).
    Half as far again is allowed, the noise of so small a model. The backward pass may run inside
    autocast or outside of it.
    """
    encoder = make_small(normalize=True)
    exact = copy.deepcopy(encoder).double()
    batches = [make_batch(7, 2, seed) for seed in range(2)]
    objective = Objective(0.05)
    _, truth = both(exact, batches, objective, RAGGED)
    scale = 2.0**12 if scaled else 1.0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scaled)

    def backward(loss: Tensor) -> None:
        with torch.autocast("cpu", dtype) if inside else nullcontext():
            scaler.scale(loss).backward()

    got, plain = both(
        encoder,
        batches,
        objective,
        RAGGED,
        backward=backward,
        mode=lambda: torch.autocast("cpu", dtype),
    )

    def error(found: Mapping[str, Tensor]) -> float:
        difference = sum((found[n].double() / scale - v).square().sum() for n, v in truth.items())
        return float((difference / sum(v.square().sum() for v in truth.values())).sqrt())

    assert 1e-5 < error(plain) < 0.03
    assert error(got) < 1.5 * error(plain)


def test_autocast_is_in_force_in_both_passes(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    encoder = make_small()
    kinds: list[tuple[bool, torch.dtype]] = []
    first = next(module for module in encoder.modules() if isinstance(module, nn.Linear))
    first.register_forward_hook(
        lambda _m, _i, output: kinds.append((torch.is_grad_enabled(), output.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        vectors = cached_vectors(Encode(encoder), make_batch(4, 1), RAGGED)
        loss = Objective(0.05)(vectors["query"], vectors["passage"])
    loss.backward()
    assert set(kinds) == {(False, torch.bfloat16), (True, torch.bfloat16)}


def test_an_overflow_reaches_the_scaler(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    """It skips the step and halves its scale, as without the cache."""
    encoder = make_small()
    before = copy.deepcopy(encoder.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)

    def step(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    batch = [make_batch(4, 1)]
    mode = lambda: torch.autocast("cpu", torch.float16)  # noqa: E731
    both(encoder, batch, Objective(0.05), RAGGED, backward=step, mode=mode)
    assert scaler.get_scale() == 2.0**98
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_gradients_are_reduced_once_at_the_last_chunk(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    events: list[str] = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        events.append("quiet")
        yield
        events.append("end")

    encode = Encode(make_small())

    def watched(some: Mapping[str, Texts]) -> dict[str, Tensor]:
        if torch.is_grad_enabled():
            events.append("+".join(some))
        return encode(some)

    vectors = cached_vectors(watched, make_batch(5, 1), RAGGED, no_sync)
    assert events == []
    Objective()(vectors["query"], vectors["passage"]).backward()
    quiet = ["quiet", "query", "end", "quiet", "query", "end", "quiet", "passage", "end"]
    assert events == [*quiet, "query+passage"]


def test_texts_of_near_equal_length_share_a_chunk(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    """The longest first, and no chunk is padded beyond its own longest text."""
    encode = Encode(make_small())
    batch = make_batch(9, 2)
    cached_vectors(encode, batch, {"query": 4, "passage": 4})
    for role in ("query", "passage"):
        chunks = [texts[role]["attention_mask"] for texts in encode.first_pass() if role in texts]
        lengths = torch.cat([mask.sum(dim=1) for mask in chunks]).tolist()
        assert lengths == sorted(batch[role]["attention_mask"].sum(dim=1).tolist(), reverse=True)
        assert all(mask.shape[1] == mask.sum(dim=1).max() for mask in chunks)


def test_a_chunk_larger_than_the_batch_is_the_batch(
    make_small: Callable[..., Encoder], make_batch: Callable[..., Batch]
) -> None:
    encoder = make_small().double()
    encode = Encode(encoder)
    large = {"query": 50, "passage": 50}
    cached_vectors(encode, make_batch(3, 1), large)
    assert [list(texts) for texts in encode.first_pass()] == [["query", "passage"]]
    assert_equal(*both(encoder, [make_batch(3, 1)], Objective(0.05), large))


def test_a_chunk_size_below_one_is_refused(make_batch: Callable[..., Batch]) -> None:
    with pytest.raises(UsageError, match="chunk size of query is 0"):
        cached_vectors(lambda texts: {}, make_batch(3, 1), {"query": 0, "passage": 1})
