"""CUDA graphs of a backbone: all kernels of a batch are launched at once.

A small model computes a batch in about the time that Python takes to launch its kernels one by one,
or less where training keeps the processor busy. A graph has fixed shapes, so batches have the same
number of tokens, the number of texts is rounded up, and so is the length of the longest one.
https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from mlflow_dr import compat
from mlflow_dr.encoder.varlen import PackedTexts
from mlflow_dr.errors import one_line

BATCHES_BEFORE_RECORDING = 8
"""Batches of a shape that are computed first; recording takes as long as a few of them."""
LENGTHS_APART = 64
MOST_TEXTS = 65_535  # that CUDA's kernel takes

Compute = Callable[[Tensor, PackedTexts], Tensor]
"""Token ids and the texts they belong to -> vectors `(n, width)`."""
_Shape = tuple[int, int, int]
"""Tokens, ends of texts and the length of the longest one."""


class BackboneGraphs:
    """Records what a backbone computes, and replays it for later batches of the same shape.

    A batch of a shape is computed in the same way with and without a graph, so it has the same
    bits. Where recording fails, or gives other vectors, nothing is recorded any more.

    Args:
        device: where the backbone is.
        warn: is called with the reason if recording has failed.
    """

    def __init__(self, device: torch.device, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._recorder = Recorder(device)
        self._graphs: dict[_Shape, _Graph] = {}
        self._seen: Counter[_Shape] = Counter()
        self._has_failed = False

    def states(self, compute: Compute, ids: Tensor, texts: PackedTexts) -> Tensor:
        """What `compute` gives; it is valid until the next call.

        Args:
            compute: the same function in each call.
            ids: token ids, `(n_tokens,) int64`.
            texts: which tokens are of which text.

        Returns:
            Vectors of tokens; if they are of texts, there may be some more at the end.
        """
        texts = _in_few_shapes(texts)
        shape = texts.n_tokens, len(texts.ends), texts.longest
        if shape in self._graphs:
            return self._graphs[shape](ids, texts)
        states = compute(ids, texts)
        self._seen[shape] += 1
        if self._seen[shape] == BATCHES_BEFORE_RECORDING and not self._has_failed:
            graph = self._recorded(compute, ids, texts, states)
            if graph is not None:
                self._graphs[shape] = graph
        return states

    def _recorded(
        self, compute: Compute, ids: Tensor, texts: PackedTexts, expected: Tensor
    ) -> _Graph | None:
        """A graph of a computation, or None if it does not give what is expected."""
        try:
            graph = _Graph(self._recorder, compute, ids, texts)
            found = graph(ids, texts)
        except Exception as error:  # noqa: BLE001 - what cannot be recorded is refused in many ways
            reason = one_line(error)
        else:
            if torch.equal(found.nan_to_num(), expected.nan_to_num()):
                return graph
            reason = "token vectors differ"
        self._has_failed = True
        self._warn(reason)
        return None


class _Graph:
    """A recorded computation, and the memory that it reads and writes."""

    def __init__(
        self, recorder: Recorder, compute: Compute, ids: Tensor, texts: PackedTexts
    ) -> None:
        self._ids, self._ends = ids.clone(), texts.ends.clone()
        # without lengths: those of this batch are of no other
        in_place = replace(texts, ends=self._ends, lengths=())
        self._replay, self._states = recorder.record(partial(compute, self._ids, in_place))

    def __call__(self, ids: Tensor, texts: PackedTexts) -> Tensor:
        self._ids.copy_(ids)
        self._ends.copy_(texts.ends)
        self._replay()
        return self._states


class Recorder:
    """Records graphs of a device, in a memory that they share: one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _side_stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a computation; returns what replays it, and its result, which then changes.

        Raises:
            RuntimeError: it cannot be recorded, for example because it waits for the device.
        """
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                self._try(compute)
                return self._capture(compute)
        finally:
            outside.wait_stream(self._stream)

    def _try(self, compute: Callable[[], Tensor]) -> None:
        """Load kernels and the like, which cannot be recorded; refuse to wait for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch calls this mode a prototype
            try:
                torch.cuda.set_sync_debug_mode("error")
                compute()
            finally:
                torch.cuda.set_sync_debug_mode(before)

    def _capture(self, compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # none is freed during a capture
        # other threads may allocate memory meanwhile
        graph.capture_begin(self._memory, capture_error_mode="thread_local")
        try:
            result = compute()
            graph.capture_end()
        except BaseException:
            compat.abandon_capture(graph, self._device, self._memory)
            raise
        return graph.replay, result


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to record in; memory that one stream has used is not for another one."""
    return torch.cuda.Stream(device)


def _in_few_shapes(texts: PackedTexts) -> PackedTexts:
    """The same texts and empty ones after them, a power of two in all; their length rounded up."""
    n_texts = len(texts.ends) - 1
    added = max(0, min(1 << (n_texts - 1).bit_length(), MOST_TEXTS) - n_texts)
    longest = -(-texts.longest // LENGTHS_APART) * LENGTHS_APART
    ends = functional.pad(texts.ends, (0, added), value=texts.n_tokens)
    return replace(texts, ends=ends, longest=longest)
