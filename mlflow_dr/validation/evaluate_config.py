"""Configurations of the commands that evaluate encoders once: `evaluate` and `compare`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import Field, model_validator

from mlflow_dr.collection.suites import suite_members
from mlflow_dr.config import Config, Flag, within
from mlflow_dr.devices import dtype_name
from mlflow_dr.errors import UsageError
from mlflow_dr.fields import (
    LARGEST,
    CollectionConfig,
    Depth,
    Devices,
    Dims,
    Dtype,
    EncoderOverrides,
    EngineName,
    Estimated,
    File,
    Force,
    Judged,
    KeepOwnId,
    Length,
    Match,
    Measures,
    Precisions,
    SearchBackendName,
    Seed,
    Subsets,
    TargetError,
    Texts,
    TrackingUri,
    TrustRemoteCode,
)
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES, check_depth, parse_measures
from mlflow_dr.retrieval.vector_form import VectorForm, forms, parse_dims, parse_precisions
from mlflow_dr.subsets.spec import SubsetSpec, parse_subset
from mlflow_dr.validation.validations import FIRST_NAME, EvalConfig

OF_A_COLLECTION = tuple(CollectionConfig.model_fields)
NO_INTERVAL = "estimate: the mean of a suite has no interval; leave it out"


class MeasureConfig(Config):
    """What is measured, and where it is computed."""

    measures: Measures = DEFAULT_MEASURES
    match: Match = "string"
    depth: Depth = None
    device: Devices = "auto"
    dtype: Dtype = "auto"
    keep_own_id: KeepOwnId = False
    search_backend: SearchBackendName = "auto"
    engine: EngineName = "local"
    query_prompt: Annotated[str | None, Flag("--query-prompt", "--query-prefix")] = None
    """Text that is put before each query (default: the encoder's own)."""
    passage_prompt: Annotated[str | None, Flag("--passage-prompt", "--passage-prefix")] = None
    """Text that is put before each passage (default: the encoder's own)."""

    def eval_config(self) -> EvalConfig:
        """The settings of an evaluation.

        Raises:
            UsageError: a depth below a measure's cut-off.
        """
        measures = parse_measures(self.measures)
        check_depth(measures, self.depth)
        dtype = dtype_name(self.dtype)
        return EvalConfig(
            measures,
            self.depth,
            self.device,
            dtype,
            self.keep_own_id,
            self.search_backend,
            self.engine,
            self.match,
            self.query_prompt,
            self.passage_prompt,
        )


class RetrievalConfig(MeasureConfig):
    """What is measured on which part of the corpus, and of which vectors."""

    subset: Subsets = ()
    estimate: Estimated = False
    target_error: TargetError = None
    judged: Judged = "relevant"
    seed: Seed = 0
    dims: Dims = ()
    precision: Precisions = ()

    @property
    def forms(self) -> list[VectorForm]:
        """The forms of vectors that are measured, as they are first."""
        return forms(parse_dims(self.dims), parse_precisions(self.precision))

    def specs_and_settings(self) -> list[tuple[SubsetSpec, EvalConfig]]:
        """The subsets, the full corpus if none is named, each with its settings.

        Raises:
            UsageError: settings that make no sense together.
        """
        settings = self.eval_config()
        specs = [parse_subset(text, self.seed, self.judged) for text in self.subset]
        if self.target_error is not None and not self.estimate:
            raise UsageError("--target-error is of --estimate; give both")
        if not self.estimate:
            return [(spec, settings) for spec in specs or [SubsetSpec()]]
        if not specs and self.target_error is not None:
            specs = [parse_subset("random:auto", self.seed, self.judged)]
        if not any(spec != SubsetSpec() for spec in specs):
            raise UsageError("--estimate needs a sample of the corpus, such as --subset random:5%")
        return [(spec, settings.estimating(spec, self.target_error)) for spec in specs]


class EvaluatorConfig(MeasureConfig):
    """The `evaluator_config` of `mlflow.models.evaluate`."""

    dataset: str | None = None
    """The collection, if `data` is not one and is ignored."""
    split: str | None = None
    """The queries to evaluate on (default: dev, else test)."""
    metric_prefix: str = ""
    """Put before the names of the metrics."""
    log_ranking: bool = False
    """Keep the TREC run file."""


class EvaluateConfig(CollectionConfig, RetrievalConfig, EncoderOverrides):
    """`mlflow-dr evaluate`: one encoder on a collection, or on each collection of a suite."""

    encoder: Annotated[str, Flag(positional=True)]
    split: str | None = None
    """The queries to evaluate on (default: dev, else test)."""
    output: File | None = None
    """Write the report to this JSON file."""
    ranking: File | None = None
    """Write the ranking to this TREC run file."""
    force: Force = False
    subset: Annotated[Subsets, Field(max_length=1)] = ()
    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.spec_and_settings()
        if members := self.members:
            if self.ranking is not None:
                raise UsageError("ranking: a suite has one for each collection; name a collection")
            if self.estimate:
                raise UsageError(NO_INTERVAL)
            check_same_measures(self.dataset, (member.eval_config() for member in members.values()))
        return self

    @property
    def members(self) -> dict[str, EvaluateConfig]:
        """The configuration of each collection of a suite; empty for a single collection.

        Raises:
            ConfigError: a key or value of a suite's file that is wrong.
        """
        left_out = {*OF_A_COLLECTION, "output", "ranking"}
        given = {key: value for key, value in self.given().items() if key not in left_out}
        made: dict[str, EvaluateConfig] = {}
        for member in suite_members(self.dataset):
            with within(f"{self.dataset}: {member.name}"):
                made[member.name] = EvaluateConfig(**{**given, **member.settings})
        return made

    def spec_and_settings(self) -> tuple[SubsetSpec, EvalConfig]:
        """The subset, and how it is evaluated.

        Raises:
            UsageError: settings that make no sense together.
        """
        ((spec, settings),) = self.specs_and_settings()
        return spec, settings


class CompareConfig(Config):
    """`mlflow-dr compare`: several encoders with the first of them."""

    operands: Annotated[Texts, Flag(positional=True)]
    name: str = FIRST_NAME
    """The validation whose values are compared."""
    measure: str | None = None
    """The measure to compare (default: the validation's first measure)."""
    dataset: str | None = None
    """As of `mlflow-dr evaluate`. Encoders without values on it are evaluated now, and the texts of
    its queries are shown."""
    split: str | None = None
    """The queries to evaluate on (default: the validation's, else dev or test)."""
    match: Match = "string"
    device: Devices = "auto"
    dtype: Dtype = "auto"
    output: File | None = None
    """Write the values of all queries (CSV) and a picture of the differences to this folder."""
    force: Force = False
    q_max_len: Length | None = None
    """Longest query, in tokens, for encoders that are evaluated now."""
    p_max_len: Length | None = None
    """Longest passage, in tokens, for encoders that are evaluated now."""
    changed: Annotated[int, Field(ge=0, le=LARGEST)] = 10
    """How many of the most changed queries to show."""
    trust_remote_code: TrustRemoteCode = False
    seed: Seed = 0
    tracking_uri: TrackingUri = None


def check_same_measures(suite: str | None, settings: Iterable[EvalConfig]) -> None:
    """Refuse collections of a suite whose measures have no mean."""
    if len({each.measures for each in settings}) > 1:
        raise UsageError(f"{suite}: all collections of a suite need the same measures")
