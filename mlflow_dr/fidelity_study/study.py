"""A study of fidelity: every checkpoint once on the full corpus, and every subset read from it."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlflow_dr.cache import cache_entry, sound_entry
from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import Engine
from mlflow_dr.engines.opening import device_names, open_engine
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.fidelity_study.agreement import FidelityResult, SubsetCurve, compare_curves
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.files import digest_of
from mlflow_dr.subsets.spec import FULL
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_of_step
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.encoders import load_checkpoint
from mlflow_dr.validation.evaluate import Report, evaluate, evaluate_all
from mlflow_dr.validation.resolve import named_data, with_held_out
from mlflow_dr.validation.validations import EvalConfig

log = logging.getLogger(__name__)

FEWEST = 3  # with two checkpoints, any subset orders them correctly every other time
ENOUGH_SECONDS, ENOUGH_TIMES = 2.0, 3  # repeats until a measured time is reliable
CACHE_KIND, VALUES = "fidelity", "values.npy"
LAYOUT = 1


def study_fidelity(
    checkpoints: Sequence[Checkpoint], config: FidelityConfig, run: TrackedRun | None = None
) -> FidelityResult:
    """Measure checkpoints on the full corpus and on subsets, and compare.

    The corpus is encoded once for each checkpoint, and every subset is read from that one pass.
    Values are cached at once, so that an interrupted study, or one with another subset, resumes
    where it left off. Times are measured on the last checkpoint, on which the full corpus and each
    subset are validated separately.

    Args:
        checkpoints: the last one of each step is studied.
        config: subsets, measure and what else is studied.
        run: gives the collection if `config` does not, and the checkpoints of `encoder:step-N`.

    Raises:
        UsageError: fewer than three checkpoints, no such step, an unknown dataset or subset.
        DataError: the collection's files are damaged.
    """
    chosen = _chosen(checkpoints, config)
    device = device_names(config.engine, config.device)
    with closing(open_engine(config.engine, device)) as engine:
        settings = EvalConfig(
            (config.parsed_measure,),
            None,
            device,
            engine.resolve_dtype(config.dtype),
            config.keep_own_id,
            config.search_backend,
            config.engine,
            config.match,
        )
        studied = _studied(config, settings, run)
        study = _Study(studied, config, engine)
        values, skipped = study.all_values(chosen)
        left = [checkpoint for checkpoint in chosen if checkpoint.step in values]
        _check_count(len(left), f"{len(skipped)} could not be read")
        seconds = study.seconds(left)
    curves = [
        _curve(*pair, np.array([of_step[index] for of_step in values.values()]), seconds[index])
        for index, pair in enumerate(studied)
    ]
    full = studied[0].data
    return compare_curves(
        config.parsed_measure,
        full.collection.name,
        full.split,
        list(values),
        curves,
        config.tolerance,
        skipped,
        config.resamples,
    )


class _Studied(NamedTuple):
    """The full corpus or a subset, and whether values are estimated from it."""

    data: EvalDataset
    settings: EvalConfig


def _curve(
    data: EvalDataset, settings: EvalConfig, values: np.ndarray, seconds: float
) -> SubsetCurve:
    """The curve of what `_Study.values` has given for each checkpoint."""
    ids = _query_ids(data)
    spec = data.subset.spec if data.subset else None
    return SubsetCurve(
        name=(f"{spec.shown}, estimated" if settings.estimate else spec.shown) if spec else FULL,
        slug=(f"{spec.slug}-est" if settings.estimate else spec.slug) if spec else FULL,
        passages=data.n_passages,
        query_ids=ids,
        values=values[:, : len(ids)],
        seconds=seconds,
        intervals=values[:, len(ids) :] if settings.estimate else None,
    )


class _Study:
    """Measures checkpoints, and caches what it measured."""

    def __init__(self, studied: Sequence[_Studied], config: FidelityConfig, engine: Engine) -> None:
        self._engine = engine
        self._studied = studied
        settings = self._settings = studied[0].settings
        self._changes = config.encoder_changes
        self._measure = config.parsed_measure
        changes = sorted(config.encoder_changes.items())
        common = (
            self._measure,
            settings.dtype,
            settings.keep_own_id,
            settings.search_backend,
            changes,
        )
        # values are in the order of the queries, which a collection's digest does not depend on
        self._data_keys = [
            digest_of(
                *common,
                data.digest,
                digest_of(*_query_ids(data)),
                *data.answers_config(settings).values(),
                *(["estimate"] if own.estimate else []),
            )
            for data, own in studied
        ]

    def all_values(
        self, checkpoints: Sequence[Checkpoint]
    ) -> tuple[dict[int, list[np.ndarray]], dict[int, str]]:
        """`values` of each checkpoint, by step, and the reasons why others have none."""
        by_step: dict[int, list[np.ndarray]] = {}
        skipped: dict[int, str] = {}
        for number, checkpoint in enumerate(checkpoints, start=1):
            step = checkpoint.step
            try:
                by_step[step] = self.values(checkpoint)
            except CheckpointError as error:
                skipped[step] = str(error)
                log.warning("step %d is passed over: %s", step, error)
                continue
            full_mean = by_step[step][0].mean()
            log.info(
                "checkpoint %d of %d: step %d: %s %.4f on the full corpus",
                *(number, len(checkpoints), step, self._measure, full_mean),
            )
        return by_step, skipped

    def values(self, checkpoint: Checkpoint) -> list[np.ndarray]:
        """Values of each query, of the full corpus and of each subset, `(n_queries,) float64`.

        Those of estimates are followed by the two ends of the interval of their mean.

        Raises:
            CheckpointError: the checkpoint cannot be read, or gives NaN.
        """
        identity = _identity(checkpoint)
        keys = [digest_of(LAYOUT, "values", identity, data_key) for data_key in self._data_keys]
        results = [cached_array(key) for key in keys]
        missing = [index for index, values in enumerate(results) if values is None]
        if missing:
            pairs = [self._studied[index] for index in missing]
            reports = evaluate_all(
                load_checkpoint(checkpoint, self._changes), pairs, False, self._engine
            )
            for index, report in zip(missing, reports, strict=True):
                values = self._values_of_report(report, self._studied[index].data)
                results[index] = values
                store_array(keys[index], values)
        return [values for values in results if values is not None]

    def seconds(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        """Seconds of the full corpus and of each subset, each validated on the last checkpoint.

        A first evaluation, in which libraries are slower, is not counted. Times of a second or
        less are measured several times, and the shortest counts.

        Raises:
            UsageError: none of the checkpoints can be read any more.
        """
        for checkpoint in reversed(checkpoints):
            machine = (platform.node(), self._settings.engine, self._settings.device)
            key = digest_of(LAYOUT, "seconds", *machine, _identity(checkpoint), *self._data_keys)
            if (cached := cached_array(key)) is not None:
                return list(map(float, cached))
            try:
                encoder = load_checkpoint(checkpoint, self._changes)
            except CheckpointError as error:
                log.warning("step %d cannot be timed: %s", checkpoint.step, error)
                continue
            log.info("timing the full corpus and each subset on step %d", checkpoint.step)
            smallest = min(self._studied, key=lambda each: each.data.n_passages)
            evaluate(encoder, *smallest, True, self._engine)
            seconds = [self._shortest(encoder, each) for each in self._studied]
            store_array(key, np.array(seconds))
            return seconds
        raise UsageError("none of the checkpoints can be read any more to be timed")

    def _shortest(self, encoder: Encoder, studied: _Studied) -> float:
        start = time.perf_counter()
        times: list[float] = []
        while not times or (
            len(times) < ENOUGH_TIMES and time.perf_counter() - start < ENOUGH_SECONDS
        ):
            times.append(evaluate(encoder, *studied, False, self._engine).seconds)
        return min(times)

    def _values_of_report(self, report: Report, data: EvalDataset) -> np.ndarray:
        per_query = report.per_query
        values = [per_query[query_id][self._measure] for query_id in _query_ids(data)]
        interval = report.intervals.get(self._measure)
        return np.array([*values, *(interval[1:] if interval else ())])


def _chosen(checkpoints: Sequence[Checkpoint], config: FidelityConfig) -> list[Checkpoint]:
    """The checkpoints to study, by step, one per step."""
    by_step = {checkpoint.step: checkpoint for checkpoint in checkpoints}
    if unknown := sorted(set(config.steps) - set(by_step)):
        available = ", ".join(map(str, sorted(by_step))) or "none"
        raise UsageError(f"there is no checkpoint of step {unknown[0]}; there are {available}")
    steps = sorted(config.steps or by_step)
    chosen = [by_step[step] for step in steps if step % config.every == 0]
    _check_count(len(chosen), f"of {len(by_step)} that are complete")
    return chosen


def _check_count(count: int, about: str) -> None:
    if count < FEWEST:
        raise UsageError(f"{count} checkpoints to study ({about}); an order needs {FEWEST} or more")


def _studied(
    config: FidelityConfig, settings: EvalConfig, run: TrackedRun | None
) -> list[_Studied]:
    """The full corpus, then each subset of it, and the estimates from those with a sample."""
    dataset, splits = config.named_dataset()
    split = config.split or next(iter(splits), None)
    if run is not None:
        dataset, split = named_data(run, dataset, split)
    if dataset is None:
        raise UsageError("no collection is given; pass --dataset")
    collection = with_held_out(run, open_collection(dataset), split)
    full = EvalDataset(collection, chosen_split(collection, split))
    full.check_measures(settings)
    published = run and partial(checkpoint_of_step, run)
    studied = [_Studied(full, settings)]
    for spec in config.specs:
        data = full.on_subset(spec, settings, published=published)
        queries = len(data.topics.queries)
        log.info("%s: %d passages, %d queries", spec.shown, data.n_passages, queries)
        studied.append(_Studied(data, settings))
        if config.estimate and spec.sample:
            studied.append(_Studied(data, settings.estimating(spec)))
    return studied


def _query_ids(data: EvalDataset) -> tuple[str, ...]:
    topics = data.topics
    return tuple(topics.qrels or (query.id for query in topics.queries))


def _identity(checkpoint: Checkpoint) -> str:
    """A text that is equal for equal weights."""
    if checkpoint.manifest:
        return checkpoint.manifest
    paths = sorted(Path(checkpoint.directory).rglob("*"))
    return "\n".join(state_of(path) for path in paths if path.is_file())


def cached_array(key: str) -> np.ndarray | None:
    """Values or times of a study in the user's cache; None where none are cached."""
    entry = sound_entry(CACHE_KIND, key)
    return None if entry is None else np.load(entry / VALUES)


def store_array(key: str, values: np.ndarray) -> None:
    """Store values or times of a study in the user's cache."""

    def write(partial: Path) -> None:
        partial.mkdir()
        np.save(partial / VALUES, values)

    cache_entry(CACHE_KIND, key, write)
