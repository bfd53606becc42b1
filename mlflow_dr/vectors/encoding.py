"""Encodes a corpus, or the queries of a split, into files of vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import torch

from mlflow_dr.cache import unchanged_cache
from mlflow_dr.collection.catalogue import Collection, check_split, open_collection
from mlflow_dr.collection.records import Topics
from mlflow_dr.devices import dtype_name, resolve_device, resolve_dtype, torch_dtype
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import TokenTable, corpus_tokens, token_table
from mlflow_dr.encoder.tokenize import TextTokenizer, append_eos
from mlflow_dr.errors import UsageError
from mlflow_dr.files import usable_cores
from mlflow_dr.retrieval.encode import TOKENS_PER_BATCH, encode_batches, plan_batches
from mlflow_dr.retrieval.vector_writer import write_shard
from mlflow_dr.retrieval.vectors import VectorManifest, damage, missing_shards, read_manifests
from mlflow_dr.tracking.encoders import encoder_errors, local_encoder, resolve_encoder
from mlflow_dr.vectors.config import EncodeConfig, parse_shard

HALF = "fp16"


@unchanged_cache()
def encode(config: EncodeConfig) -> VectorManifest:
    """Encode a shard of a corpus, or of the queries of a split, into files.

    Args:
        config: the encoder, the collection and the folder.

    Returns:
        The manifest of the shard.

    Raises:
        UsageError: an unknown dataset, split, device or encoder, or a folder with other vectors.
        DataError: the collection's files are damaged, or ids do not fit the format.
        CheckpointError: the encoder's files are damaged, or it gives NaN.
    """
    assert config.output is not None
    device = resolve_device(config.device)
    dtype = dtype_name(config.dtype)
    computed = "fp32" if dtype == HALF and device.type == "cpu" else resolve_dtype(dtype, device)
    name, _ = config.named_dataset()
    if name is None:
        raise UsageError("give --dataset, or --candidate-dir, --query-files and --qrel-files")
    collection = open_collection(name)
    if config.split is not None:
        check_split(collection, config.split)
    encoder = named_encoder(config, config.encoder)
    if config.append_eos_token:
        for part in encoder.distinct_encoders:
            append_eos(part.tokenizer)
    texts = _passages(encoder, collection)
    if config.split is not None:
        texts = query_texts(encoder, collection.topics(config.split))
    budget = config.tokens_per_batch or TOKENS_PER_BATCH[device.type]
    shard, shards = parse_shard(config.shard)
    batches = plan_batches(texts.table.lengths, budget)[shard::shards]
    manifest = VectorManifest(
        kind="passages" if config.split is None else "queries",
        dataset=name,
        split=config.split,
        texts=len(texts.table),
        texts_digest=texts.digest,
        encoder=config.encoder,
        encoder_digest=encoder_digest(encoder),
        settings=asdict(texts.encoder.settings),
        dimension=encoder.dimension,
        similarity="cosine" if texts.encoder.settings.normalize else "dot",
        dtype=computed,
        vector_dtype="fp16" if dtype == HALF else "fp32",
        file_format=config.file_format,
        tokens_per_batch=budget,
        shard=shard,
        shards=shards,
    )

    def encoded(batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        target = texts.encoder.eval().to(device, torch_dtype(computed))
        return encode_batches(target, texts.table, texts.pad_id, batches)

    finished = write_shard(
        config.output, manifest, batches, texts.ids, encoded, replace=config.force
    )
    if config.log:
        _log(config, finished)
    return finished


def check_vectors(path: Path) -> list[str]:
    """What is missing or damaged in a folder of vectors; nothing if it is complete.

    Raises:
        UsageError: the folder has no vectors, or does not exist.
        DataError: a manifest is malformed.
    """
    manifests = read_manifests(path)
    unfinished = sorted(folder.name for folder in path.glob(".encode*") if folder.is_dir())
    if not manifests and not unfinished:
        raise UsageError(f"{path}: no manifest of vectors")
    faults = [f"{name[1:]} is not finished; run the same command again" for name in unfinished]
    if manifests:
        first = manifests[0]
        for manifest in manifests:
            if difference := first.difference(manifest):
                faults.append(f"{manifest.name} is of {difference} (as {first.name})")
            elif problem := damage(path, manifest, with_bytes=True):
                faults.append(f"{problem}; encode with --shard {manifest.shard}/{manifest.shards}")
        faults += [f"--shard {n}/{first.shards} is missing" for n in missing_shards(manifests)]
        rows = sum(manifest.rows for manifest in manifests)
        if not faults and rows != first.texts:
            faults.append(f"the shards have {rows:,} vectors of {first.texts:,} texts")
    return faults


def named_encoder(config: Any, name: str) -> Encoder:
    """The encoder of a name, on the processor in fp32.

    Args:
        config: with `tracking_uri`, `trust_remote_code` and, of `EncoderOverrides`, what replaces
            the encoder's settings.
        name: a directory, a hub name or `models:/...`.

    Raises:
        UsageError: no encoder has this name.
        CheckpointError: the encoder's files are damaged.
    """
    changes = getattr(config, "encoder_changes", {})
    with local_encoder(name, config.tracking_uri) as directory, encoder_errors(name):
        return load_encoder(directory, trust_remote_code=config.trust_remote_code, **changes)


def encoder_digest(encoder: Encoder) -> str:
    """Of the weights, poolings and tokenizers of an encoder, 64 hexadecimal characters.

    Prompts and lengths are not part of it: queries and passages may be encoded with different ones.
    """
    digest = hashlib.sha256()
    for part in encoder.distinct_encoders:
        tokenizer = TextTokenizer(part.tokenizer, EncoderConfig()).passage_digest()
        settings = part.settings
        described = (settings.pooling, settings.normalize, settings.lowercase, tokenizer)
        digest.update(repr(described).encode())
    for name, weights in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(weights.shape)} {weights.dtype}".encode())
        digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Texts(NamedTuple):
    """Passages or queries to encode, as tokens.

    Attributes:
        table: token ids.
        ids: names of the texts.
        digest: of ids and texts.
        encoder: of this kind of text.
        pad_id: the token id of padding.
    """

    table: TokenTable
    ids: pa.ChunkedArray
    digest: str
    encoder: Encoder
    pad_id: int


def _passages(encoder: Encoder, collection: Collection) -> Texts:
    corpus, tokenizer = collection.corpus(), TextTokenizer(encoder.tokenizer, encoder.settings)
    table = corpus_tokens(corpus, tokenizer, usable_cores())
    return Texts(table, corpus.ids, corpus.digest, encoder, tokenizer.pad_id)


def query_texts(encoder: Encoder, topics: Topics) -> Texts:
    """The queries of a split as tokens."""
    query_encoder = encoder.query_encoder
    tokenizer = TextTokenizer(query_encoder.tokenizer, query_encoder.settings)
    table = token_table(tokenizer.query_ids(topics.queries))
    ids = pa.chunked_array([pa.array([query.id for query in topics.queries], pa.string())])
    return Texts(table, ids, topics.digest, query_encoder, tokenizer.pad_id)


def _log(config: EncodeConfig, manifest: VectorManifest) -> None:
    """Store a manifest with the run of the encoder's checkpoint."""
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import find_run

    client = connect(config.tracking_uri, may_create=False)
    checkpoint = resolve_encoder(config.encoder, config.tracking_uri)
    assert not isinstance(checkpoint, str)
    folder = f"vectors/step-{checkpoint.step:08}-{checkpoint.model_id}"
    text = msgspec.json.format(msgspec.json.encode(manifest)).decode() + "\n"
    file = f"{folder}/{manifest.kind}-{manifest.texts_digest[:12]}-{manifest.name}"
    find_run(client, checkpoint.run_id).log_report({}, {file: text})
