"""In which order checkpoints are validated."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import Enum


class Order(Enum):
    """What comes first.

    `bisect` takes the newest, and then whatever lies farthest from all that are taken, so that a
    validator that cannot keep up refines the curve evenly.
    """

    OLDEST = "oldest"
    NEWEST = "newest"
    BISECT = "bisect"


def in_order(waiting: Sequence[int], taken: Sequence[int], order: Order) -> Iterator[int]:
    """The steps that wait, the one to be validated next first.

    Args:
        waiting: steps, ascending.
        taken: steps that are validated, or that another validator is at; ascending.
        order: what comes first.
    """
    if order is not Order.BISECT:
        yield from waiting if order is Order.OLDEST else reversed(waiting)
        return
    left, points = list(waiting), list(taken)
    while left:
        step = left[-1] if not points else max(left, key=lambda one: (_distance(one, points), one))
        yield step
        left.remove(step)
        points.insert(bisect_left(points, step), step)


def _distance(step: int, points: Sequence[int]) -> int:
    """To the nearest of some ascending points."""
    place = bisect_left(points, step)
    return min(abs(step - point) for point in points[max(0, place - 1) : place + 1])
