"""What a study of fidelity measures: the full corpus, its subsets, and other collections."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.collection.suites import Member, short_name, suite_members
from mlflow_dr.errors import UsageError
from mlflow_dr.fidelity_study.agreement import SubsetCurve
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.subsets.spec import FULL, SubsetSpec
from mlflow_dr.tracking.checkpoints import checkpoint_of_step
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.resolve import named_data, with_held_out
from mlflow_dr.validation.validations import EvalConfig

log = logging.getLogger(__name__)

OF_A_MEMBER = ("dataset", "split", "keep_own_id", "query_prompt", "passage_prompt")


class StudiedData(NamedTuple):
    """A corpus or a subset with its queries, and how it is evaluated."""

    data: EvalDataset
    settings: EvalConfig

    @property
    def query_ids(self) -> tuple[str, ...]:
        """Of the queries that have values."""
        topics = self.data.topics
        return tuple(topics.qrels or (query.id for query in topics.queries))


class StudyRow(NamedTuple):
    """A row of a study: the full corpus, a subset, or another collection.

    Attributes:
        name: as the study shows it.
        slug: its name in files.
        members: the data of each collection of a suite, or of the only one.
        names: of the collections of a suite; empty if it is no suite.
        is_other: whether it has corpora of its own.
        has_own_queries: whether its queries are not among those of the full corpus.
    """

    name: str
    slug: str
    members: Sequence[StudiedData]
    names: Sequence[str] = ()
    is_other: bool = False
    has_own_queries: bool = False


def study_rows(
    config: FidelityConfig, settings: EvalConfig, run: TrackedRun | None
) -> list[StudyRow]:
    """The full corpus, then each subset of it, its estimates, and the other collections.

    Raises:
        UsageError: no such collection, split or subset, or one that cannot be studied.
    """
    full = _full_row(config, settings, run)
    rows = [full]
    for spec in config.specs:
        rows.append(_subset_row(full, spec, run))
        if config.estimate and spec.sample:
            rows.append(_estimating(rows[-1], spec))
    return rows + [_other_row(name, full, settings) for name in config.against]


def _full_row(config: FidelityConfig, settings: EvalConfig, run: TrackedRun | None) -> StudyRow:
    if members := suite_members(config.dataset):
        data = [_of_member(member, config.split, settings) for member in members]
        return StudyRow(FULL, FULL, data, [member.name for member in members])
    dataset, splits = config.named_dataset()
    split = config.split or next(iter(splits), None)
    if run is not None:
        dataset, split = named_data(run, dataset, split)
    if dataset is None:
        raise UsageError("no collection is given; pass --dataset")
    collection = with_held_out(run, open_collection(dataset), split)
    full = EvalDataset(collection, chosen_split(collection, split))
    full.check_measures(settings)
    return StudyRow(FULL, FULL, [StudiedData(full, settings)])


def _of_member(member: Member, split: str | None, settings: EvalConfig) -> StudiedData:
    """The data of a collection of a suite, with its own settings."""
    own: dict[str, Any] = dict(member.settings)
    if unknown := sorted(own.keys() - set(OF_A_MEMBER)):
        raise UsageError(
            f"{member.name}: a study takes of a suite {', '.join(OF_A_MEMBER)}, not {unknown[0]}"
        )
    collection = open_collection(own.pop("dataset"))
    data = EvalDataset(collection, chosen_split(collection, own.pop("split", split)))
    settings = replace(settings, **own)
    data.check_measures(settings)
    return StudiedData(data, settings)


def _subset_row(full: StudyRow, spec: SubsetSpec, run: TrackedRun | None) -> StudyRow:
    published = run and partial(checkpoint_of_step, run)
    subsets = [
        StudiedData(data.on_subset(spec, settings, published=published), settings)
        for data, settings in full.members
    ]
    passages = sum(data.n_passages for data, _ in subsets)
    queries = sum(len(data.topics.queries) for data, _ in subsets)
    log.info("%s: %d passages, %d queries", spec.shown, passages, queries)
    return full._replace(name=spec.shown, slug=spec.slug, members=subsets)


def _estimating(row: StudyRow, spec: SubsetSpec) -> StudyRow:
    members = [StudiedData(data, settings.estimating(spec)) for data, settings in row.members]
    return row._replace(name=f"{row.name}, estimated", slug=f"{row.slug}-est", members=members)


def _other_row(name: str, full: StudyRow, settings: EvalConfig) -> StudyRow:
    members = suite_members(name) or [Member(name, {"dataset": name})]
    data = [_of_member(member, None, settings) for member in members]
    pairs = zip(full.members, data, strict=True)
    has_own_queries = not all(_texts(other) <= _texts(whole) for whole, other in pairs)
    return StudyRow(short_name(name), short_name(name), data, full.names, True, has_own_queries)


def _texts(studied: StudiedData) -> set[tuple[str, str]]:
    """Ids and texts of the queries that have values."""
    ids = set(studied.query_ids)
    return {query[:2] for query in studied.data.topics.queries if query.id in ids}


def member_curve(
    row: StudyRow, studied: StudiedData, values: np.ndarray, seconds: float
) -> SubsetCurve:
    """The curve of a row on one collection.

    Args:
        row: the row.
        studied: the collection's data.
        values: of each checkpoint, for each query and, of estimates, the ends of the interval.
        seconds: that one checkpoint takes.
    """
    ids = studied.query_ids
    return SubsetCurve(
        name=row.name,
        slug=row.slug,
        passages=studied.data.n_passages,
        query_ids=ids,
        values=values[:, : len(ids)],
        seconds=seconds,
        intervals=values[:, len(ids) :] if studied.settings.estimate else None,
        is_other=row.is_other,
        has_own_queries=row.has_own_queries,
    )


def suite_curve(row: StudyRow, curves: Sequence[SubsetCurve]) -> SubsetCurve:
    """The curve of the mean over the collections of a suite."""
    return replace(
        curves[0],
        passages=sum(curve.passages for curve in curves),
        query_ids=tuple(
            f"{name}/{query_id}"
            for name, curve in zip(row.names, curves, strict=True)
            for query_id in curve.query_ids
        ),
        values=np.hstack([curve.values for curve in curves]),
        seconds=sum(curve.seconds for curve in curves),
        sizes=tuple(len(curve.query_ids) for curve in curves),
    )
