"""How a subset is written: `bm25@50+random:10000`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow_dr.errors import UsageError, did_you_mean, quoted
from mlflow_dr.files import digest_of, is_path
from mlflow_dr.subsets.strategies import SUBSET_STRATEGIES, SubsetStrategy

FULL = "full"
STEP = re.compile(r"step-(\d{1,18})")
LONGEST_SLUG = 100
MOST_DIGITS = 12  # of a number of passages or queries
PERCENT = re.compile(r"\d{1,3}(?:\.\d{1,6})?%")
RELEVANT, ALL = "relevant", "all"
AUTO = "auto"


@dataclass(frozen=True)
class SubsetTerm:
    """One strategy with its arguments, such as `ranking:FILE@50`.

    Attributes:
        name: the strategy's.
        count: N or K; 0 for a strategy without, and where a share is given.
        arguments: the texts between `:` and `@`, such as files, or an encoder.
        percent: N as a share of all, above 0 and up to 100; 0 where a number is given. If both are
            0, as in `random:auto`, the size is still to be chosen.
    """

    name: str
    count: int = 0
    arguments: tuple[str, ...] = ()
    percent: float = 0.0

    def __str__(self) -> str:
        """As it is written, with absolute paths."""
        return self._written(self.arguments, ",", ":", "@")

    @property
    def shown(self) -> str:
        """As it is written, without the folders of files, which differ between machines."""
        return self._written(tuple(map(_last, self.arguments)), ",", ":", "@")

    @property
    def slug(self) -> str:
        """For names of metrics and files."""
        arguments = tuple(_last(name).partition(".")[0] for name in self.arguments)
        text = self._written(arguments, "_", "_", "_at_").replace("%", "_percent")
        return re.sub(r"[^\w\-]", "_", text)

    @property
    def strategy(self) -> SubsetStrategy:
        """The strategy that the term names.

        Raises:
            UsageError: there is none of that name.
        """
        return SUBSET_STRATEGIES.get(self.name)

    @property
    def step(self) -> int | None:
        """The training step of `encoder:step-N`, a checkpoint of the run itself."""
        match = STEP.fullmatch(self.arguments[0]) if self.name == "encoder" else None
        return int(match[1]) if match else None

    def count_of(self, total: int) -> int:
        """N, as a number of things of which there are `total`; of a share at least 1.

        Raises:
            UsageError: the size was not chosen.
        """
        if self.is_auto:
            raise UsageError(f"subset {self}: use it with --estimate and --target-error")
        return self.count if self.count else max(1, round(total * self.percent / 100))

    @property
    def is_auto(self) -> bool:
        """Whether this is a sample whose size is still to be chosen."""
        return self.strategy.takes_share and not (self.count or self.percent)

    def _written(self, arguments: tuple[str, ...], comma: str, colon: str, at: str) -> str:
        if self.percent or self.is_auto:
            return f"{self.name}{colon}{f'{self.percent:.10g}%' if self.percent else AUTO}"
        if not self.count:
            return self.name
        if arguments:
            return f"{self.name}{colon}{comma.join(arguments)}{at}{self.count}"
        return f"{self.name}{colon if self.strategy.separator == ':' else at}{self.count}"


@dataclass(frozen=True)
class SubsetSpec:
    """A subset as it was requested; equal requests are equal, however they are written.

    Attributes:
        terms: strategies whose passages are joined.
        seed: random seed; 0 if no strategy uses one.
        judged: which judged passages are always included: the `relevant` ones, or `all`;
            `relevant` if the whole corpus is searched.
    """

    terms: tuple[SubsetTerm, ...] = (SubsetTerm(FULL),)
    seed: int = 0
    judged: str = RELEVANT

    def __post_init__(self) -> None:
        if not any(term.strategy.uses_seed for term in self.terms):
            object.__setattr__(self, "seed", 0)
        if self.is_full:
            object.__setattr__(self, "judged", RELEVANT)

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    @property
    def shown(self) -> str:
        """The request in a form that is the same on every machine."""
        text = "+".join(term.shown for term in self.terms)
        text += f", seed {self.seed}" if self.seed else ""
        return text + (", all judged" if self.judged == ALL else "")

    @property
    def slug(self) -> str:
        """For names of metrics and files; empty for the whole corpus and all queries."""
        if self.terms == (SubsetTerm(FULL),):
            return ""
        slug = "-".join(term.slug for term in self.terms)
        slug += f"-seed_{self.seed}" if self.seed else ""
        slug += "-all_judged" if self.judged == ALL else ""
        if len(slug) > LONGEST_SLUG:
            slug = f"{slug[: LONGEST_SLUG - 10]}-{digest_of(slug)[:8]}"
        return slug

    @property
    def is_full(self) -> bool:
        """Whether the whole corpus is searched."""
        return self.term_that_chooses("corpus") is not None

    @property
    def sample(self) -> SubsetTerm | None:
        """The term that draws passages at random, from which values can be estimated."""
        drawn = (term for term in self.terms if term.strategy.takes_share)
        return next((term for term in drawn if term.strategy.chooses == "passages"), None)

    def check_estimable(self) -> None:
        """Refuse a subset from which values on the full corpus cannot be estimated.

        Raises:
            UsageError: the subset has no random sample, or something else that forbids it.
        """
        why = ""
        if self.term_that_chooses("candidates"):
            why = "each query ranks its own passages only, so nothing is left to estimate"
        elif self.term_that_chooses("queries"):
            why = "an estimate is of all queries; leave out queries:N"
        elif self.sample is None:
            why = "an estimate needs a random sample, such as random:5%"
        if why:
            raise UsageError(f"subset {self.shown}: {why}")

    def sized(self, percent: float) -> SubsetSpec:
        """The same subset with a sample of this size in place of `random:auto`."""
        terms = [replace(term, percent=percent) if term.is_auto else term for term in self.terms]
        return replace(self, terms=tuple(terms))

    def term_that_chooses(self, what: str) -> SubsetTerm | None:
        """The first term whose strategy chooses `passages`, `candidates`, `queries` or `corpus`."""
        return next((term for term in self.terms if term.strategy.chooses == what), None)


def parse_subset(text: str, seed: int = 0, judged: str = RELEVANT) -> SubsetSpec:
    """A subset from text such as `bm25@50+random:10000`.

    Args:
        text: terms joined by `+`; the forms are those of the registered strategies.
        seed: random seed.
        judged: which judged passages are always included: the `relevant` ones, or `all`.

    Raises:
        UsageError: the text is not a subset; the message names the forms.
    """
    terms = [_term(written, text) for written in _split(text.strip())]
    if judged not in (RELEVANT, ALL):
        raise UsageError(f"judged is {judged!r}; expected {RELEVANT} or {ALL}")
    chosen = [term.strategy.chooses for term in terms]
    if len(set(map(str, terms))) < len(terms) or chosen.count("queries") > 1:
        raise UsageError(f"subset {text!r} names one thing twice")
    if all(what == "queries" for what in chosen):
        terms.insert(0, SubsetTerm(FULL))
    for term, what in zip(terms, chosen, strict=False):
        if what in ("corpus", "candidates") and len(terms) - chosen.count("queries") > 1:
            why = "is the whole corpus" if what == "corpus" else "gives each query its own passages"
            raise UsageError(f"subset {text!r}: {term.name} {why}; it joins with queries:N only")
    return SubsetSpec(tuple(terms), seed, judged)


def _split(text: str) -> list[str]:
    """Terms between plus signs; a plus sign in the name of a file separates nothing."""
    terms: list[str] = []
    for piece in text.split("+"):
        if terms and not _begins_term(piece):
            terms[-1] += f"+{piece}"
        else:
            terms.append(piece)
    return terms


def _begins_term(piece: str) -> bool:
    name = re.split("[:@]", piece, maxsplit=1)[0]
    if name not in SUBSET_STRATEGIES:
        return False
    separator = SUBSET_STRATEGIES.get(name).separator
    return piece[len(name) : len(name) + 1] == separator


def _term(text: str, subset: str) -> SubsetTerm:
    name = re.split("[:@]", text, maxsplit=1)[0]
    rest = text[len(name) + 1 :]
    if _begins_term(text):
        strategy = SUBSET_STRATEGIES.get(name)
        if not strategy.separator:
            return SubsetTerm(name)
        if rest == AUTO and strategy.takes_share and strategy.chooses == "passages":
            return SubsetTerm(name)
        if rest.endswith("%") and strategy.takes_share:
            return SubsetTerm(name, percent=_percent(rest, text))
        if not strategy.argument_form:
            return SubsetTerm(name, _count(rest, text))
        argument, at, count = rest.rpartition("@")
        several = "," in strategy.argument_form
        arguments = tuple(argument.split(",")) if several else (argument,)
        if at and all(arguments):
            return SubsetTerm(name, _count(count, text), tuple(map(_absolute, arguments)))
    within = "" if text == subset else f" in {quoted(subset)}"
    if name in SUBSET_STRATEGIES:
        expected, near = SUBSET_STRATEGIES.get(name).form, ""
    else:
        names = SUBSET_STRATEGIES.names()
        expected = f"one of {', '.join(map(_form, names))}"
        near = did_you_mean(name, names)
    raise UsageError(f"subset {quoted(text)}{within}: expected {expected}{near}")


def _form(name: str) -> str:
    try:
        return SUBSET_STRATEGIES.get(name).form
    except UsageError:  # its package cannot be imported
        return name


def _count(text: str, term: str) -> int:
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) == 0:
        raise UsageError(
            f"subset {quoted(term)}: {quoted(text)} is not a whole number above 0, of at most "
            f"{MOST_DIGITS} digits"
        )
    return int(text)


def _percent(text: str, term: str) -> float:
    percent = float(text[:-1]) if PERCENT.fullmatch(text) else 0.0
    if not 0 < percent <= 100:
        raise UsageError(
            f"subset {quoted(term)}: {quoted(text)} is not a share above 0% and up to 100%"
        )
    return percent


def _absolute(name: str) -> str:
    """The absolute path of a file or folder that exists, so that it is found from elsewhere."""
    return str(Path(name).expanduser().absolute()) if is_path(name) else name


def _last(name: str) -> str:
    """The last part of a path or hub name."""
    return name.rstrip("/").rpartition("/")[2] or name
