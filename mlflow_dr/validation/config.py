"""Configurations of the commands that validate checkpoints: `validate` and `run`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mlflow_dr.collection.catalogue import ENTRIES, check_split, open_collection
from mlflow_dr.collection.locations import hub_name
from mlflow_dr.collection.suites import Member, suite_members
from mlflow_dr.config import Config, ConfigError, Flag, string_keys, within
from mlflow_dr.errors import UsageError
from mlflow_dr.fields import (
    LARGEST,
    CheckpointsDir,
    CollectionConfig,
    Count,
    Depth,
    Dims,
    Dtype,
    EncoderOverrides,
    EngineName,
    Estimated,
    Every,
    Judged,
    KeepRules,
    Match,
    Measures,
    Precisions,
    RunName,
    Subsets,
    TargetError,
    Texts,
    TrackingUri,
)
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES
from mlflow_dr.retrieval.vector_form import ALL
from mlflow_dr.validation.evaluate_config import (
    NO_INTERVAL,
    OF_A_COLLECTION,
    RetrievalConfig,
    check_same_measures,
)
from mlflow_dr.validation.validations import (
    FIRST_NAME,
    NOT_IN_NAME,
    NamedValidation,
    Validation,
    joined_name,
    refining,
)

PATIENCE = 60.0

Seconds = Annotated[float, Field(gt=0, le=LARGEST)]
Refine = Annotated[
    str | None,
    Field(
        description="SUBSET@N, such as full@3: validate the N checkpoints that are best so far on "
        "this subset, too."
    ),
]
KeepUp = Annotated[
    bool,
    Field(description="Of several --subset, use the largest that keeps up with the trainer."),
]
PollSeconds = Annotated[Seconds, Field(description="Seconds between two requests to the server.")]
ValidationName = Annotated[
    str, Field(description="Prefix of the metrics; the name of a subset is added to it.")
]


class PolicyConfig(Config):
    """What a validator does with the curve of a run."""

    metric: str | None = None
    """The metric that orders checkpoints, such as val/mrr_at_10 (default: the first measure of the
    validation that began first)."""
    patience: Count | None = None
    """Ask the training to end when this many checkpoints in a row have not improved the metric."""
    min_delta: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    """Smallest increase that counts as an improvement."""
    keep: KeepRules | None = None
    """Remove the files of all other checkpoints, such as best:3,last:2,every:10000."""


class FollowConfig(PolicyConfig):
    """Which checkpoints a validator takes, whatever it does with them."""

    run_id: RunName = None
    order: Literal["oldest", "newest", "bisect"] = "oldest"
    """Which checkpoint comes first. bisect: the newest, then the one farthest from all that are
    done."""
    every: Every = 1
    max_lag_seconds: Annotated[Seconds | None, Flag("--max-lag")] = None
    """Skip checkpoints that were published more than this many seconds ago."""
    max_seconds: Seconds | None = None
    """Stop the validation of a checkpoint that takes longer, and record it as failed. Tokenising
    and waiting for the server do not count."""
    retry_failed: bool = False
    """Try again what was recorded as failed."""
    follow: Annotated[bool, Flag(off="--once")] = True
    """Wait for more checkpoints until the run has ended, or validate what is published and end."""
    poll_seconds: PollSeconds = 2.0
    patience_seconds: Annotated[Seconds, Flag(in_file_only=True)] = PATIENCE
    """Take over a claim whose heartbeat stands still for this long."""
    tracking_uri: TrackingUri = None

    @property
    def all_validations(self) -> Sequence[NamedValidation]:
        """The validations of each checkpoint; the first one decides which checkpoint is best."""
        raise NotImplementedError

    @property
    def chooses_subset(self) -> bool:
        """Whether a validator chooses among the validations by its speed."""
        return False


class ValidationDefaults(CollectionConfig, RetrievalConfig):
    """The settings of validations; each validation of a file may replace some of them."""

    split: Texts = ()
    """The queries to evaluate on (default: the run's on its own collection, else dev, else test).
    Each of several splits is a validation called NAME-SPLIT."""
    refine: Refine = None

    def made(self, name: str) -> tuple[Validation, ...]:
        """The validations of this name: of each split, subset and form, and those that refine them.

        A validation of one of several splits is called NAME-SPLIT. One of a subset is called
        NAME-SUBSET, because values on a subset are higher and do not belong on the same curve. So
        are those of fewer dimensions or bits: NAME-64d, NAME-int8, NAME-64d-int8.

        A suite is a validation called NAME-COLLECTION for each collection, and their mean.

        Raises:
            UsageError: a depth below a measure's cut-off, or names that make no sense together.
        """
        if members := suite_members(self.dataset):
            return self._suite(name, members)
        dataset, file_splits = self.named_dataset()
        splits = self.split or file_splits
        named: list[tuple[str, str | None]] = [(name, splits[0] if splits else None)]
        if len(splits) > 1:
            named = [(f"{name}-{NOT_IN_NAME.sub('_', split)}", split) for split in splits]
        validations = tuple(
            Validation(
                settings.of_form(form),
                joined_name(called, spec, form, settings.estimate),
                dataset,
                split,
                spec,
            )
            for called, split in named
            for spec, settings in self.specs_and_settings()
            for form in self.forms
        )
        if self.refine is None:
            return validations
        whole = [each for each in validations if each.settings.form() == ALL]
        return validations + refining(self.refine, whole, self.seed, self.judged)

    def _suite(self, name: str, members: Sequence[Member]) -> tuple[Validation, ...]:
        """The mean of a suite, then its validations; a mean of each subset."""
        if self.estimate:
            raise UsageError(NO_INTERVAL)
        if self.refine is not None:
            raise UsageError("refine: a suite has no single best checkpoint; leave it out")
        made: list[Validation] = []
        for member in members:
            with within(f"{self.dataset}: {member.name}"):
                made += self.replaced_by(dict(member.settings)).made(f"{name}-{member.name}")
        check_same_measures(self.dataset, (validation.settings for validation in made))
        means = [
            Validation(
                made[0].settings.of_form(form),
                joined_name(name, spec, form),
                self.dataset,
                subset=spec,
                mean_of=tuple(
                    each.name
                    for each in made
                    if (each.subset, each.settings.form()) == (spec, form)
                ),
            )
            for spec, form in dict.fromkeys((each.subset, each.settings.form()) for each in made)
        ]
        return (*means, *made)

    def replaced_by(self, values: dict[str, Any]) -> ValidationDefaults:
        """The same settings with these values; a collection replaces the other one as a whole.

        Raises:
            ConfigError: a key or value that is wrong, or a dataset or split that does not exist.
        """
        merged = {key: value for key, value in self.given().items() if key in FIELDS} | values
        if not values.keys().isdisjoint(OF_A_COLLECTION):
            for key in set(OF_A_COLLECTION) - values.keys():
                merged.pop(key, None)
            if "query_files" in values and "split" not in values:
                merged.pop("split", None)
        made = ValidationDefaults(**merged)
        if "dataset" in values:
            _check_dataset(made)
        return made


FIELDS = tuple(ValidationDefaults.model_fields)


class ValidateConfig(ValidationDefaults, EncoderOverrides, FollowConfig):
    """`mlflow-dr validate`: what one validator does.

        order: bisect
        validations:
          dev: {dataset: msmarco, split: dev, measures: mrr@10 recall@1000}
          covid: {dataset: irds:beir/trec-covid, measures: ndcg@10}
          msmarco: {dataset: msmarco, subset: bm25@50+random:10000, refine: full@3}
          nq: {candidate_dir: nq/corpus, query_files: nq/test.json, qrel_files: nq/qrels.tsv}

    In a file, `validations` has several validations by name. A validation that leaves out a setting
    takes it from the rest of the file and the flags.
    """

    experiment: str | None = None
    """All runs of this experiment, instead of one run."""
    checkpoints_dir: CheckpointsDir = None
    name: ValidationName = FIRST_NAME
    validations: Annotated[
        dict[str, Any] | None,
        BeforeValidator(lambda values: string_keys(values, "validations")),
        Field(min_length=1),
        Flag(in_file_only=True),
    ] = None
    """Several validations: the settings of each by its name."""
    keep_up: KeepUp = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.validations is not None and "name" in self.model_fields_set:
            raise ConfigError("name", ": the names of validations are in the file")
        names = [validation.name for validation in self.all_validations]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ConfigError("", f"two validations are called {min(repeated)!r}")
        if self.keep_up and any(validation.mean_of for validation in self.all_validations):
            raise ConfigError("keep_up", " chooses among subsets of one collection, not of a suite")
        if self.keep_up and len({validation.subset for validation in self.cheap}) < 2:
            raise ConfigError("keep_up", " chooses among subsets; give at least two")
        return self

    def check_source(self) -> None:
        """Refuse a configuration that does not say where checkpoints are.

        Raises:
            UsageError: with the flags that say it.
        """
        if bool(self.run_id or self.checkpoints_dir) == bool(self.experiment):
            raise UsageError("give --run-id, --experiment or --checkpoints-dir")
        dataset, _ = self.named_dataset()
        if self.checkpoints_dir and not (self.run_id or dataset or self.validations):
            raise UsageError("a new run names no dataset; give --dataset")

    @cached_property
    def all_validations(self) -> tuple[Validation, ...]:
        """Those of a file's `validations`, or else of the flags."""
        if self.validations is None:
            return self.made(self.name)
        made: list[Validation] = []
        for name, values in self.validations.items():
            key = f"validations.{name}"
            values = {} if values is None else string_keys(values, key)
            with within(key):
                made += self.replaced_by(values).made(name)
        return tuple(made)

    @property
    def chooses_subset(self) -> bool:
        """Whether a validator chooses a subset that keeps up with the trainer."""
        return self.keep_up

    @property
    def cheap(self) -> tuple[Validation, ...]:
        """The validations that are done for every checkpoint, not only for the best."""
        return tuple(
            validation for validation in self.all_validations if validation.refines is None
        )


class RunConfig(PolicyConfig):
    """`mlflow-dr run`: a trainer and a validator side by side."""

    dataset: str | None = None
    """The collection (default: what --config says, else demo)."""
    model: str = "auto"
    """The encoder; auto: one that fits the dataset."""
    gpus: Count = 1
    """Training processes, each on a GPU of its own (torchrun); the validator uses another one."""
    measures: Measures = DEFAULT_MEASURES
    match: Match = "string"
    depth: Depth = None
    dtype: Dtype = "auto"
    engine: EngineName = "local"
    subset: Subsets = ()
    estimate: Estimated = False
    target_error: TargetError = None
    judged: Judged = "relevant"
    refine: Refine = None
    dims: Dims = ()
    precision: Precisions = ()
    keep_up: KeepUp = False
    name: ValidationName = FIRST_NAME
    poll_seconds: PollSeconds = 2.0
    experiment_name: str | None = None
    """The experiment of a new run."""
    tracking_uri: TrackingUri = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.validation()  # refuses what the validator would refuse later
        return self

    @property
    def training_flags(self) -> list[str]:
        """The flags of `mlflow-dr train` for the collection and the encoder."""
        dataset = ["--dataset", self.dataset] if self.dataset else []
        return dataset + ([] if self.model == "auto" else ["--model", self.model])

    def validation(self, **values: Any) -> ValidateConfig:
        """What the validator does.

        Args:
            values: other fields: the run, the dataset and the device.

        Raises:
            ConfigError: values that make no sense together.
        """
        training_only = {"dataset", "model", "gpus", "experiment_name"}
        given = {key: value for key, value in self.given().items() if key not in training_only}
        return ValidateConfig(**given, **values)


def _check_dataset(config: ValidationDefaults) -> None:
    """Refuse a dataset or split that does not exist; nothing is downloaded or built for it."""
    dataset = config.dataset
    if suite_members(dataset):
        return
    if dataset is None or dataset in {entry.name for entry in ENTRIES}:
        return
    if hub_name(dataset) and not Path(dataset).exists():
        return
    with within("dataset"):
        collection = open_collection(dataset)
    for split in config.split:
        with within("split"):
            check_split(collection, split)
