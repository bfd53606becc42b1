"""The words for a subset: `bm25@50+random:10000`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.files import digest_of, is_path

FULL, RANDOM, RANKING, BM25, POOL = "full", "random", "ranking", "bm25", "pool"
ENCODER, RERANK, QUERIES = "encoder", "rerank", "queries"
FORMS = {
    FULL: "full",
    RANDOM: "random:N",
    RANKING: "ranking:FILE@K",
    BM25: "bm25@K",
    POOL: "pool:FILE,FILE@K",
    ENCODER: "encoder:NAME@K",
    RERANK: "rerank:FILE@K",
    QUERIES: "queries:N",
}
# a plus sign in the name of a file joins nothing
JOINT = re.compile(r"\+(?=(?:full$|full\+|bm25@|(?:random|ranking|pool|encoder|rerank|queries):))")
STEP = re.compile(r"step-(\d{1,18})")
LONGEST_SLUG = 100
MOST_DIGITS = 12  # of a number of passages or queries
RELEVANT, ALL = "relevant", "all"


@dataclass(frozen=True)
class SubsetTerm:
    """One sampling strategy.

    Attributes:
        kind: one of those above.
        count: N or K; 0 for `full`.
        names: the files, or the encoder.
    """

    kind: str
    count: int = 0
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As it is written, with whole paths."""
        return self._written(self.names, ",", ":", "@")

    @property
    def shown(self) -> str:
        """As it is written, without the folders of files, which differ between machines."""
        return self._written(tuple(map(_last, self.names)), ",", ":", "@")

    @property
    def slug(self) -> str:
        """For names of metrics and files."""
        names = tuple(_last(name).partition(".")[0] for name in self.names)
        return re.sub(r"[^\w\-]", "_", self._written(names, "_", "_", "_at_"))

    @property
    def step(self) -> int | None:
        """The training step of `encoder:step-N`, a checkpoint of the run itself."""
        found = STEP.fullmatch(self.names[0]) if self.kind == ENCODER else None
        return int(found[1]) if found else None

    def _written(self, names: Sequence[str], comma: str, colon: str, at: str) -> str:
        if self.kind == FULL:
            return FULL
        if self.kind in (RANDOM, QUERIES):
            return f"{self.kind}{colon}{self.count}"
        listed = f"{colon}{comma.join(names)}" if names else ""
        return f"{self.kind}{listed}{at}{self.count}"


@dataclass(frozen=True)
class SubsetSpec:
    """A subset as it was asked for; equal for what is asked for in words of equal meaning.

    Attributes:
        parts: what is joined.
        seed: of what is drawn by lot; 0 where nothing is.
        judged: which judged passages are always in: the `relevant` ones, or `all`; `relevant` where
            the whole corpus is searched.
    """

    terms: tuple[SubsetTerm, ...] = (SubsetTerm(FULL),)
    seed: int = 0
    judged: str = RELEVANT

    def __post_init__(self) -> None:
        if not self._by_lot:
            object.__setattr__(self, "seed", 0)
        if self.is_full:
            object.__setattr__(self, "judged", RELEVANT)

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @property
    def shown(self) -> str:
        """In words that are the same on every machine."""
        text = "+".join(part.shown for part in self.terms)
        text += f", seed {self.seed}" if self.seed else ""
        return text + (", all judged" if self.judged == ALL else "")

    @property
    def slug(self) -> str:
        """For names of metrics and files; empty for the whole corpus and all queries."""
        if self.terms == (SubsetTerm(FULL),):
            return ""
        slug = "-".join(part.slug for part in self.terms)
        slug += f"-seed_{self.seed}" if self.seed else ""
        slug += "-all_judged" if self.judged == ALL else ""
        if len(slug) > LONGEST_SLUG:
            slug = f"{slug[: LONGEST_SLUG - 10]}-{digest_of(slug)[:8]}"
        return slug

    @property
    def is_full(self) -> bool:
        """Whether the whole corpus is searched."""
        return any(part.kind == FULL for part in self.terms)

    @property
    def n_queries(self) -> int | None:
        """How many queries are drawn; None for all."""
        return next((part.count for part in self.terms if part.kind == QUERIES), None)

    @property
    def candidates(self) -> SubsetTerm | None:
        """The part that gives each query its own candidates."""
        return next((part for part in self.terms if part.kind == RERANK), None)

    @property
    def _by_lot(self) -> bool:
        return any(part.kind in (RANDOM, QUERIES) for part in self.terms)


def parse_subset(text: str, seed: int = 0, judged: str = RELEVANT) -> SubsetSpec:
    """A subset from words such as `bm25@50+random:10000`.

    Args:
        text: strategies joined by `+`.
        seed: of what is drawn by lot.
        judged: which judged passages are always in: the `relevant` ones, or `all`.

    Raises:
        UsageError: what cannot be understood, and what can.
    """
    parts = [_part(one, text) for one in JOINT.split(text.strip())]
    if judged not in (RELEVANT, ALL):
        raise UsageError(f"judged is {judged!r}; expected {RELEVANT} or {ALL}")
    kinds = [part.kind for part in parts]
    if len(set(map(str, parts))) < len(parts) or kinds.count(QUERIES) > 1:
        raise UsageError(f"subset {text!r} names one thing twice")
    if all(kind == QUERIES for kind in kinds):
        parts.insert(0, SubsetTerm(FULL))
    passages = [kind for kind in kinds if kind != QUERIES]
    for alone in (FULL, RERANK):
        if alone in passages and len(passages) > 1:
            why = "is the whole corpus" if alone == FULL else "gives each query its own passages"
            raise UsageError(f"subset {text!r}: {alone} {why}; it joins with {FORMS[QUERIES]} only")
    return SubsetSpec(tuple(parts), seed, judged)


def _part(text: str, whole: str) -> SubsetTerm:
    kind = re.split("[:@]", text, maxsplit=1)[0]
    rest = text[len(kind) :]
    if kind == FULL and not rest:
        return SubsetTerm(FULL)
    if kind in (RANDOM, QUERIES) and rest.startswith(":"):
        return SubsetTerm(kind, _count(rest[1:], text))
    if kind == BM25 and rest.startswith("@"):
        return SubsetTerm(kind, _count(rest[1:], text))
    if kind in (RANKING, POOL, ENCODER, RERANK) and rest.startswith(":"):
        name, at, count = rest[1:].rpartition("@")
        names = tuple(name.split(",")) if kind == POOL else (name,)
        if at and all(names):
            return SubsetTerm(kind, _count(count, text), tuple(map(_whole, names)))
    forms = ", ".join(FORMS.values())
    of = "" if text == whole else f" in {quoted(whole)}"
    near = "" if kind in FORMS else did_you_mean(kind, FORMS)
    expected = FORMS.get(kind) or f"one of {forms}"
    raise UsageError(f"subset {quoted(text)}{of}: expected {expected}{near}")


def _count(text: str, part: str) -> int:
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) == 0:
        raise UsageError(
            f"subset {quoted(part)}: {quoted(text)} is not a whole number above 0, of at most "
            f"{MOST_DIGITS} digits"
        )
    return int(text)


def _whole(name: str) -> str:
    """The whole path of what is a file or folder here, so that it is found from other folders."""
    return str(Path(name).expanduser().absolute()) if is_path(name) else name


def _last(name: str) -> str:
    """The last part of a path or hub name."""
    return name.rstrip("/").rpartition("/")[2] or name
