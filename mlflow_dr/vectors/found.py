"""What a search found, as the command line and a notebook show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlflow_dr import pages
from mlflow_dr.retrieval.measures import Measure
from mlflow_dr.terminal import in_columns, printable

if TYPE_CHECKING:
    import pandas as pd

LONGEST_TEXT = 100  # of a passage, in a line


class Hit(NamedTuple):
    """A passage that was found for a question; without texts if no collection has them."""

    question: str
    rank: int
    score: float
    id: str
    title: str
    text: str


class Found(NamedTuple):
    """What a search found.

    Attributes:
        measures: mean values over queries; empty if there are no judgements.
        queries: how many were searched for.
        passages: how many were searched.
        hits: the passages of each question, the best first; empty for queries of a split.
    """

    measures: dict[Measure, float]
    queries: int
    passages: int
    hits: Sequence[Hit] = ()

    def frame(self) -> pd.DataFrame:
        """A row for each passage of each question, or else for each measure."""
        import pandas as pd

        if self.hits:
            return pd.DataFrame(self.hits, columns=Hit._fields)
        return pd.DataFrame(self.measures.items(), columns=["measure", "mean"])

    def __repr__(self) -> str:
        lines = [f"{name}\t{value:.4f}" for name, value in self.measures.items()]
        return hits_text(self) if self.hits else "\n".join([*lines, f"{self.queries} queries"])

    def _repr_html_(self) -> str:
        if not self.hits:
            return pages.table(("measure", "mean"), self.measures.items())
        return "\n".join(
            pages.paragraph(question)
            + pages.table(Hit._fields[1:], [hit[1:] for hit in self.hits if hit[0] == question])
            for question in dict.fromkeys(hit.question for hit in self.hits)
        )


def hits_text(found: Found) -> str:
    """The passages that were found, a line for each, below their questions."""
    lines: list[str] = []
    for question in dict.fromkeys(hit.question for hit in found.hits):
        hits = [hit for hit in found.hits if hit.question == question]
        texts = (printable(f"{hit.title} {hit.text}".strip())[:LONGEST_TEXT] for hit in hits)
        rows = [
            (str(hit.rank), f"{hit.score:.4f}", hit.id, text)
            for hit, text in zip(hits, texts, strict=True)
        ]
        lines += [printable(question), in_columns(rows)]
    return "\n".join(lines)
