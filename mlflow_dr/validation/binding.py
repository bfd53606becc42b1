"""A validation as it is on one run: its collection, split and number format."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import Collection, chosen_split
from mlflow_dr.engines.devices import AUTO, resolve_device, resolve_dtype
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import check_depth
from mlflow_dr.subsets.spec import SubsetSpec
from mlflow_dr.subsets.strategies import CachedSearching
from mlflow_dr.subsets.subset import Subset, make_subset
from mlflow_dr.tracking.artifacts import log_subset
from mlflow_dr.tracking.checkpoints import checkpoint_of_step, ready_steps
from mlflow_dr.tracking.datasets import profile_of, shown_name
from mlflow_dr.tracking.runs import (
    DATASET_PARAM,
    DATASET_TAG,
    SPLIT_PARAM,
    TrackedRun,
    is_over,
)
from mlflow_dr.tracking.validations import bind_name, check_same_config, stored_config
from mlflow_dr.validation.evaluate import Prepared, Searched, Settings
from mlflow_dr.validation.plan import Validation

TEST_SPLIT = "test"
log = logging.getLogger(__name__)


class Bound(NamedTuple):
    """A validation as it is on one run: what is searched for what is known, and its settings."""

    name: str
    prepared: Prepared
    settings: Settings

    @property
    def group(self) -> tuple[str, str, str]:
        """Equal for validations that may encode a corpus together."""
        return self.prepared.corpus.digest, self.settings.device, self.settings.dtype

    @property
    def dataset(self) -> tuple[str, str]:
        """Name and digest of what is searched for what, as MLflow shows them."""
        return _shown(self.prepared), self.prepared.digest


class Collections:
    """Collections that are open, and their corpora, each once."""

    def __init__(self) -> None:
        self._open: dict[str, Collection] = {}
        self._searched: dict[str, Searched] = {}
        self._prepared: dict[tuple[str, str, SubsetSpec, str], Prepared] = {}

    def bind(self, run: TrackedRun, validation: Validation, changes: Mapping[str, Any]) -> Bound:
        """A validation as it is on a run: with its dataset, split and number format."""
        dataset, prepared = self.prepare(run, validation)
        settings = _bound_settings(run, validation, prepared, changes)
        queries, passages = len(prepared.topics.queries), prepared.n_passages
        if validation.split is None and prepared.split == TEST_SPLIT:
            log.warning(
                "%s has no development split, so checkpoints are validated on %r, and whatever is "
                "chosen or stopped by these figures is chosen on test data (--split %s says that "
                "this is meant)",
                *(dataset, TEST_SPLIT, TEST_SPLIT),
            )
        log.info(
            "validation %r of run %s: %s/%s, %d queries, %d passages%s, %s on %s",
            *(validation.name, run.id, dataset, prepared.split, queries, passages),
            f" ({prepared.subset.spec.shown})" if prepared.subset else "",
            *(settings.dtype, settings.device),
        )
        profile = profile_of(passages, prepared.topics, prepared.split)
        if prepared.subset:
            about = _about(prepared.subset, dataset, prepared.split)
            profile |= {"subset": prepared.subset.spec.shown, "origins": prepared.subset.sizes}
            log_subset(run, validation.name, prepared.subset.table, about)
        run.log_collection(
            _shown(prepared),
            prepared.digest,
            prepared.collection.source,
            profile,
            context=f"validation {validation.name}",
            collection=dataset,
        )
        return Bound(validation.name, prepared, settings)

    def prepare(self, run: TrackedRun, validation: Validation) -> tuple[str, Prepared]:
        """What a validation of a run searches, and its dataset's name; nothing is written there."""
        dataset, split = named_data(run, validation.dataset, validation.split)
        if dataset not in self._open:
            self._open[dataset] = open_collection(dataset)
            self._searched[dataset] = Searched(self._open[dataset])
        collection, searched = self._open[dataset], self._searched[dataset]
        chosen, spec = chosen_split(collection, split), validation.subset
        # a checkpoint of the run itself is another one on another run
        of_run = run.id if any(part.step is not None for part in spec.terms) else ""
        key = (dataset, chosen, spec, of_run)
        if key not in self._prepared:
            whole = Prepared(collection, chosen, searched)
            self._prepared[key] = whole
            if spec != SubsetSpec():
                subset = _chosen(run, spec, whole, validation.settings)
                self._prepared[key] = Prepared(collection, chosen, searched, subset)
        return dataset, self._prepared[key]


