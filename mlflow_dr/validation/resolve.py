"""Resolves validations on a run: their collection, split, subset and number format."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from mlflow_dr.collection.catalogue import Collection, chosen_split, open_collection
from mlflow_dr.collection.held_out import HELD_OUT, WithHeldOut
from mlflow_dr.devices import AUTO
from mlflow_dr.engines.opening import LOCAL, Engines, device_names
from mlflow_dr.errors import MlflowDrError, TrackingError, UsageError
from mlflow_dr.files import digest_of
from mlflow_dr.retrieval.measures import check_depth
from mlflow_dr.subsets.spec import SubsetSpec
from mlflow_dr.subsets.subset import Subset
from mlflow_dr.tracking.artifacts import held_out_topics, log_subset
from mlflow_dr.tracking.checkpoints import checkpoint_of_step, ready_steps
from mlflow_dr.tracking.datasets import profile_of, shown_name
from mlflow_dr.tracking.following import Followed
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    SPLIT_PARAM,
    TrackedRun,
    check_alive,
    is_over,
)
from mlflow_dr.tracking.server import Patience
from mlflow_dr.tracking.validations import (
    MAIN_PARAM,
    bind_name,
    check_same_config,
    tag_validation_steps,
)
from mlflow_dr.validation.config import FollowConfig
from mlflow_dr.validation.dataset import CorpusTokens, EvalDataset
from mlflow_dr.validation.kinds import CheckpointKind, ResolvedValidation
from mlflow_dr.validation.validations import EvalConfig, Validation

TEST_SPLIT = "test"
log = logging.getLogger(__name__)


class RetrievalValidation(NamedTuple):
    """A validation of encoders on a run: what is searched, with which device and number format."""

    name: str
    data: EvalDataset
    settings: EvalConfig

    @property
    def group(self) -> Hashable:
        """A key that is equal for validations that can encode a corpus together."""
        settings = self.settings
        place = settings.engine, settings.device, settings.dtype
        return self.data.corpus.digest, *place, *settings.prompts.items()

    @property
    def shown_dataset(self) -> tuple[str, str]:
        """Name and digest of the dataset, as MLflow shows them."""
        return _shown(self.data), self.data.digest

    @property
    def query_texts(self) -> dict[str, str]:
        """The texts of the queries, by id."""
        return {query.id: query.text for query in self.data.topics.queries}


class ResolvedMean(NamedTuple):
    """The mean of a suite on a run, which is computed from the records of its validations."""

    name: str
    members: Sequence[RetrievalValidation]
    settings: EvalConfig
    dataset: str

    @property
    def group(self) -> Hashable:
        """A key that no other validation has."""
        return ("mean", self.name)

    @property
    def shown_dataset(self) -> tuple[str, str]:
        """Name of the suite, and a digest of its datasets, as MLflow shows them."""
        return shown_name(self.dataset), digest_of(
            *sorted(each.data.digest for each in self.members)
        )

    @property
    def query_texts(self) -> dict[str, str]:
        """Nothing: a mean has no values of single queries."""
        return {}

    @property
    def config(self) -> dict[str, object]:
        """Everything except the checkpoint that the values depend on."""
        members = sorted(self.members, key=lambda member: member.name)
        return {
            "mean_of": " ".join(member.name for member in members),
            "corpus": digest_of(*(member.data.corpus.digest for member in members)),
            "topics": digest_of(*(member.data.topics.digest for member in members)),
            "measures": " ".join(map(str, self.settings.measures)),
        }


def resolve_mean(
    run: TrackedRun, validation: Validation, searching: Mapping[str, RetrievalValidation]
) -> ResolvedMean:
    """The mean of a suite; its name stands for these validations from now on.

    Raises:
        UsageError: the name stands for another configuration.
        TrackingError: the server does not answer.
    """
    members = [searching[name] for name in validation.mean_of]
    mean = ResolvedMean(validation.name, members, validation.settings, validation.dataset or "")
    bound = bind_name(run, mean.name, mean.config)
    check_same_config(run, mean.name, bound, mean.config)
    return mean


class EvalDatasets:
    """Collections, their token tables and their subsets, each opened once.

    Args:
        engines: know their devices and number formats.
    """

    def __init__(self, engines: Engines | None = None) -> None:
        self._engines = engines or Engines()
        self._tokens: dict[str, CorpusTokens] = {}
        self._data: dict[tuple[str, str, SubsetSpec, float | None, str], EvalDataset] = {}

    def open(self, run: TrackedRun, validation: Validation) -> tuple[str, EvalDataset]:
        """The dataset's name, and what a validation of a run searches."""
        name, split = named_data(run, validation.dataset, validation.split)
        if name not in self._tokens:
            self._tokens[name] = CorpusTokens(open_collection(name))
        tokens, spec = self._tokens[name], validation.subset
        collection = with_held_out(run, tokens.collection, split)
        split = chosen_split(collection, split)
        # encoder:step-N is another checkpoint on another run
        is_own = any(part.step is not None for part in spec.terms)
        # and other runs hold out other queries
        is_own = is_own or collection is not tokens.collection
        key = (name, split, spec, validation.settings.target_error, run.id if is_own else "")
        if key not in self._data:
            data = EvalDataset(collection, split, tokens)
            if spec != SubsetSpec():
                published = partial(checkpoint_of_step, run)
                data = data.on_subset(spec, validation.settings, published=published)
            self._data[key] = data
        return name, self._data[key]

    def resolve(
        self, run: TrackedRun, validation: Validation, changes: Mapping[str, Any]
    ) -> RetrievalValidation:
        """A validation on a run; its name stands for this configuration from now on.

        Args:
            run: whose checkpoints are validated.
            validation: as it was configured.
            changes: settings that replace those of the run's encoders.

        Raises:
            UsageError: no such dataset or split, or the name stands for another configuration.
            TrackingError: the server does not answer.
        """
        name, data = self.open(run, validation)
        settings = _bind_settings(run, validation, data, changes, self._engines)
        passages = data.n_passages
        if validation.split is None and data.split == TEST_SPLIT:
            log.warning(
                "%s has no development split, so checkpoints are chosen on test data; --split %s "
                "confirms that",
                *(name, TEST_SPLIT),
            )
        log.info(
            "validation %r of run %s: %s/%s, %d queries, %d passages%s, %s on %s",
            *(validation.name, run.id, name, data.split, len(data.topics.queries), passages),
            f" ({data.subset.spec.shown})" if data.subset else "",
            *(settings.dtype, settings.device if settings.engine == LOCAL else settings.engine),
        )
        profile = profile_of(passages, data.topics, data.split)
        if data.subset:
            profile |= {"subset": data.subset.spec.shown, "origins": data.subset.sizes}
            description = _describe_subset(data.subset, name, data.split)
            log_subset(run, validation.name, data.subset.table, description)
        run.log_collection(
            _shown(data),
            data.digest,
            data.collection.source,
            profile,
            context=f"validation {validation.name}",
            collection=name,
        )
        return RetrievalValidation(validation.name, data, settings)


