"""Encoding a token table: batches of near-equal lengths by token budget, vectors as a stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlflow_dr.background import ahead
from mlflow_dr.devices import CopyStream, begin_host_copy, is_onednn_faster, on_device
from mlflow_dr.encoder.graphs import BackboneGraphs
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.onednn import OneDnnLayers
from mlflow_dr.encoder.packed import can_pack, encode_packed
from mlflow_dr.encoder.varlen import PackedTexts, ends_of, has_varlen
from mlflow_dr.errors import CheckpointError, DeviceError, one_line
from mlflow_dr.stores.token_table import TokenTable

log = logging.getLogger(__name__)

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}
"""Of an encoder whose token vectors have `USUAL_WIDTH` dimensions, and of every reader."""
USUAL_WIDTH = 384
WIDTHS = {"cpu": (384, 1536), "cuda": (96, 4096)}
"""Between these, batches have fewer tokens the wider a backbone is."""
WIDEST_FOR_GRAPHS = 384
"""Dimensions of token vectors; wider backbones compute longer than Python launches."""
MOST_FILLED = 0.125
"""The share of a batch for a CUDA graph that may be texts which only fill it."""
MOST_DEVIATION = {
    torch.float64: 1e-6,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-3,
    torch.float16: 1e-4,
}
"""1 - cosine similarity of a vector computed with and without padding, by number format."""
_warnings: set[str] = set()
"""Those that were given, without their reasons."""


def tokens_per_batch(encoder: Encoder, device: torch.device) -> int:
    """How many tokens a batch should have.

    On a processor, what a layer computes fits its cache. On a GPU, narrow backbones have many
    tokens for each launch of a kernel, and wide ones do not fill the memory.
    """
    narrowest, widest = WIDTHS[device.type]
    width = min(max(encoder.width, narrowest), widest)
    return TOKENS_PER_BATCH[device.type] * USUAL_WIDTH // width


def plan_batches(
    lengths: np.ndarray, max_tokens: int, rows: np.ndarray | None = None
) -> list[np.ndarray]:
    """Rows in batches whose padded size stays within a token budget, the longest first.

    The longest first, so that a batch that does not fit into memory fails at once. A shard i of n
    is `batches[i::n]`: a batch has the same rows in every process, so its vectors have the same
    bits, and shards take the same time.

    Args:
        lengths: tokens of each row of a table, `(n_rows,) int64`.
        max_tokens: rows x longest row of a batch; a single row may exceed it.
        rows: which rows, `(n,) int64`; all when None.

    Returns:
        Row numbers of each batch, `(n_in_batch,) int64`; each row is in exactly one.
    """
    if rows is None:
        rows = np.arange(len(lengths))
    keys = -lengths[rows]
    if keys.min(initial=0) > np.iinfo(np.int16).min:
        keys = keys.astype(np.int16)  # has a faster sort
    order = rows[np.argsort(keys, kind="stable")]
    batches, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, max_tokens // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


@torch.inference_mode()
def encode_batches(
    encoder: Encoder, table: TokenTable, pad_id: int, batches: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Vectors of the rows of a table, batch by batch.

    Args:
        encoder: on its device and in its dtype.
        table: token ids.
        pad_id: the token id of padding.
        batches: rows of each batch, `(n_in_batch,) int64`.

    Yields:
        Row numbers `(n,) int64` and their vectors `(n, dim) float32` on the encoder's device.

    NaN is let through: `check_finite` is for the caller, who may gather batches first.
    """
    encode = _BatchEncoder(encoder, table, pad_id)
    if encoder.device.type == "cuda":
        prepared = ahead(encode.prepare, batches)
    else:
        prepared = ((rows, partial(encode.prepare, rows)) for rows in batches)
    for rows, batch in prepared:
        yield rows, encode(rows, batch)


