"""Gradient caching: the gradient of a large batch in the memory of a small one.

Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021.

The batch is encoded in chunks without a graph. The loss over all vectors gives the gradient at each
vector; then each chunk is encoded again, with a graph and the same dropout, and the product of its
vectors with their gradient is propagated back. The second part runs inside the backward pass of the
loss, so loss, scaling and accumulation work as without the cache. Only memory and time change.
Texts of near-equal length share a chunk, so that little is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlflow_dr.errors import UsageError
from mlflow_dr.training.batches import LENGTHS, Texts, cut, inverse, with_lengths

Encode = Callable[[Mapping[str, Texts]], Mapping[str, Tensor]]
"""Some roles' texts -> vectors of each, `(n_texts, dim)`; called once for each chunk."""


class _Chunk(NamedTuple):
    """Texts that are encoded together, by role, and the random state before that."""

    texts: dict[str, Texts]
    rows: dict[str, Tensor]
    state: _RandomState


class _RandomState(NamedTuple):
    """Random state of the processor and of the devices in use, for dropout to be replayed."""

    cpu: Tensor
    devices: Sequence[tuple[torch.device, Tensor]]


def cached_vectors(
    encode: Encode,
    texts: Mapping[str, Texts],
    chunk_sizes: Mapping[str, int],
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """Vectors of a batch that need the memory of one chunk to compute their gradient.

    The last chunk of every role is encoded in one call, which alone is outside `no_sync`, so that
    distributed training reduces each gradient once a step.

    Args:
        encode: the encoder, called with the autocast mode of this call in both passes.
        texts: role -> texts of the batch.
        chunk_sizes: role -> texts at most in one chunk.
        no_sync: keeps gradients from being reduced; DDP's, for example.

    Returns:
        role -> vectors `(n_texts, dim)`; call backward once on a loss made of them.

    Raises:
        UsageError: a chunk size below 1.
    """
    for role, size in chunk_sizes.items():
        if size < 1:
            raise UsageError(f"chunk size of {role} is {size}; it must be at least 1")
    mode = _autocast_mode(texts)
    chunks: list[_Chunk] = []
    parts: dict[str, list[Tensor]] = {role: [] for role in texts}
    with torch.no_grad():
        for chunk_texts, rows in _chunked(texts, chunk_sizes):
            chunks.append(_Chunk(chunk_texts, rows, _random_state(texts)))
            for role, vectors in encode(chunk_texts).items():
                parts[role].append(vectors)
    # autocast keeps weights that it has cast; in some releases of torch also those cast without a
    # graph, which would cut it later
    torch.clear_autocast_cache()

    roles = list(texts)

    def replay(gradients: Sequence[Tensor]) -> None:
        by_role = dict(zip(roles, gradients, strict=True))
        for number, chunk in enumerate(chunks, start=1):
            last = number == len(chunks)
            # a backward pass has gradients off
            with nullcontext() if last else no_sync(), torch.enable_grad():
                with _replayed(chunk.state), mode():
                    vectors = encode(chunk.texts)
                torch.clear_autocast_cache()
                surrogate = _surrogate(vectors, chunk.rows, by_role)
                if surrogate.requires_grad:  # false if the role's weights are frozen
                    surrogate.backward()

    joined = [
        torch.cat(parts[role])[
            inverse([chunk.rows[role] for chunk in chunks if role in chunk.rows])
        ]
        for role in roles
    ]
    root = torch.zeros((), requires_grad=True)  # something that makes the result need a gradient
    return dict(zip(roles, _Replay.apply(replay, root, *joined), strict=True))


class _Replay(torch.autograd.Function):
    """Passes vectors on; its backward pass runs the second part with the gradient at them."""

    @staticmethod
    def forward(ctx: Any, replay: Any, root: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        ctx.replay = replay
        return tuple(vector.view_as(vector) for vector in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.replay(gradients)
        return (None,) * (2 + len(gradients))


def _surrogate(
    vectors: Mapping[str, Tensor], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> Tensor:
    """A number whose gradient at the weights is that of the loss; at least in fp32."""
    total = torch.zeros(())
    for role, values in vectors.items():
        gradient = gradients[role][rows[role]]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = total.to(values.device) + (values.to(wide) * gradient.to(wide)).sum()
    return total


def _chunked(
    texts: Mapping[str, Texts], sizes: Mapping[str, int]
) -> Iterator[tuple[dict[str, Texts], dict[str, Tensor]]]:
    """Chunks of each role in turn, and the last chunks of all roles together at the end."""
    last: dict[str, tuple[Texts, Tensor]] = {}
    for role, role_texts in texts.items():
        role_texts = with_lengths(role_texts)
        # the longest first, so that a chunk that does not fit into memory fails at once
        order = np.argsort(-role_texts[LENGTHS], kind="stable")
        for start in range(0, len(order), sizes[role]):
            if role in last:
                chunk_texts, rows = last[role]
                yield {role: chunk_texts}, {role: rows}
            chunk = order[start : start + sizes[role]]
            last[role] = cut(role_texts, chunk)
    yield (
        {role: chunk_texts for role, (chunk_texts, _) in last.items()},
        {role: rows for role, (_, rows) in last.items()},
    )


def _devices(texts: Mapping[str, Texts]) -> set[torch.device]:
    return {role_texts["input_ids"].device for role_texts in texts.values()}


def _random_state(texts: Mapping[str, Texts]) -> _RandomState:
    devices = [device for device in _devices(texts) if device.type == "cuda"]
    return _RandomState(
        torch.get_rng_state(), [(device, torch.cuda.get_rng_state(device)) for device in devices]
    )


@contextmanager
def _replayed(state: _RandomState) -> Iterator[None]:
    """Use the random state `state` in the block, and restore the current one afterwards."""
    with torch.random.fork_rng(devices=[device for device, _ in state.devices]):
        torch.set_rng_state(state.cpu)
        for device, value in state.devices:
            torch.cuda.set_rng_state(value, device)
        yield


def _autocast_mode(texts: Mapping[str, Texts]) -> Callable[[], torch.autocast]:
    """Makes the autocast context that is in force now, for use in the backward pass."""
    kind = next(iter(_devices(texts))).type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, enabled=enabled)