def is_early(run: TrackedRun, validations: Iterable[Validation]) -> bool:
    """Whether the checkpoint of a step that a subset is chosen by is still to be published.

    One that others of later steps have gone past never will be.

    Raises:
        TrackingError: the server does not answer.
    """
    steps = {part.step for one in validations for part in one.subset.terms if part.step is not None}
    if not steps or is_over(run.fetch()):
        return False
    return max(steps) > max(ready_steps(run), default=-1)


def named_data(run: TrackedRun, dataset: str | None, split: str | None) -> tuple[str, str | None]:
    """What is searched for what: as asked, else as the run says; its split is of its own dataset.

    Raises:
        UsageError: neither names a dataset, or nothing goes by the name that is asked for.
    """
    data = run.fetch().data
    own = data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM)
    named = dataset or own
    if not named:
        raise UsageError(f"run {run.id} names no dataset (param {DATASET_PARAM!r}); give --dataset")
    if not split and (named == own or open_collection(named).name == own):
        split = data.params.get(SPLIT_PARAM)
    return named, split or None


def _chosen(run: TrackedRun, spec: SubsetSpec, whole: Prepared, settings: Settings) -> Subset:
    """The subset of a collection that a validation of a run searches."""
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    searching = CachedSearching(
        whole.corpus, str(device), dtype, lambda step: checkpoint_of_step(run, step)
    )
    return make_subset(spec, whole.corpus, whole.topics, searching)


def _shown(prepared: Prepared) -> str:
    subset = f" ({prepared.subset.spec.shown})" if prepared.subset else ""
    return shown_name(f"{prepared.collection.name}{subset}")


def _about(subset: Subset, dataset: str, split: str) -> dict[str, object]:
    """How a subset was chosen."""
    about: dict[str, object] = {
        "subset": subset.spec.shown,
        "dataset": dataset,
        "split": split,
        "digest": subset.digest,
        "passages": len(subset),
        "origins": subset.sizes,
    }
    if subset.spec.n_queries is not None:
        about["queries"] = [query.id for query in subset.topics.queries]
    return about


def _bound_settings(
    run: TrackedRun, validation: Validation, prepared: Prepared, changes: Mapping[str, Any]
) -> Settings:
    """Settings with device and number format; `auto` is the one that the name stands for.

    Raises:
        UsageError: the name stands for another configuration on this run.
    """
    settings = validation.settings
    device = resolve_device(settings.device)
    known = stored_config(run, validation.name) or {}
    while True:
        dtype = str(known.get("dtype", AUTO)) if settings.dtype == AUTO else settings.dtype
        chosen = replace(settings, device=str(device), dtype=resolve_dtype(dtype, device))
        config = {**_config(prepared, chosen), **changes}
        bound = bind_name(run, validation.name, config)
        if bound.get("dtype") == config["dtype"] or known == bound or settings.dtype != AUTO:
            check_same_config(run, validation.name, bound, config)
            return chosen
        known = bound  # another validator, on another kind of machine, was faster


def _config(prepared: Prepared, settings: Settings) -> dict[str, object]:
    """What a validation's figures depend on, beside the checkpoint."""
    return {
        "corpus": prepared.corpus.digest,
        "topics": prepared.topics.digest,
        "split": prepared.split,
        "subset": _subset_name(prepared),
        "measures": " ".join(map(str, settings.measures)),
        "depth": check_depth(settings.measures, settings.depth),
        "dtype": settings.dtype,
        "keep_own_id": settings.keep_own_id,
    }


def _subset_name(prepared: Prepared) -> str:
    """What is searched, in words that differ where the passages, or their candidates, do."""
    subset = prepared.subset
    return "full" if subset is None else f"{subset.spec.shown}, {subset.digest}"
