"""What a study of fidelity has found: curves, how they agree, and which subset may be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mlflow_dr.fidelity.agreement import RESAMPLES, Agreement, Spread, agreement, means, spread

TOLERANCE = 0.005


@dataclass(frozen=True)
class Curve:
    """What one way of searching gave for every checkpoint.

    Attributes:
        name: the subset as it was asked for, or `full`.
        slug: its name in metrics and files.
        passages: how many it encodes.
        query_ids: of its queries.
        values: of each query, `(n_checkpoints, n_queries) float64`.
        seconds: of encoding, searching and measuring one checkpoint.
    """

    name: str
    slug: str
    passages: int
    query_ids: tuple[str, ...]
    values: np.ndarray
    seconds: float

    @cached_property
    def means(self) -> np.ndarray:
        """Of each checkpoint, `(n_checkpoints,) float64`."""
        return means(self.values)

    @cached_property
    def best(self) -> int:
        """The place of its best checkpoint; of equal ones the earliest."""
        return int(self.means.argmax())


@dataclass(frozen=True)
class Compared:
    """A subset beside the full corpus.

    Attributes:
        curve: what it gave.
        agreement: with the full corpus.
        share: its seconds by the full corpus's.
    """

    curve: Curve
    agreement: Agreement
    share: float


@dataclass(frozen=True)
class Findings:
    """What a study has found.

    Attributes:
        measure: by which checkpoints are ordered.
        collection: what was searched.
        split: whose queries were put.
        steps: of the checkpoints, ascending; equal ones do not occur.
        full: what the full corpus gave.
        subsets: what they gave, as they were asked for.
        spread: how far the checkpoints lie apart.
        tolerance: the regret that is accepted.
        skipped: why a step's checkpoint could not be studied.
    """

    measure: str
    collection: str
    split: str
    steps: tuple[int, ...]
    full: Curve
    subsets: tuple[Compared, ...]
    spread: Spread
    tolerance: float = TOLERANCE
    skipped: Mapping[int, str] = field(default_factory=dict)

    @property
    def trusted(self) -> list[Compared]:
        """The subsets that may stand for the full corpus; none where its curve is flat.

        Their regret is within the tolerance, and the lower end of tau's interval is above 0: an
        order that had nothing to do with the full corpus's is ruled out.
        """
        if self.spread.is_flat:
            return []
        return [
            one
            for one in self.subsets
            if one.agreement.regret.value <= self.tolerance and one.agreement.tau.low > 0
        ]

    @property
    def recommended(self) -> Compared | None:
        """The fastest subset that may be trusted, where it is faster than the full corpus."""
        faster = [one for one in self.trusted if one.share < 1]
        return min(faster, key=lambda one: one.curve.seconds, default=None)


def findings_of(
    measure: str,
    collection: str,
    split: str,
    steps: Sequence[int],
    curves: Sequence[Curve],
    tolerance: float = TOLERANCE,
    skipped: Mapping[int, str] | None = None,
    resamples: int = RESAMPLES,
) -> Findings:
    """Compare curves with the first of them, the full corpus's; arguments as of `Findings`.

    Args:
        measure: likewise.
        collection: likewise.
        split: likewise.
        steps: likewise.
        curves: the full corpus's, then those of subsets, whose queries are among its.
        tolerance: likewise.
        skipped: likewise.
        resamples: of the bootstrap.
    """
    full, *subsets = curves
    places = {query_id: place for place, query_id in enumerate(full.query_ids)}

    def compared(curve: Curve) -> Compared:
        own = np.array([places[query_id] for query_id in curve.query_ids], np.int64)
        found = agreement(full.values, curve.values, own, resamples)
        return Compared(curve, found, curve.seconds / full.seconds)

    return Findings(
        measure,
        collection,
        split,
        tuple(steps),
        full,
        tuple(map(compared, subsets)),
        spread(full.values, resamples),
        tolerance,
        skipped or {},
    )