class ValidationResolver:
    """The validations of a configuration on each run that is followed, resolved once per run.

    Args:
        followed: whose runs.
        config: has the validations.
        kind: of the checkpoints.
        patiently: repeats requests while the server is away.
        sleep: waits; passed in by tests.
    """

    def __init__(
        self,
        followed: Followed,
        config: FollowConfig,
        kind: CheckpointKind,
        patiently: Patience,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._followed = followed
        self._config = config
        self._kind = kind
        self._patiently = patiently
        self._sleep = sleep
        self._resolved: dict[str, Sequence[ResolvedValidation]] = {}

    def __len__(self) -> int:
        return len(self._resolved)

    def known(self, run_id: str) -> Sequence[ResolvedValidation] | None:
        """The validations of a run; empty if it is skipped, None if it is not resolved yet."""
        return self._resolved.get(run_id)

    def pass_over(self, run_id: str) -> None:
        """Skip this run from now on."""
        self._resolved[run_id] = []

    def resolve_ahead(self, run: TrackedRun) -> None:
        """Open the collections before the first checkpoint is published, once the run names them.

        Raises:
            UsageError: the run names no dataset, or the validations do not fit it.
            TrackingError: the run was deleted.
        """
        is_told = False
        while not self._patiently(partial(self._can_resolve, run)):
            if not self._config.follow:
                break
            if not is_told:
                log.info("waiting until run %s has what its validations need", run.id)
                is_told = True
            self._sleep(self._config.poll_seconds)
        self._patiently(partial(self.resolve, run, is_ahead=True))

    def is_early(self, run: TrackedRun) -> bool:
        """Whether a checkpoint that the validations need is not published yet.

        Raises:
            TrackingError: the server does not answer.
        """
        steps = self._kind.awaited_steps
        if not self._config.follow or not steps or is_over(run.fetch()):
            return False
        # a step below a published one will never be published
        return max(steps) > max(ready_steps(run), default=-1)

    def resolve(self, run: TrackedRun, is_ahead: bool = False) -> Sequence[ResolvedValidation]:
        """The validations on a run; empty if it is one of several and they do not fit it.

        Args:
            run: whose checkpoints are validated.
            is_ahead: whether there may be no checkpoint yet; see `CheckpointKind.resolve`.

        Raises:
            UsageError: the validations do not fit the only run that is followed.
            TrackingError: the server does not answer.
        """
        if run.id not in self._resolved:
            try:
                resolved = self._kind.resolve(run, is_ahead)
                if resolved is None:
                    return []
                self._note(run)
                self._resolved[run.id] = resolved
            except TrackingError:
                raise
            except MlflowDrError as error:
                if self._followed.run is not None:
                    raise
                log.error("run %s is passed over: %s", run.id, error)
                self.pass_over(run.id)
        return self._resolved[run.id]

    def _note(self, run: TrackedRun) -> None:
        """Record on a run which validation decides, and the steps of each validation."""
        config = self._config
        validations = config.all_validations
        run.fetch()  # opening the datasets may have taken minutes
        if not config.chooses_subset:
            run.set_param_once(MAIN_PARAM, validations[0].name)
        skips = config.chooses_subset or config.max_lag_seconds is not None
        tag_validation_steps(
            run,
            {
                validation.name: 0 if skips or validation.refines else config.every
                for validation in validations
            },
        )

    def _can_resolve(self, run: TrackedRun) -> bool:
        """Whether the run has what the validations need, or is over, or publishes already."""
        state = run.fetch()
        check_alive(state)
        is_known = self._kind.has_data(state.data.params) or is_over(state)
        is_known = is_known or bool(self._followed.snapshot().checkpoints)
        return is_known and not self.is_early(run)


def with_held_out(run: TrackedRun | None, collection: Collection, split: str | None) -> Collection:
    """A collection with the queries that a run holds out of its training, if they are asked for.

    Raises:
        TrackingError: the run holds none out, or they cannot be fetched.
    """
    if run is None or split != HELD_OUT or split in collection.splits:
        return collection
    return WithHeldOut(collection, held_out_topics(run))


def named_data(run: TrackedRun, dataset: str | None, split: str | None) -> tuple[str, str | None]:
    """The dataset and split to use: as given, else the run's; its split is of its own dataset.

    Args:
        run: is fetched, because it may have been told its dataset a moment ago.
        dataset: its name, if it was given.
        split: of the queries, if it was given.

    Raises:
        UsageError: neither names a dataset, or there is no dataset of the given name.
    """
    data = run.fetch().data
    own = data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM)
    name = dataset or own
    if not name:
        raise UsageError(f"run {run.id} names no dataset (param {DATASET_PARAM!r}); give --dataset")
    if not split and (name == own or open_collection(name).name == own):
        split = data.params.get(SPLIT_PARAM)
    return name, split or None


