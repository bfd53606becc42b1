"""The keywords of the functions in `functions.py`, for type checkers: the flags with underscores.

What a flag means, what it may be and its default are in the configuration of its command, from
which these names and types follow; a test holds that they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

from mlflow_dr.encoder.arguments import AnyEncoder
from mlflow_dr.files import PathLike

Paths: TypeAlias = PathLike | Sequence[PathLike]
Texts: TypeAlias = str | Sequence[str]
Match: TypeAlias = Literal["string", "regex", "kilt"]
EngineName: TypeAlias = Literal["local", "ray"]
Judged: TypeAlias = Literal["relevant", "all"]


class CollectionFiles(TypedDict, total=False):
    """A collection by its files."""

    candidate_dir: PathLike
    query_files: Paths
    qrel_files: Paths


class MeasureOptions(TypedDict, total=False):
    """What is measured, and where it is computed."""

    measures: Texts
    match: Match
    depth: int
    device: str
    dtype: str
    keep_own_id: bool
    search_backend: str
    engine: EngineName
    query_prompt: str
    passage_prompt: str


class EncoderOptions(TypedDict, total=False):
    """What replaces settings of the encoder's directory."""

    pooling: str
    normalize: bool
    max_length: int
    q_max_len: int
    p_max_len: int
    tokenizer: str


class SubsetOptions(TypedDict, total=False):
    """The part of the corpus that is encoded, and estimates from it."""

    subset: Texts
    estimate: bool
    target_error: float
    judged: Judged
    seed: int


class LoadOptions(EncoderOptions, total=False):
    """The keywords of `load_encoder`."""

    trust_remote_code: bool
    tracking_uri: str


class EvaluateOptions(CollectionFiles, MeasureOptions, EncoderOptions, SubsetOptions, total=False):
    """The keywords of `evaluate`."""

    split: str
    dims: Texts | int | Sequence[int]
    precision: Texts
    output: PathLike
    ranking: PathLike
    force: bool
    trust_remote_code: bool
    tracking_uri: str


class CompareOptions(TypedDict, total=False):
    """The keywords of `compare`."""

    name: str
    measure: str
    dataset: PathLike
    split: str
    match: Match
    device: str
    dtype: str
    output: PathLike
    force: bool
    q_max_len: int
    p_max_len: int
    trust_remote_code: bool
    seed: int
    tracking_uri: str


class ValidateOptions(CollectionFiles, MeasureOptions, EncoderOptions, SubsetOptions, total=False):
    """The keywords of `validate`."""

    dataset: PathLike
    checkpoints_dir: PathLike
    name: str
    validations: Mapping[str, Any]
    split: Texts
    refine: str
    dims: Texts | int | Sequence[int]
    precision: Texts
    keep_up: bool
    metric: str
    patience: int
    min_delta: float
    keep: str
    order: Literal["oldest", "newest", "bisect"]
    every: int
    max_lag: float
    max_seconds: float
    retry_failed: bool
    once: bool
    poll_seconds: float
    tracking_uri: str


class FidelityOptions(CollectionFiles, EncoderOptions, total=False):
    """The keywords of `fidelity`."""

    checkpoints_dir: PathLike
    dataset: PathLike
    split: str
    subset: Texts
    against: Texts
    estimate: bool
    judged: Judged
    seed: int
    measure: str
    match: Match
    device: str
    dtype: str
    keep_own_id: bool
    search_backend: str
    engine: EngineName
    steps: int | Sequence[int]
    every: int
    tolerance: float
    resamples: int
    output: PathLike
    no_log: bool
    tracking_uri: str


class EncodeOptions(CollectionFiles, EncoderOptions, total=False):
    """The keywords of `encode`."""

    split: str
    shard: str
    engine: EngineName
    format: Literal["parquet", "npy", "tevatron"]
    device: str
    dtype: str
    tokens_per_batch: int
    texts: Paths
    texts_are_queries: bool
    query_prompt: str
    passage_prompt: str
    append_eos_token: bool
    log: bool
    force: bool
    trust_remote_code: bool
    tracking_uri: str


class SearchOptions(CollectionFiles, total=False):
    """The keywords of `search`."""

    dataset: PathLike
    queries: PathLike
    split: str
    encoder: AnyEncoder
    depth: int
    measures: Texts
    match: Match
    output: PathLike
    format: Literal["trec", "msmarco", "tevatron", "json", "dpr"]
    shard: str
    partial: bool
    merge: bool
    keep_own_id: bool
    device: str
    dtype: str
    search_backend: str
    force: bool
    trust_remote_code: bool
    tracking_uri: str


class MineOptions(TypedDict, total=False):
    """The keywords of `mine`."""

    train_dir: PathLike
    force: bool
    miner: AnyEncoder
    depth: int
    range_min: int
    negatives: int
    sample: Literal["top", "random"]
    seed: int
    margin: float
    relative_margin: float
    max_score: float
    min_score: float
    keep_answers: bool
    match: Match
    k1: float
    b: float
    language: str
    device: str
    dtype: str
    search_backend: str
    trust_remote_code: bool
    tracking_uri: str
