"""Whose turn a checkpoint is, among validators that choose from the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

from mlflow_dr.tracking.checkpoints import Checkpoint
from mlflow_dr.tracking.claims import Owner, latest_claim

SECONDS_REMEMBERED = 120.0
CHOSEN_AMONG = 4  # checkpoints for each validator at work


class Turns:
    """Keeps validators that choose among the same checkpoints out of each other's way.

    A claim that is lost costs requests. Each of m validators at work prefers those of the next few
    checkpoints whose place among all is its own number modulo m. Nobody assigns it: it is the
    place of its token among the tokens that were seen in claims lately.

    Args:
        token: our own.
        clock: seconds that pass.
    """

    def __init__(self, token: str, clock: Callable[[], float]) -> None:
        self._token = token
        self._clock = clock
        self._claims_seen: dict[tuple[str, str], int] = {}
        self._last_seen: dict[str, float] = {}

    def see(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Learn from a checkpoint who is at work."""
        for name in names:
            claim, key = latest_claim(checkpoint, name), (checkpoint.model_id, name)
            if claim is None or claim.owner is None or self._claims_seen.get(key) == claim.attempt:
                continue
            self._claims_seen[key] = claim.attempt
            if not claim.given_back and not claim.owner.is_dead:
                self.note(claim.owner)

    def note(self, owner: Owner) -> None:
        """This validator is at work."""
        self._last_seen[owner.token] = self._clock()

    def tokens(self) -> list[str]:
        """Of the validators at work, this one included, in their order."""
        since = self._clock() - SECONDS_REMEMBERED
        others = {token for token, seen in self._last_seen.items() if seen >= since}
        return sorted(others | {self._token})

    def ours_first(
        self, ordered: Iterator[Checkpoint], everything: Sequence[Checkpoint], tried: int = 0
    ) -> Iterator[Checkpoint]:
        """Of the next few, our own before those of others; then the rest as it is ordered.

        Args:
            ordered: what is free, the next one first.
            everything: all checkpoints; a place among these makes one ours.
            tried: how many we have taken since these were seen; others took about as many each.
        """
        tokens = self.tokens()
        if len(tokens) == 1:
            yield from ordered
            return
        number = tokens.index(self._token)
        places = {one.model_id: place for place, one in enumerate(everything)}
        few = list(islice(ordered, (CHOSEN_AMONG + tried) * len(tokens)))
        ours = [one for one in few if places[one.model_id] % len(tokens) == number]
        left = [one for one in few if places[one.model_id] % len(tokens) != number]
        random.shuffle(left)
        yield from chain(ours, left, ordered)
