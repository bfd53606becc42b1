"""The configuration of `mlflow-dr fidelity`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from mlflow_dr.collection.suites import short_name, suite_members
from mlflow_dr.config import as_tuple
from mlflow_dr.errors import UsageError
from mlflow_dr.fields import (
    LARGEST,
    CheckpointsDir,
    CollectionConfig,
    Count,
    Devices,
    Dtype,
    EncoderOverrides,
    EngineName,
    Every,
    File,
    Judged,
    KeepOwnId,
    Match,
    RunName,
    SearchBackendName,
    Seed,
    Subsets,
    Texts,
    TrackingUri,
)
from mlflow_dr.retrieval.estimate import check_estimable
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES, Measure, of_pool, parse_measures
from mlflow_dr.subsets.spec import SubsetSpec, parse_subset


class FidelityConfig(CollectionConfig, EncoderOverrides):
    """`mlflow-dr fidelity`: which subsets are compared with the full corpus, and by what."""

    run_id: RunName = None
    checkpoints_dir: CheckpointsDir = None
    split: str | None = None
    """The queries (default: the run's on its own collection, else dev, else test)."""
    subset: Subsets = ()
    against: Texts = ()
    """Other collections, smaller than --dataset, with passages and queries of their own, such as
    NanoBEIR's; suites, if --dataset is a suite."""
    estimate: bool = False
    """Also study the estimates from each --subset that has a random sample, such as random:5%."""
    judged: Judged = "relevant"
    seed: Seed = 0
    measure: str = DEFAULT_MEASURES.split()[0]
    """The measure that orders the checkpoints: mrr, ndcg, recall, map, precision or success, @k;
    accuracy@k where queries have answers."""
    match: Match = "string"
    device: Devices = "auto"
    dtype: Dtype = "auto"
    keep_own_id: KeepOwnId = False
    search_backend: SearchBackendName = "auto"
    engine: EngineName = "local"
    steps: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = ()
    """Only the checkpoints of these steps."""
    every: Every = 1
    tolerance: Annotated[float, Field(ge=0, le=LARGEST)] = 0.005
    """How much worse than the best checkpoint a subset's choice may be."""
    resamples: Count = 1000
    """Bootstrap resamples of the queries, for the intervals."""
    output: File | None = None
    """A folder for the report, the table, the values of all queries and two pictures."""
    no_log: bool = False
    """Write nothing to the run."""
    tracking_uri: TrackingUri = None

    @property
    def parsed_measure(self) -> Measure:
        """The measure that orders the checkpoints."""
        (measure,) = parse_measures(self.measure)
        return measure

    @property
    def specs(self) -> tuple[SubsetSpec, ...]:
        """The subsets that are compared with the full corpus."""
        return tuple(parse_subset(text, self.seed, self.judged) for text in self.subset)

    def check_source(self) -> None:
        """Refuse a configuration that does not say where checkpoints and queries are.

        Raises:
            UsageError: with the flags that say it.
        """
        if not (self.run_id or self.checkpoints_dir):
            raise UsageError("give --run-id or --checkpoints-dir")
        dataset, splits = self.named_dataset()
        if not (self.run_id or dataset):
            raise UsageError("without a run, give --dataset")
        if dataset and splits:
            self.one_dataset(self.split)

    @model_validator(mode="after")
    def _check(self) -> Self:
        measures = parse_measures(self.measure)
        if len(measures) > 1:
            raise UsageError(f"--measure orders the checkpoints; give one, not {len(measures)}")
        if of_pool(measures):
            raise UsageError(f"{self.measure} is of a pool and not of a ranking; give another")
        slugs = [spec.slug for spec in self.specs]
        if self.estimate:
            check_estimable(measures)
            if not any(spec.sample for spec in self.specs):
                raise UsageError("--estimate needs a --subset with a random sample: random:5%")
            if suite_members(self.dataset):
                raise UsageError("--estimate: the mean of a suite has no interval; leave it out")
        if not slugs and not self.against:
            raise UsageError("no subset to study; give --subset, once for each, or --against")
        names = list(map(short_name, self.against))
        if repeated := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"--against: two collections are called {repeated[0]!r}")
        sizes = [len(suite_members(name)) for name in (self.dataset, *self.against)]
        for name, size in zip(self.against, sizes[1:], strict=True):
            if size != sizes[0]:
                raise UsageError(
                    f"--against {name} has {size or 1} collections, and --dataset has "
                    f"{sizes[0] or 1}; each is compared with its own, in this order"
                )
        if "" in slugs:
            raise UsageError("the others are compared with --subset full; leave it out")
        if repeated := [spec.shown for spec in self.specs if slugs.count(spec.slug) > 1]:
            raise UsageError(f"two subsets are called {repeated[0]!r}")
        return self
