"""The manifest of a shard of vectors: what the vectors are, and in which files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from mlflow_dr.errors import DataError, UsageError, one_line
from mlflow_dr.files import file_sha256

LAYOUT = 1
"""To be increased when batches are planned in another way, so that shards do not fit together."""
PARQUET, NPY, TEVATRON = "parquet", "npy", "tevatron"
MANIFEST = re.compile(r"manifest(-[0-9]+-of-[0-9]+)?\.json")


class VectorFile(msgspec.Struct, frozen=True):
    """What a manifest says of a file."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,200}\.[a-z]{1,10}$")]
    rows: Annotated[int, msgspec.Meta(ge=0)]
    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str


class VectorManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the vectors of a shard are, and where.

    Attributes:
        kind: `passages` or `queries`.
        dataset: the name of the collection.
        split: whose queries they are.
        texts: passages of the corpus, or queries of the split, in all shards together.
        texts_digest: of their ids and texts.
        encoder: its name.
        encoder_digest: of its weights, pooling and tokenizer, on which it depends whether vectors
            of queries and passages can be compared.
        settings: prompts, lengths, pooling and so on.
        dimension: of a vector.
        similarity: `cosine` if vectors have length 1, else `dot`.
        dtype: the number format in which the encoder computes.
        vector_dtype: the number format in which vectors are stored.
        file_format: `parquet`, `npy` or `tevatron`.
        tokens_per_batch: the token budget by which batches are planned.
        shard: the number of this shard, from 0.
        shards: how many there are.
        rows: vectors of this shard.
        files: in the order of their rows.
        layout: see `LAYOUT`.
    """

    kind: Literal["passages", "queries"]
    dataset: str
    split: str | None
    texts: int
    texts_digest: str
    encoder: str
    encoder_digest: str
    settings: dict[str, Any]
    dimension: int
    similarity: str
    dtype: str
    vector_dtype: Literal["fp32", "fp16"]
    file_format: Literal["parquet", "npy", "tevatron"]
    tokens_per_batch: int
    shard: int
    shards: int
    rows: int = 0
    files: tuple[VectorFile, ...] = ()
    layout: int = LAYOUT

    @property
    def suffix(self) -> str:
        """What the names of a shard's files have; empty if there is one shard only."""
        return f"-{self.shard:05}-of-{self.shards:05}" if self.shards > 1 else ""

    @property
    def name(self) -> str:
        """The name of the manifest's own file."""
        return f"manifest{self.suffix}.json"

    def difference(self, other: VectorManifest) -> str:
        """Why two shards do not belong together; empty if they do."""
        if self.encoder_digest != other.encoder_digest:
            return f"another encoder ({other.encoder})"
        if self.texts_digest != other.texts_digest:
            of = f"queries ({other.dataset}, {other.split})" if other.split else other.dataset
            return f"other texts ({of})"
        if self.settings != other.settings:
            return "another pooling, prompt or length"
        for field, noun in (
            ("layout", "version of the plan of batches"),
            ("kind", "kind of text"),
            ("dtype", "number format"),
            ("vector_dtype", "number format of vectors"),
            ("file_format", "format of files"),
            ("tokens_per_batch", "number of tokens per batch"),
            ("shards", "number of shards"),
        ):
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return f"another {noun}: {theirs}, not {ours}"
        return ""


def read_manifests(path: Path) -> list[VectorManifest]:
    """The manifests of a folder, by shard.

    Raises:
        UsageError: there is no such folder.
        DataError: a manifest is malformed.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such folder")
    if path.is_file():
        return []
    found = []
    for file in path.iterdir():
        if MANIFEST.fullmatch(file.name):
            try:
                manifest = msgspec.json.decode(file.read_bytes(), type=VectorManifest)
            except (msgspec.DecodeError, OSError, UnicodeDecodeError, RecursionError) as error:
                raise DataError(f"{file}: not a manifest of vectors ({one_line(error)})") from error
            if manifest.name != file.name:
                raise DataError(f"{file}: is of shard {manifest.shard} of {manifest.shards}")
            found.append(manifest)
    return sorted(found, key=lambda manifest: (manifest.shards, manifest.shard))


def damage(path: Path, manifest: VectorManifest, with_bytes: bool) -> str:
    """What is wrong with the files of a shard; empty if nothing is.

    Args:
        path: the folder.
        manifest: of the shard.
        with_bytes: whether the SHA-256 of each file is compared, too.
    """
    for listed in manifest.files:
        file = path / listed.name
        if not file.is_file():
            return f"{listed.name} is missing"
        size = file.stat().st_size
        if size != listed.bytes:
            return f"{listed.name} has {size:,} bytes, not {listed.bytes:,}"
        if with_bytes and file_sha256(file) != listed.sha256:
            return f"{listed.name} has other bytes than were written (SHA-256 differs)"
    if sum(_rows_of(manifest)) != manifest.rows:
        return f"{manifest.name} contradicts itself: its files do not have {manifest.rows} rows"
    return ""


def missing_shards(manifests: list[VectorManifest]) -> list[int]:
    """The shards that have no manifest."""
    present = {manifest.shard for manifest in manifests}
    return sorted(set(range(manifests[0].shards)) - present)


def _rows_of(manifest: VectorManifest) -> list[int]:
    return [file.rows for file in manifest.files if not has_ids(file)]


def has_ids(file: VectorFile) -> bool:
    """Whether a file has the ids of the vectors in the file before it."""
    return file.name.endswith(".ids")
