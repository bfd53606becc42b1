"""What is measured: one validation by its name, dataset, split, subset and settings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from mlflow_dr.encoder.config import check_types
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.retrieval.estimate import check_estimable
from mlflow_dr.retrieval.measures import Measure
from mlflow_dr.retrieval.vector_form import ALL, FLOAT32, VectorForm
from mlflow_dr.subsets.spec import MOST_DIGITS, RELEVANT, SubsetSpec, parse_subset

# what MLflow allows in a metric's name, less the slash and the dot, which have a meaning here
NAME = re.compile(r"[\w\- ]+")
NOT_IN_NAME = re.compile(r"[^\w\- ]")
FIRST_NAME = "val"
ESTIMATE_SLUG = "est"


@dataclass(frozen=True)
class EvalConfig:
    """How an encoder is evaluated.

    Attributes:
        measures: what is measured.
        depth: passages kept for each query; the largest cut-off when None.
        device: `auto`, `cpu`, `cuda` or `cuda:<n>`, or several between commas.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        keep_own_id: keep a passage whose id is the query's id.
        search_backend: what compares vectors: `auto`, `faiss`, `torch`, or another package's.
        engine: where encoding runs: `local` or `ray`.
        match: when a passage holds an answer: `string`, `regex` or `kilt`.
        query_prompt: put before every query; the encoder's own prompt when None.
        passage_prompt: put before every passage; the encoder's own prompt when None.
        dims: only so many of the first dimensions of vectors; all when None.
        precision: how passages are stored: `float32`, `int8` or `binary`.
        estimate: estimate the values on the full corpus from the random sample of the subset.
        target_error: half the width of the intervals for which `random:auto` is sized.
    """

    measures: tuple[Measure, ...]
    depth: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    keep_own_id: bool = False
    search_backend: str = "auto"
    engine: str = "local"
    match: str = "string"
    query_prompt: str | None = None
    passage_prompt: str | None = None
    dims: int | None = None
    precision: str = FLOAT32
    estimate: bool = False
    target_error: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.estimate:
            check_estimable(self.measures)

    def estimating(self, spec: SubsetSpec, target_error: float | None = None) -> EvalConfig:
        """The same settings, to estimate from a subset; the full corpus needs no estimate.

        Raises:
            UsageError: the subset or a measure does not allow it.
        """
        if spec == SubsetSpec():
            return self
        spec.check_estimable()
        is_auto = any(term.is_auto for term in spec.terms)
        if is_auto != (target_error is not None):
            raise UsageError(
                f"subset {spec.shown}: --target-error chooses the size of random:auto; give both, "
                "or a size"
            )
        return replace(self, estimate=True, target_error=target_error)

    def of_form(self, form: VectorForm) -> EvalConfig:
        """The same settings, of vectors in a form."""
        return replace(self, dims=form.dims, precision=form.precision)

    def form(self, normalize: bool = False) -> VectorForm:
        """The form in which passages are stored.

        Args:
            normalize: whether the encoder's vectors have length 1.
        """
        return VectorForm(self.dims, self.precision, normalize)

    @property
    def prompts(self) -> dict[str, str]:
        """The given prompts, as settings of an encoder."""
        prompts = {"query_prompt": self.query_prompt, "passage_prompt": self.passage_prompt}
        return {name: prompt for name, prompt in prompts.items() if prompt is not None}


class Refines(NamedTuple):
    """Which checkpoints an expensive validation is done for.

    Attributes:
        name: of the cheap validation.
        measure: the measure of the cheap validation that orders the checkpoints.
        best: how many of the best checkpoints so far.
    """

    name: str
    measure: Measure
    best: int


class NamedValidation(Protocol):
    """A validation of any kind of checkpoints."""

    @property
    def name(self) -> str:
        """Prefixes the metrics."""

    @property
    def refines(self) -> Refines | None:
        """Which checkpoints it is done for; every checkpoint when None."""

    @property
    def mean_of(self) -> Sequence[str]:
        """The validations whose mean it is; empty for one that evaluates."""


@dataclass(frozen=True)
class Validation:
    """What is measured on every checkpoint of a run.

    Attributes:
        settings: measures, depth, device, dtype.
        name: prefixes the metrics.
        dataset: the collection; the run's own when None.
        split: the split; the run's own, or the collection's development split, when None.
        subset: what is searched.
        refines: which checkpoints it is done for; every checkpoint when None.
        mean_of: the validations whose mean it is; empty for one that searches.
    """

    settings: EvalConfig
    name: str = FIRST_NAME
    dataset: str | None = None
    split: str | None = None
    subset: SubsetSpec = field(default_factory=SubsetSpec)
    refines: Refines | None = None
    mean_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"a validation cannot be called {quoted(self.name)}: use letters, digits, _, - and "
                "blanks"
            )


def joined_name(
    name: str, subset: SubsetSpec, form: VectorForm = ALL, is_estimate: bool = False
) -> str:
    """The name of a validation on a subset, of vectors in some form.

    Estimates are called alike whatever the subset.
    """
    slug = ESTIMATE_SLUG if is_estimate else subset.slug
    return "-".join(filter(None, (name, slug, form.slug)))


def refining(
    text: str, validations: Sequence[Validation], seed: int = 0, judged: str = RELEVANT
) -> tuple[Validation, ...]:
    """What `--refine full@3` adds: an expensive validation of the three best checkpoints so far.

    Args:
        text: a subset, and of how many checkpoints.
        validations: the cheap ones; each is refined by its first measure.
        seed: random seed of the expensive subset.
        judged: which judged passages that subset includes: the `relevant` ones, or `all`.

    Raises:
        UsageError: not of this form, the same as a cheap one, or one for several of them.
    """
    subset_text, _, count = text.rpartition("@")
    is_count = count.isdecimal() and len(count) <= MOST_DIGITS and int(count) > 0
    if not subset_text or not is_count:
        raise UsageError(f"refine {quoted(text)}: expected SUBSET@N, such as full@3")
    spec = parse_subset(subset_text, seed, judged)
    added: list[Validation] = []
    for cheap in validations:
        if cheap.subset == spec:
            raise UsageError(f"refine {text!r} is what validation {cheap.name!r} does already")
        slug = ESTIMATE_SLUG if cheap.settings.estimate else cheap.subset.slug
        name = joined_name(cheap.name.removesuffix(f"-{slug}"), spec)
        if name in {validation.name for validation in added}:
            raise UsageError(
                f"refine {text!r}: several subsets would share the validation {name!r}; give one "
                "--subset"
            )
        refines = Refines(cheap.name, cheap.settings.measures[0], int(count))
        settings = replace(cheap.settings, estimate=False, target_error=None)
        added.append(replace(cheap, settings=settings, name=name, subset=spec, refines=refines))
    return tuple(added)
