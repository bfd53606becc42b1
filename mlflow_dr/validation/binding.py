"""A validation as it is on one run: its collection, split and number format."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.interface import Collection, chosen_split
from mlflow_dr.engines.devices import AUTO, resolve_device, resolve_dtype
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval.measures import check_depth
from mlflow_dr.tracking.datasets import shown_name
from mlflow_dr.tracking.results import bind_name, known_config, refuse_other_config
from mlflow_dr.tracking.runs import DATASET_PARAM, DATASET_TAG, SPLIT_PARAM, TrackedRun
from mlflow_dr.validation.evaluate import Prepared, Searched, Settings
from mlflow_dr.validation.plan import Validation

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
        """Name and digest of the collection, as MLflow shows them."""
        return shown_name(self.prepared.collection.name), self.prepared.digest


class Collections:
    """Collections that are open, and their corpora, each once."""

    def __init__(self) -> None:
        self._open: dict[str, Collection] = {}
        self._searched: dict[str, Searched] = {}
        self._prepared: dict[tuple[str, str], Prepared] = {}

    def bind(self, run: TrackedRun, validation: Validation, changes: Mapping[str, Any]) -> Bound:
        """A validation as it is on a run: with its dataset, split and number format."""
        data = run.fetch().data
        dataset = validation.dataset or data.tags.get(DATASET_TAG) or data.params.get(DATASET_PARAM)
        if not dataset:
            raise UsageError(
                f"run {run.id} names no dataset (param {DATASET_PARAM!r}); give --dataset"
            )
        prepared = self._prepare(dataset, validation.split or data.params.get(SPLIT_PARAM))
        settings = _bound_settings(run, validation, prepared, changes)
        queries, passages = len(prepared.topics.queries), len(prepared.corpus)
        log.info(
            "validation %r of run %s: %s/%s, %d queries, %d passages, %s on %s",
            *(validation.name, run.id, dataset, prepared.split, queries, passages),
            *(settings.dtype, settings.device),
        )
        run.log_collection(
            shown_name(dataset),
            prepared.digest,
            prepared.collection.source,
            {"passages": passages, "queries": queries, "split": prepared.split},
            context=f"validation {validation.name}",
            collection=dataset,
        )
        return Bound(validation.name, prepared, settings)

    def _prepare(self, dataset: str, split: str | None) -> Prepared:
        if dataset not in self._open:
            self._open[dataset] = open_collection(dataset)
            self._searched[dataset] = Searched(self._open[dataset])
        collection = self._open[dataset]
        key = (dataset, chosen_split(collection, split))
        if key not in self._prepared:
            self._prepared[key] = Prepared(collection, key[1], self._searched[dataset])
        return self._prepared[key]


def _bound_settings(
    run: TrackedRun, validation: Validation, prepared: Prepared, changes: Mapping[str, Any]
) -> Settings:
    """Settings with device and number format; `auto` is the one that the name stands for.

    Raises:
        UsageError: the name stands for another configuration on this run.
    """
    settings = validation.settings
    device = resolve_device(settings.device)
    known = known_config(run, validation.name) or {}
    while True:
        dtype = str(known.get("dtype", AUTO)) if settings.dtype == AUTO else settings.dtype
        chosen = replace(settings, device=str(device), dtype=resolve_dtype(dtype, device))
        config = {**_config(prepared, chosen), **changes}
        bound = bind_name(run, validation.name, config)
        if bound.get("dtype") == config["dtype"] or known == bound or settings.dtype != AUTO:
            refuse_other_config(run, validation.name, bound, config)
            return chosen
        known = bound  # another validator, on another kind of machine, was faster


def _config(prepared: Prepared, settings: Settings) -> dict[str, object]:
    """What a validation's figures depend on, beside the checkpoint."""
    return {
        "corpus": prepared.corpus.digest,
        "topics": prepared.topics.digest,
        "split": prepared.split,
        "subset": "full",
        "measures": " ".join(map(str, settings.measures)),
        "depth": check_depth(settings.measures, settings.depth),
        "dtype": settings.dtype,
        "keep_own_id": settings.keep_own_id,
    }
