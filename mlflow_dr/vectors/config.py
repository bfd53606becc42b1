"""Configurations of `encode`, `search`, `index` and `convert`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from mlflow_dr.config import Config, ConfigError, Flag, checked
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.fields import (
    CollectionConfig,
    Count,
    Depth,
    Device,
    Devices,
    Dtype,
    EncoderOverrides,
    EngineName,
    File,
    Files,
    Force,
    KeepOwnId,
    Match,
    Measures,
    SearchBackendName,
    Seed,
    Texts,
    TrackingUri,
    TrustRemoteCode,
)
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES

RESULTS = ("json", "dpr")
SHARD = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


def parse_shard(text: str) -> tuple[int, int]:
    """The number of a shard, from 0, and how many there are, of `0/4` to `3/4`.

    Raises:
        UsageError: it is something else.
    """
    found = SHARD.fullmatch(text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not number < count:
        example = f"0/{count} to {count - 1}/{count}" if count else "0/4 to 3/4 of 4 shards"
        raise UsageError(f"shard {quoted(text)}: shards are numbered from 0; expected {example}")
    return number, count


def parse_shards(text: str) -> tuple[Sequence[int], int]:
    """Which shards, and how many there are, of `0/4` (one of them) or `all/4`.

    Raises:
        UsageError: it is something else.
    """
    which, _, count = text.partition("/")
    if which == "all" and SHARD.fullmatch(f"0/{count}") and int(count):
        return range(int(count)), int(count)
    number, shards = parse_shard(text)
    return [number], shards


Shard = Annotated[
    str,
    AfterValidator(checked(parse_shard)),
    Field(description="I/N: only this shard of N, numbered from 0."),
]


class EncodeConfig(CollectionConfig, EncoderOverrides):
    """`mlflow-dr encode`: the vectors of a corpus, or of the queries of a split."""

    encoder: Annotated[str, Flag(positional=True)] = ""
    split: str | None = None
    """Encode the queries of this split instead of the passages."""
    output: File | None = None
    """The folder to write. If it has a part of these vectors already, that is kept."""
    shard: Annotated[str, AfterValidator(checked(parse_shards))] | None = None
    """I/N: only this shard of N, numbered from 0; all/N: all of them, one after another or on
    several devices (default: all/1, on several devices all/64)."""
    engine: EngineName = "local"
    file_format: Annotated[Literal["parquet", "npy", "tevatron"], Flag("--format")] = "parquet"
    """Parquet files, NumPy files with a text file of ids each, or Tevatron's pickles."""
    device: Devices = "auto"
    dtype: Dtype = "auto"
    """How the encoder computes: auto (bf16 where it is faster, else fp32), fp32, bf16 or fp16. With
    fp16 the vectors are stored in fp16, too; a processor computes them in fp32."""
    tokens_per_batch: Count | None = None
    """Tokens of a batch, with padding (default: by device and encoder). All shards need the same
    number."""
    texts: Files = ()
    """Encode the records of JSON or Parquet files instead of a dataset: each an id (docid, query_id
    or text_id), a text (text or query), and maybe a title."""
    texts_are_queries: bool = False
    """The records of --texts are queries."""
    query_prompt: Annotated[str | None, Flag("--query-prompt", "--query-prefix")] = None
    """Put this before each query instead of the encoder's own prompt."""
    passage_prompt: Annotated[str | None, Flag("--passage-prompt", "--passage-prefix")] = None
    """Put this before each passage instead of the encoder's own prompt."""
    append_eos_token: bool = False
    """End each text with the tokenizer's end-of-sequence token, as the encoder was trained."""
    check: File | None = None
    """Only say what is missing or damaged in this folder."""
    log: bool = False
    """Store the manifest with the checkpoint's run."""
    force: Force = False
    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None

    @property
    def encoder_changes(self) -> dict[str, Any]:
        """The given values, as `load_encoder` takes them."""
        prompts = {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}
        given = {name: prompt for name, prompt in prompts.items() if prompt is not None}
        return super().encoder_changes | given

    @property
    def folder(self) -> Path:
        """The absolute path of the folder to write.

        Raises:
            ConfigError: none is given.
        """
        if self.output is None:
            raise ConfigError("output", " is missing: the folder to write")
        return self.output.absolute()

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        if self.check is None and not self.encoder:
            raise ConfigError("encoder", " is missing: a directory, a hub name or models:/...")
        if self.check is None:
            self.folder  # noqa: B018 - refuses
        if self.log and not self.encoder.startswith("models:/"):
            raise ConfigError("log", " needs a published checkpoint, models:/...")
        if self.texts and (self.dataset or self.candidate_dir or self.split):
            raise ConfigError("texts", " stand for a dataset; leave out --dataset and --split")
        if self.texts_are_queries and not self.texts:
            raise ConfigError("texts_are_queries", " needs --texts; use --split with a dataset")
        return self