def encode_to_host(
    encoder: Encoder, table: TokenTable, pad_id: int, batches: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """As `encode_batches`, with vectors on the host.

    A GPU computes the next batch while the vectors of one are used.
    """
    before: tuple[np.ndarray, Callable[[], Tensor]] | None = None
    for rows, vectors in encode_batches(encoder, table, pad_id, batches):
        if vectors.device.type == "cpu":
            yield rows, vectors
            continue
        now = rows, begin_host_copy(vectors)
        if before is not None:
            yield before[0], before[1]()
        before = now
    if before is not None:
        yield before[0], before[1]()


class _Batch(NamedTuple):
    """A batch whose tokens are on their way to the device.

    Attributes:
        ids: token ids of all texts, end to end, `(n_tokens,) int64`.
        lengths: tokens of each text, `(n_texts,) int64`.
        fillers: tokens of each text after those, which only fills the batch.
        copied: the token ids and the ends of texts on the device.
    """

    ids: np.ndarray
    lengths: np.ndarray
    fillers: Sequence[int]
    copied: Callable[[], list[Tensor]]

    def texts(self, *, with_fillers: bool) -> tuple[Tensor, PackedTexts]:
        """Token ids on the device, and which of them are of which text."""
        ids, ends = self.copied()
        lengths = [*self.lengths.tolist(), *(self.fillers if with_fillers else ())]
        n_tokens = sum(lengths)
        texts = PackedTexts(ends[: len(lengths) + 1], n_tokens, max(lengths), lengths)
        return ids[:n_tokens], texts


class _BatchEncoder:
    """Encodes batches in the fastest way that the first batch shows to give the same vectors."""

    def __init__(self, encoder: Encoder, table: TokenTable, pad_id: int) -> None:
        self._encoder, self._table, self._pad_id = encoder, table, pad_id
        self._device = encoder.device
        self._kind = type(encoder.backbone).__name__
        self._copies = CopyStream(self._device)
        self._layers: OneDnnLayers | None = None
        self._graphs: BackboneGraphs | None = None
        self._is_packed: bool | None = None
        self._n_tokens = 0  # up to which batches are filled
        is_small = encoder.width <= WIDEST_FOR_GRAPHS
        if is_small and has_varlen(self._device, self._dtype) and can_pack(encoder):
            self._n_tokens = tokens_per_batch(encoder, self._device)
        self._parts = 1  # in which a batch is encoded

    def prepare(self, rows: np.ndarray) -> _Batch:
        """Read the tokens of these rows, and begin to copy them to the device.

        A thread may call this for later batches.
        """
        return self._begun(*self._table.packed(rows), self._n_tokens)

    def __call__(self, rows: np.ndarray, batch: Callable[[], _Batch]) -> Tensor:
        """The vectors of the texts in these rows, `(n, dim) float32`.

        Raises:
            DeviceError: the device has too little memory for a single text.
        """
        while True:
            parts = np.array_split(rows, min(self._parts, len(rows)))
            try:
                if len(parts) == 1:
                    return self._vectors(batch())
                return torch.cat([self._vectors(self.prepare(part)) for part in parts])
            except torch.OutOfMemoryError as error:
                if len(parts) == len(rows):
                    longest = int(self._table.lengths[rows].max())
                    raise DeviceError(
                        f"{self._device} has too little memory for a text of {longest} "
                        "tokens; use another device, a smaller passage length or --dtype bf16"
                    ) from error
            self._parts *= 2
            self._n_tokens, self._graphs = 0, None
            log.warning(
                "%s is out of memory: batches are encoded in %d parts",
                *(self._device, self._parts),
            )

    def _begun(self, ids: np.ndarray, lengths: np.ndarray, n_tokens: int = 0) -> _Batch:
        """Texts end to end, filled up to so many tokens if they are nearly as many."""
        fillers: list[int] = []
        missing = n_tokens - len(ids)
        if 0 < missing <= n_tokens * MOST_FILLED:
            length = max(1, int(lengths[-1]))
            count, rest = divmod(missing, length)
            fillers = [length] * count + [rest] * (rest > 0)
            ids = np.pad(ids, (0, missing), constant_values=ids[0])  # padding may have zeros
        copied = self._copies.copy(ids, ends_of([*lengths.tolist(), *fillers]))
        return _Batch(ids, lengths, fillers, copied)

    def _vectors(self, batch: _Batch) -> Tensor:
        if self._is_packed is None:
            self._is_packed = self._choose_way(batch.ids, batch.lengths)
            if not self._is_packed:
                self._n_tokens = 0
            elif self._n_tokens:
                self._graphs = BackboneGraphs(self._device, partial(_warn_of_graphs, self._kind))
        return self._packed(batch) if self._is_packed else self._padded(batch)

    def _choose_way(self, ids: np.ndarray, lengths: np.ndarray) -> bool:
        """Encode a text of a batch and the beginning of another, each alone, and in faster ways.

        The fastest way that gives the same vectors is kept: packed or not, by oneDNN or not.
        Returns whether texts are packed.
        """
        is_onednn = is_onednn_faster(self._device) and not self._encoder.is_static
        is_packable = can_pack(self._encoder)
        self._layers = None
        if not is_onednn and not is_packable:
            return False
        end = lengths.sum()
        first, last = ids[: lengths[0]], ids[end - lengths[-1] : end]
        texts = first, last[: 1 + len(last) // 4]
        alone = [self._padded(self._begun(text, np.array([len(text)]))) for text in texts]
        expected = torch.cat(alone)
        if not bool(expected.isfinite().all()):  # broken weights prove nothing
            return False
        sample = self._begun(np.concatenate(texts), np.array([len(text) for text in texts]))
        onednn = (
            [OneDnnLayers(self._encoder.backbone, TOKENS_PER_BATCH["cpu"])] if is_onednn else []
        )
        ways = [
            (layers, is_packed)
            for is_packed in ([True, False] if is_packable else [False])
            for layers in (*onednn, None)
        ]
        failed: list[str] = []
        for self._layers, is_packed in ways:
            is_plain = self._layers is None and not is_packed
            encode = self._packed if is_packed else self._padded
            reason = "" if is_plain else self._difference(partial(encode, sample), expected)
            if not reason:
                break
            failed.append(reason)
        if is_onednn and self._layers is None:
            _warn(f"{self._kind} is encoded without oneDNN, which is slower ({failed[-1]})")
        if is_packable and not is_packed:
            _warn(f"{self._kind} is encoded with padding, which is slower ({failed[len(onednn)]})")
        return is_packed

    def _difference(self, encode: Callable[[], Tensor], expected: Tensor) -> str:
        """What is wrong with a way to encode; nothing if the vectors are as expected."""
        try:
            found = encode()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a backbone's own code refuses in its own way
            return one_line(error)
        likeness = functional.cosine_similarity(found, expected)
        is_same = bool((likeness > 1 - MOST_DEVIATION[self._dtype]).all())
        return "" if is_same else f"vectors differ, cosine similarity {likeness.min():.3g}"

    def _packed(self, batch: _Batch) -> Tensor:
        ids, texts = batch.texts(with_fillers=True)
        graphs = self._graphs if texts.n_tokens == self._n_tokens else None
        with self._used_layers():
            return encode_packed(self._encoder, ids, texts, graphs)[: len(batch.lengths)]

    def _padded(self, batch: _Batch) -> Tensor:
        ids, texts = batch.texts(with_fillers=False)
        padded, is_token = texts.side_by_side(ids)
        padded = padded.where(is_token, self._pad_id)
        with self._used_layers():
            vectors: Tensor = self._encoder(padded, is_token.long())
        return vectors

    @property
    def _dtype(self) -> torch.dtype:
        return next(self._encoder.parameters()).dtype

    def _used_layers(self) -> AbstractContextManager[None]:
        return nullcontext() if self._layers is None else self._layers.used()


def _warn(message: str) -> None:
    """Give a warning once, whatever the reason behind it is."""
    if message.partition(" (")[0] not in _warnings:
        _warnings.add(message.partition(" (")[0])
        log.warning(message)


def _warn_of_graphs(kind: str, reason: str) -> None:
    _warn(f"{kind} is encoded without CUDA graphs, which may be slower ({reason})")


def encode_all(encoder: Encoder, table: TokenTable, pad_id: int, what: str = "text") -> Tensor:
    """Vectors of every row in row order, `(n_rows, dim) float32` on the encoder's device."""
    vectors = torch.empty(len(table), encoder.dimension, device=encoder.device)
    batches = plan_batches(table.lengths, tokens_per_batch(encoder, encoder.device))
    for rows, batch in encode_batches(encoder, table, pad_id, batches):
        vectors[on_device(rows, vectors.device)] = batch
    check_finite(vectors, what)
    return vectors


def check_finite(vectors: Tensor, what: str) -> None:
    """Refuse vectors with NaN or infinity.

    Raises:
        CheckpointError: with how many of them there are.
    """
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        broken = int((~finite).sum())
        raise CheckpointError(
            f"the encoder gives NaN or infinity for {broken} of {len(vectors)} {what} vectors; "
            "the weights are broken or overflow in this dtype (try --dtype fp32)"
        )
