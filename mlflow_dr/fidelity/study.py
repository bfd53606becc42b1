"""A study of fidelity: every checkpoint once on the full corpus, and every subset read from it."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlflow_dr.cache import cache_entry, sound_entry
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import chosen_split
from mlflow_dr.collection.jsonl import state_of
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.engines.devices import resolve_device, resolve_dtype
from mlflow_dr.errors import CheckpointError, UsageError
from mlflow_dr.fidelity.agreement import Curve, FidelityResult, compare_curves
from mlflow_dr.fidelity.config import FidelityConfig
from mlflow_dr.files import digest_of
from mlflow_dr.subsets.spec import FULL
from mlflow_dr.subsets.strategies import SubsetSources
from mlflow_dr.subsets.subset import make_subset
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_of_step
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import Report, evaluate, evaluate_all
from mlflow_dr.validation.resolve import named_data
from mlflow_dr.validation.validations import EvalConfig
from mlflow_dr.validation.worker import load_checkpoint

log = logging.getLogger(__name__)

FEWEST = 3  # of two checkpoints, any subset has the order right every other time
ENOUGH_SECONDS, ENOUGH_TIMES = 2.0, 3  # for a time that can be trusted


def study_fidelity(
    checkpoints: Sequence[Checkpoint], asked: FidelityConfig, run: TrackedRun | None = None
) -> FidelityResult:
    """Measure checkpoints on the full corpus and on subsets, and compare.

    The corpus is encoded once for each checkpoint, and every subset is read from that one pass.
    Values are kept in the user's cache as they are found, so that the same study, or one with
    another subset, goes on where it was interrupted. Seconds are measured on one checkpoint, the
    last one, on which the full corpus and each subset are validated by themselves.

    Args:
        checkpoints: what is studied, by step; of one step the last.
        asked: how.
        run: says what is searched where `asked` does not, and what `encoder:step-N` is.

    Raises:
        UsageError: fewer than three checkpoints, no such step, an unknown dataset or subset.
        DataError: the collection's files are damaged.
    """
    chosen = _chosen(checkpoints, asked)
    device = resolve_device(asked.device)
    dtype = resolve_dtype(asked.dtype, device)
    settings = EvalConfig((asked.parsed_measure,), None, str(device), dtype, asked.keep_own_id)
    prepared = _prepared(asked, settings, run)
    work = _Work(prepared, settings, asked)
    values, skipped = work.all_values(chosen)
    left = [one for one in chosen if one.step in values]
    _check_count(len(left), f"{len(skipped)} could not be read")
    seconds = work.seconds(left)
    curves = [
        Curve(
            name=one.subset.spec.shown if one.subset else FULL,
            slug=one.subset.spec.slug if one.subset else FULL,
            passages=one.n_passages,
            query_ids=tuple(one.topics.qrels),
            values=np.array([of_step[place] for of_step in values.values()]),
            seconds=seconds[place],
        )
        for place, one in enumerate(prepared)
    ]
    whole = prepared[0]
    return compare_curves(
        asked.parsed_measure,
        whole.collection.name,
        whole.split,
        list(values),
        curves,
        asked.tolerance,
        skipped,
        asked.resamples,
    )


class _Work:
    """What is done to checkpoints, and what is known of them already."""

    def __init__(
        self, prepared: Sequence[EvalDataset], settings: EvalConfig, asked: FidelityConfig
    ) -> None:
        self._prepared = prepared
        self._settings = settings
        self._changes = asked.encoder_changes
        self._measure = asked.parsed_measure
        said = sorted(asked.encoder_changes.items())
        common = (self._measure, settings.dtype, settings.keep_own_id, said)
        # values lie in the order of the queries, which a collection's digest does not tell
        of_each = [(one.digest, digest_of(*one.topics.qrels)) for one in prepared]
        self._kept = Kept([(*common, *digests) for digests in of_each])

    def all_values(
        self, checkpoints: Sequence[Checkpoint]
    ) -> tuple[dict[int, list[np.ndarray]], dict[int, str]]:
        """`values` of each checkpoint, by step; and why others have none."""
        found: dict[int, list[np.ndarray]] = {}
        skipped: dict[int, str] = {}
        for number, checkpoint in enumerate(checkpoints, start=1):
            step = checkpoint.step
            try:
                found[step] = self.values(checkpoint)
            except CheckpointError as error:
                skipped[step] = str(error)
                log.warning("step %d is passed over: %s", step, error)
                continue
            of_full = found[step][0].mean()
            log.info(
                "checkpoint %d of %d: step %d: %s %.4f on the full corpus",
                *(number, len(checkpoints), step, self._measure, of_full),
            )
        return found, skipped

    def values(self, checkpoint: Checkpoint) -> list[np.ndarray]:
        """Values of each query, of the full corpus and of each subset, `(n_queries,) float64`.

        Raises:
            CheckpointError: the checkpoint cannot be had, or gives NaN.
        """
        identity = _identity(checkpoint)
        known = self._kept.values(identity)
        missing = [place for place, values in enumerate(known) if values is None]
        if missing:
            pairs = [(self._prepared[place], self._settings) for place in missing]
            reports = evaluate_all(load_checkpoint(checkpoint, self._changes), pairs)
            for place, report in zip(missing, reports, strict=True):
                known[place] = self._of_queries(report, self._prepared[place])
            self._kept.keep(identity, known)
        return [values for values in known if values is not None]

    def seconds(self, checkpoints: Sequence[Checkpoint]) -> list[float]:
        """What the full corpus and each subset cost by themselves, on the last checkpoint.

        The first time is not counted: libraries are slower then. Times of a second or less are
        taken several times, and the shortest counts.

        Raises:
            UsageError: none of the checkpoints can be read any more.
        """
        for checkpoint in reversed(checkpoints):
            identity = f"{_identity(checkpoint)} on {self._settings.device}"
            if known := self._kept.seconds(identity):
                return known
            try:
                encoder = load_checkpoint(checkpoint, self._changes)
            except CheckpointError as error:
                log.warning("step %d cannot be timed: %s", checkpoint.step, error)
                continue
            log.info("timing the full corpus and each subset on step %d", checkpoint.step)
            smallest = min(self._prepared, key=lambda one: one.n_passages)
            evaluate(encoder, smallest, self._settings, quiet=True)
            seconds = [self._shortest(encoder, one) for one in self._prepared]
            self._kept.keep_seconds(identity, seconds)
            return seconds
        raise UsageError("none of the checkpoints can be read any more to be timed")

    def _shortest(self, encoder: Encoder, prepared: EvalDataset) -> float:
        start = time.perf_counter()
        found: list[float] = []
        while not found or (
            len(found) < ENOUGH_TIMES and time.perf_counter() - start < ENOUGH_SECONDS
        ):
            found.append(evaluate(encoder, prepared, self._settings).seconds)
        return min(found)

    def _of_queries(self, report: Report, prepared: EvalDataset) -> np.ndarray:
        per_query = report.per_query
        return np.array([per_query[one][self._measure] for one in prepared.topics.qrels])


def _chosen(checkpoints: Sequence[Checkpoint], asked: FidelityConfig) -> list[Checkpoint]:
    """Those that are asked for, by step, one of each."""
    of_steps = {one.step: one for one in checkpoints}
    if unknown := sorted(set(asked.steps) - set(of_steps)):
        there = ", ".join(map(str, sorted(of_steps))) or "none"
        raise UsageError(f"there is no checkpoint of step {unknown[0]}; there are {there}")
    steps = sorted(asked.steps or of_steps)
    chosen = [of_steps[step] for step in steps if step % asked.every == 0]
    _check_count(len(chosen), f"of {len(of_steps)} that are whole")
    return chosen


def _check_count(count: int, about: str) -> None:
    if count < FEWEST:
        raise UsageError(f"{count} checkpoints to study ({about}); an order needs {FEWEST} or more")


def _prepared(
    asked: FidelityConfig, settings: EvalConfig, run: TrackedRun | None
) -> list[EvalDataset]:
    """The full corpus, then each subset of it."""
    dataset, splits = asked.named_dataset()
    split = asked.split or next(iter(splits), None)
    if run is not None:
        dataset, split = named_data(run, dataset, split)
    if dataset is None:
        raise UsageError("which collection? Give --dataset")
    collection = open_collection(dataset)
    whole = EvalDataset(collection, chosen_split(collection, split))
    published = None if run is None else lambda step: checkpoint_of_step(run, step)
    sources = SubsetSources(
        whole.corpus,
        whole.topics,
        device=settings.device,
        dtype=settings.dtype,
        published=published,
    )
    prepared = [whole]
    for spec in asked.specs:
        subset = make_subset(spec, sources)
        log.info("%s: %d passages, %d queries", spec.shown, len(subset), len(subset.topics.queries))
        prepared.append(EvalDataset(collection, whole.split, whole.tokens, subset))
    return prepared


def _identity(checkpoint: Checkpoint) -> str:
    """What is equal for equal weights."""
    if checkpoint.manifest:
        return checkpoint.manifest
    paths = sorted(Path(checkpoint.directory).rglob("*"))
    return "\n".join(state_of(path) for path in paths if path.is_file())


KIND = "fidelity"
VALUES = "values.npy"
LAYOUT = 1


class Kept:
    """Entries of the cache, one for each checkpoint and strategy.

    Args:
        strategies: all that the values of each depend on, beside the checkpoint.
    """

    def __init__(self, strategies: Sequence[tuple[object, ...]]) -> None:
        self._strategies = strategies

    def values(self, checkpoint: str) -> list[np.ndarray | None]:
        """Values of each query by strategy, `(n_queries,) float64`; None where there are none.

        Args:
            checkpoint: names its weights.
        """
        return [_read(key) for key in self._keys(checkpoint)]

    def keep(self, checkpoint: str, values: Sequence[np.ndarray | None]) -> None:
        """Keep what is known of a checkpoint."""
        for key, of_strategy in zip(self._keys(checkpoint), values, strict=True):
            if of_strategy is not None:
                _keep(key, of_strategy)

    def seconds(self, where: str) -> list[float]:
        """What each strategy cost; empty unless these were timed together, on this machine.

        Args:
            where: names the checkpoint and the device.
        """
        found = _read(self._timed(where))
        return [] if found is None else found.tolist()

    def keep_seconds(self, where: str, seconds: Sequence[float]) -> None:
        """Keep what each strategy cost."""
        _keep(self._timed(where), np.array(seconds))

    def _keys(self, checkpoint: str) -> list[str]:
        return [digest_of(LAYOUT, "values", checkpoint, *one) for one in self._strategies]

    def _timed(self, where: str) -> str:
        return digest_of(LAYOUT, "seconds", platform.node(), where, *self._strategies)


def _read(key: str) -> np.ndarray | None:
    entry = sound_entry(KIND, key)
    return None if entry is None else np.load(entry / VALUES)


def _keep(key: str, values: np.ndarray) -> None:
    def write(partial: Path) -> None:
        partial.mkdir()
        np.save(partial / VALUES, values)

    cache_entry(KIND, key, write)
