"""Encodes a corpus, or the queries of a split, into files of vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import torch

from mlflow_dr.cache import unchanged_cache
from mlflow_dr.collection.catalogue import check_split, open_collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.collection.text_files import read_text_files
from mlflow_dr.devices import dtype_name
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer, append_eos
from mlflow_dr.engines.engine import Engine
from mlflow_dr.engines.opening import open_engine
from mlflow_dr.errors import UnavailableError, UsageError
from mlflow_dr.files import usable_cores
from mlflow_dr.progress import progress_bar
from mlflow_dr.retrieval.encode import encode_to_host, plan_batches, tokens_per_batch
from mlflow_dr.retrieval.vector_manifest import (
    VectorManifest,
    damage,
    missing_shards,
    read_manifests,
)
from mlflow_dr.retrieval.vector_writer import write_shard
from mlflow_dr.stores.token_table import TokenTable, token_table
from mlflow_dr.tracking.encoders import checkpoint_and_run, open_encoder
from mlflow_dr.vectors.config import EncodeConfig, parse_shards

HALF = "fp16"
SHARDS_OF_SEVERAL = 64
"""Into how many shards several devices encode, however many they are."""


@dataclass(frozen=True)
class WriteShard:
    """Encodes a shard and writes its files; see `Work`. They are written where the worker is.

    Attributes:
        output: the folder.
        manifest: of each shard, but for its number.
        numbers: the first row of a shard -> its number.
        ids: of all texts.
        pad_id: the token id of padding.
        replace: whether vectors of another encoder, corpus or format are replaced.
        quiet: no progress bar.
    """

    output: Path
    manifest: VectorManifest
    numbers: Mapping[int, int]
    ids: pa.ChunkedArray
    pad_id: int
    replace: bool
    quiet: bool

    def __call__(
        self, encoder: Encoder, table: TokenTable, batches: Iterable[np.ndarray]
    ) -> VectorManifest:
        """The manifest of the shard."""
        shard = list(batches)
        number = self.numbers[int(shard[0][0])]
        of_kind = encoder if self.manifest.kind == "passages" else encoder.query_encoder
        return write_shard(
            self.output,
            msgspec.structs.replace(self.manifest, shard=number),
            shard,
            self.ids,
            lambda left: encode_to_host(of_kind, table, self.pad_id, left),
            replace=self.replace,
            quiet=self.quiet,
        )


@unchanged_cache()
def encode(config: EncodeConfig) -> list[VectorManifest]:
    """Encode a corpus, or the queries of a split, into files; all shards or one of them.

    Args:
        config: the encoder, the collection and the folder.

    Returns:
        The manifests of the shards.

    Raises:
        UsageError: an unknown dataset, split, device or encoder, or a folder with other vectors.
        DataError: the collection's files are damaged, or ids do not fit the format.
        CheckpointError: the encoder's files are damaged, or it gives NaN.
        UnavailableError: there is no Ray cluster, or its nodes do not share the folder.
    """
    name, is_query, tokenise = _source(config)
    with closing(open_engine(config.engine, config.device)) as engine:
        is_half = dtype_name(config.dtype) == HALF
        dtype = "fp32" if is_half and engine.device.type == "cpu" else config.dtype
        dtype = engine.resolve_dtype(dtype)
        encoder = open_encoder(
            config.encoder,
            config.tracking_uri,
            trust_remote_code=config.trust_remote_code,
            **config.encoder_changes,
        )
        if config.append_eos_token:
            for part in encoder.distinct_encoders:
                append_eos(part.tokenizer)
        texts = tokenise(encoder)
        numbers, shards = parse_shards(config.shard or _all_shards(engine))
        manifest = VectorManifest(
            kind="queries" if is_query else "passages",
            dataset=name,
            split=config.split,
            texts=len(texts.table),
            texts_digest=texts.digest,
            encoder=config.encoder,
            encoder_digest=encoder_digest(encoder),
            settings=asdict(texts.encoder.settings),
            dimension=encoder.dimension,
            similarity="cosine" if texts.encoder.settings.normalize else "dot",
            dtype=dtype,
            vector_dtype="fp16" if is_half else "fp32",
            file_format=config.file_format,
            tokens_per_batch=config.tokens_per_batch
            or tokens_per_batch(texts.encoder, engine.device),
            shard=numbers[0],
            shards=shards,
        )
        finished = _write_shards(config, engine, encoder, texts, manifest, numbers)
    if config.log:
        _log(config, finished)
    return finished


def _all_shards(engine: Engine) -> str:
    return f"all/{SHARDS_OF_SEVERAL if engine.n_shards > 1 else 1}"


def _write_shards(
    config: EncodeConfig,
    engine: Engine,
    encoder: Encoder,
    texts: Texts,
    manifest: VectorManifest,
    numbers: Sequence[int],
) -> list[VectorManifest]:
    """Let an engine write shards; their manifests by number."""
    output, lengths = config.folder, texts.table.lengths
    batches = plan_batches(lengths, manifest.tokens_per_batch)
    of_shard = {number: batches[number :: manifest.shards] for number in numbers}
    # an engine has no use for a shard without texts
    finished = [
        write_shard(
            output,
            msgspec.structs.replace(manifest, shard=number),
            [],
            texts.ids,
            lambda _: iter(()),
            replace=config.force,
        )
        for number, shard in of_shard.items()
        if not shard
    ]
    full = {number: shard for number, shard in of_shard.items() if shard}
    work = WriteShard(
        output,
        manifest,
        {int(shard[0][0]): number for number, shard in full.items()},
        texts.ids,
        texts.pad_id,
        config.force,
        quiet=engine.n_shards > 1,
    )
    total = sum(len(batch) for shard in full.values() for batch in shard)
    engine.load(encoder, manifest.dtype)
    kind = manifest.kind
    with progress_bar(total, f"encoding the {kind}", kind, quiet=not work.quiet) as bar:
        finished += engine.map(work, texts.table, list(full.values()), bar.update)
    here = {found.name for found in read_manifests(output)}
    if elsewhere := [each.name for each in finished if each.name not in here]:
        raise UnavailableError(
            f"{output}: {elsewhere[0]} was written on another machine; choose a folder that all "
            "nodes of the cluster share",
            lasting=True,
        )
    return sorted(finished, key=lambda each: each.shard)


def missing_vectors(path: Path) -> list[str]:
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


def _source(config: EncodeConfig) -> tuple[str, bool, Callable[[Encoder], Texts]]:
    """The name of the collection, whether queries are encoded, and what makes tokens of texts."""
    if config.texts:
        corpus = read_text_files(config.texts)
        if not config.texts_are_queries:
            return "", False, lambda encoder: _passages(encoder, corpus)
        passages = (passage for batch in corpus.batches() for passage in batch)
        queries = [Query(each.id, each.text, (), each.tokens) for each in passages]
        return "", True, lambda encoder: _query_tokens(encoder, queries, corpus.digest)
    name, _ = config.required_dataset()
    collection = open_collection(name)
    name = collection.name  # a path is absolute in it, so the vectors can be moved
    if config.split is None:
        return name, False, lambda encoder: _passages(encoder, collection.corpus())
    check_split(collection, config.split)
    topics = collection.topics(config.split)
    return name, True, lambda encoder: query_texts(encoder, topics)


def _passages(encoder: Encoder, corpus: Corpus) -> Texts:
    tokenizer = TextTokenizer.of(encoder)
    table = corpus_tokens(corpus, tokenizer, usable_cores())
    return Texts(table, corpus.ids, corpus.digest, encoder, tokenizer.pad_id)


def query_texts(encoder: Encoder, topics: Topics) -> Texts:
    """The queries of a split as tokens."""
    return _query_tokens(encoder, topics.queries, topics.digest)


def _query_tokens(encoder: Encoder, queries: Sequence[Query], digest: str) -> Texts:
    query_encoder = encoder.query_encoder
    tokenizer = TextTokenizer.of(query_encoder)
    table = token_table(tokenizer.query_ids(queries))
    ids = pa.chunked_array([pa.array([query.id for query in queries], pa.string())])
    return Texts(table, ids, digest, query_encoder, tokenizer.pad_id)


def _log(config: EncodeConfig, manifests: Sequence[VectorManifest]) -> None:
    """Store manifests with the run of the encoder's checkpoint."""
    checkpoint, run = checkpoint_and_run(config.encoder, config.tracking_uri)
    folder = f"vectors/step-{checkpoint.step:08}-{checkpoint.model_id}"
    files = {
        f"{folder}/{each.kind}-{each.texts_digest[:12]}-{each.name}": msgspec.json.format(
            msgspec.json.encode(each)
        ).decode()
        + "\n"
        for each in manifests
    }
    run.log_report({}, files)
