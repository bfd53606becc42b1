"""A study of fidelity: every checkpoint once on each corpus, and every subset read from that."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from mlflow_dr.cache import cache_entry, sound_entry
from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.collection.suites import short_name
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.engine import Engine
from mlflow_dr.engines.opening import device_names, open_engine
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.fidelity_study.agreement import FidelityResult, compare_curves
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fidelity_study.data import (
    StudiedData,
    StudyRow,
    member_curve,
    study_rows,
    suite_curve,
)
from mlflow_dr.files import digest_of
from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.encoders import load_checkpoint
from mlflow_dr.validation.evaluate import evaluate, evaluate_all
from mlflow_dr.validation.report import Report
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

    Each corpus is encoded once for each checkpoint, and every subset is read from that one pass.
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
        rows = study_rows(config, settings, run)
        study = _Study(rows, config, engine)
        values, skipped = study.all_values(chosen)
        left = [checkpoint for checkpoint in chosen if checkpoint.step in values]
        _check_count(len(left), f"{len(skipped)} could not be read")
        seconds = iter(study.seconds(left))
    by_data = (np.array(each) for each in zip(*values.values(), strict=True))
    curves = [
        [member_curve(row, data, next(by_data), next(seconds)) for data in row.members]
        for row in rows
    ]
    compare = partial(
        compare_curves,
        config.parsed_measure,
        steps=list(values),
        tolerance=config.tolerance,
        skipped=skipped,
        resamples=config.resamples,
    )
    full = rows[0]
    each = [
        compare(member.data.collection.name, member.data.split, curves=list(of_rows))
        for member, of_rows in zip(full.members, zip(*curves, strict=True), strict=True)
    ]
    if not full.names:
        return each[0]
    mean = compare(
        short_name(config.dataset or ""), "", curves=list(map(suite_curve, rows, curves))
    )
    return replace(mean, collections=dict(zip(full.names, each, strict=True)))


class _Study:
    """Measures checkpoints, and caches what it measured."""

    def __init__(self, rows: Sequence[StudyRow], config: FidelityConfig, engine: Engine) -> None:
        self._engine = engine
        studied = self._studied = [data for row in rows for data in row.members]
        self._n_full = len(rows[0].members)
        self._settings = studied[0].settings
        self._changes = config.encoder_changes
        self._measure = config.parsed_measure
        changes = sorted(config.encoder_changes.items())
        # values are in the order of the queries, which a collection's digest does not depend on
        self._data_keys = [
            digest_of(
                self._measure,
                own.dtype,
                own.keep_own_id,
                own.search_backend,
                [*changes, *own.prompts.items()],
                data.digest,
                digest_of(*each.query_ids),
                *data.answers_config(own).values(),
                *(["estimate"] if own.estimate else []),
            )
            for each in studied
            for data, own in [each]
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
            full_mean = fmean(values.mean() for values in by_step[step][: self._n_full])
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
        missing: dict[tuple[object, ...], list[int]] = {}  # one pass for each corpus
        for index, (values, (data, own)) in enumerate(zip(results, self._studied, strict=True)):
            if values is None:
                key = (data.corpus.digest, own.query_prompt, own.passage_prompt)
                missing.setdefault(key, []).append(index)
        if not missing:
            return [values for values in results if values is not None]
        encoder = load_checkpoint(checkpoint, self._changes)
        for indices in missing.values():
            pairs = [self._studied[index] for index in indices]
            reports = evaluate_all(encoder, pairs, False, self._engine)
            for index, report in zip(indices, reports, strict=True):
                values = self._values_of_report(report, self._studied[index])
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

    def _shortest(self, encoder: Encoder, studied: StudiedData) -> float:
        start = time.perf_counter()
        times: list[float] = []
        while not times or (
            len(times) < ENOUGH_TIMES and time.perf_counter() - start < ENOUGH_SECONDS
        ):
            times.append(evaluate(encoder, *studied, False, self._engine).seconds)
        return min(times)

    def _values_of_report(self, report: Report, studied: StudiedData) -> np.ndarray:
        per_query = report.per_query
        values = [per_query[query_id][self._measure] for query_id in studied.query_ids]
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