def _shown(data: EvalDataset) -> str:
    subset = f" ({data.subset.spec.shown})" if data.subset else ""
    return shown_name(f"{data.collection.name}{subset}")


def _describe_subset(subset: Subset, dataset: str, split: str) -> dict[str, object]:
    """How a subset was chosen."""
    description: dict[str, object] = {
        "subset": subset.spec.shown,
        "dataset": dataset,
        "split": split,
        "digest": subset.digest,
        "passages": len(subset),
        "origins": subset.sizes,
    }
    if subset.spec.term_that_chooses("queries"):
        description["queries"] = [query.id for query in subset.topics.queries]
    return description


def _bind_settings(
    run: TrackedRun,
    validation: Validation,
    data: EvalDataset,
    changes: Mapping[str, Any],
    engines: Engines,
) -> EvalConfig:
    """Settings with device and number format; the format `auto` is the one that the name has.

    Raises:
        UsageError: the name stands for another configuration on this run.
    """
    settings = validation.settings
    data.check_measures(settings)
    device = device_names(settings.engine, settings.device)
    engine = engines.get(settings.engine, device)
    chosen = replace(settings, device=device, dtype=engine.resolve_dtype(settings.dtype))
    config = {**_result_config(data, chosen), **changes}
    bound = bind_name(run, validation.name, config)
    if settings.dtype == AUTO:
        chosen = replace(chosen, dtype=engine.resolve_dtype(str(bound.get("dtype", AUTO))))
        config["dtype"] = chosen.dtype
    check_same_config(run, validation.name, bound, config)
    return chosen


def _result_config(data: EvalDataset, settings: EvalConfig) -> dict[str, object]:
    """Everything except the checkpoint that the values of a validation depend on."""
    subset = data.subset
    return {
        "corpus": data.corpus.digest,
        "topics": data.topics.digest,
        "split": data.split,
        "subset": "full" if subset is None else f"{subset.spec.shown}, {subset.digest}",
        "measures": " ".join(map(str, settings.measures)),
        "depth": check_depth(settings.measures, settings.depth),
        "dtype": settings.dtype,
        "keep_own_id": settings.keep_own_id,
        **({"estimate": True} if settings.estimate else {}),
        **data.answers_config(settings),
        **settings.prompts,
        **settings.form().config,
    }