class SearchConfig(CollectionConfig):
    """`mlflow-dr search`: vectors of queries against vectors of passages."""

    sources: Annotated[Files, Flag(positional=True), Field(min_length=1)]
    question: Texts = ()
    """Search for this text, and show the passages that are found (10, or --depth)."""
    queries: File | None = None
    """A folder with the vectors of the queries (default: encode the queries of --split now)."""
    split: str | None = None
    """Whose queries and judgements (default: those of the vectors of --queries, or dev, or
    test)."""
    encoder: str | None = None
    """What encodes the queries (default: the encoder of the passages)."""
    depth: Depth = None
    measures: Measures = DEFAULT_MEASURES
    match: Match = "string"
    output: File | None = None
    """Write the ranking to this file; to a .json file as results, with texts and answers."""
    file_format: Annotated[
        Literal["trec", "msmarco", "tevatron", "json", "dpr"] | None, Flag("--format")
    ] = None
    """TREC's columns (the default); MS MARCO's query, passage and rank; Tevatron's query, passage
    and score; json, results as a reader takes them (the default for .json), or dpr, the same with
    scores as strings."""
    shard: Shard = "0/1"
    partial: bool = False
    """Search the shards that are there, although others are missing."""
    merge: bool = False
    """The arguments are rankings of all shards; join them."""
    keep_own_id: KeepOwnId = False
    device: Device = "auto"
    dtype: Dtype = "auto"
    search_backend: SearchBackendName = "auto"
    force: Force = False
    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None

    @model_validator(mode="after")
    def _check_given(self) -> Self:
        names = ("queries", "split", "output", "shard", "merge")
        if self.question and (others := [name for name in names if name in self.model_fields_set]):
            raise ConfigError("question", f" shows passages; leave out --{others[0]}")
        if self.shard != "0/1" and self.output is None:
            raise ConfigError("shard", " needs --output, for the ranking that --merge joins")
        if self.shard != "0/1" and self.layout in ("msmarco", *RESULTS):
            raise ConfigError("file_format", f" {self.layout} cannot be merged; use trec")
        return self

    @property
    def layout(self) -> str:
        """The format of the output."""
        if self.file_format is None:
            is_json = self.output is not None and self.output.suffix == ".json"
            return "json" if is_json else "trec"
        return self.file_format

    @property
    def writes_results(self) -> bool:
        """Whether results with texts and answers are written."""
        return self.output is not None and self.layout in RESULTS


class IndexConfig(Config):
    """`mlflow-dr index`: vectors of passages in a FAISS index."""

    vectors: Annotated[File, Flag(positional=True)]
    output: File
    """The folder to write; it must not exist yet."""
    factory: str = "fast"
    """fast, small, exact, or FAISS's factory string, such as IVF4096,PQ64."""
    queries: File | None = None
    """A folder with vectors of queries to measure on (default: passages that are kept out of
    training)."""
    recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Search more clusters, or neighbours, until this recall@10 and @100 are reached."""
    seed: Seed = 0
    log: bool = False
    """Store the index with the checkpoint's run."""
    tracking_uri: TrackingUri = None


class ConvertConfig(Config):
    """`mlflow-dr convert`: a ranking in another format."""

    input: File
    """The ranking: TREC's columns, or query, passage and score."""
    output: File
    """The file to write."""
    file_format: Annotated[Literal["trec", "msmarco", "tevatron"], Flag("--format")] = "trec"
    """TREC's columns, MS MARCO's query, passage and rank, or Tevatron's query, passage and
    score."""
    remove_query: bool = False
    """Leave out a passage whose id is the query's id."""
    force: Force = False
