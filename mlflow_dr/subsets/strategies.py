"""Subset strategies: ours, and those that other packages add, by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mlflow_dr.cache import about_entry, cache_entry
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Topics
from mlflow_dr.errors import UsageError
from mlflow_dr.extensions import Registry
from mlflow_dr.files import digest_of, file_sha256
from mlflow_dr.retrieval.bm25 import Bm25Retriever, warn_of_no_matches
from mlflow_dr.retrieval.ranking import Retriever, read_ranking

if TYPE_CHECKING:
    from mlflow_dr.subsets.spec import SubsetTerm
    from mlflow_dr.tracking.checkpoints import Checkpoint

LAYOUT = 1
CACHE_KIND, ROWS = "top_passages", "rows.npy"
# weights, settings, and vocabularies of all kinds
ENCODER_FILES = (
    *("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.py"),
)
FORM = re.compile(r"[\w-]+(?::N|@K|:[^:@]+@K)?")


@dataclass(frozen=True)
class SubsetSources:
    """The data from which a subset is chosen.

    Attributes:
        corpus: the whole corpus; `corpus.ids` are the passage ids in the order of its rows, and
            `corpus.rows_of(ids)` finds rows by id (-1 where there is none).
        topics: the queries, and the judgements of each.
        seed: random seed; a strategy that uses it says so by `uses_seed`.
        device: where encoders run; see `resolve_devices`.
        dtype: their number format; see `resolve_dtype`.
        search_backend: compares vectors; see `SEARCH_BACKENDS`.
        published: finds the checkpoint of a training step of the run, if there is a run.
        tracking_uri: where `models:/` is looked up; the environment's server when None.
    """

    corpus: Corpus
    topics: Topics
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    search_backend: str = "auto"
    published: Callable[[int], Checkpoint] | None = None
    tracking_uri: str | None = None


Choose = Callable[["SubsetTerm", SubsetSources], Sequence[np.ndarray]]
"""Term and sources to rows of the corpus, one array `(n,) int64` per query."""


@dataclass(frozen=True)
class SubsetStrategy:
    """A way to choose the part of a corpus that a validation searches.

    Another package adds one by `subset_strategy`, or by an entry point in the group
    `mlflow_dr.subset_strategies` whose name is the strategy's and whose object is what
    `subset_strategy` returns.

    Attributes:
        form: how a term is written: `NAME`, `NAME:N`, `NAME@K`, `NAME:ARGUMENT@K` or, for several
            arguments, `NAME:ARGUMENT,ARGUMENT@K`. N and K are whole numbers above 0.
        choose: gets the term (`term.count` is N or K, `term.arguments` the texts between `:` and
            `@`) and the sources. It returns a sequence of arrays `(n,) int64`, whose union is the
            subset, in any order and of any number, such as one array per query or a single one.
            Judged passages are added by the caller. The choice must depend only on the contents of
            the sources, not on the order of the corpus' rows, so that all validators choose alike.
        chooses: `passages`: rows of the corpus. `candidates`: rows of the corpus, exactly one array
            per query of `sources.topics.queries` and in their order; each query ranks only its own.
            `queries`: positions in `sources.topics.queries`, in one array. `corpus`: all rows.
        uses_seed: whether the choice depends on `sources.seed`.
        takes_share: whether N may be a share, such as `5%`; see `SubsetTerm.count_of`.

    Raises:
        UsageError: the form is not one of these.
    """

    form: str
    choose: Choose
    chooses: Literal["passages", "candidates", "queries", "corpus"] = "passages"
    uses_seed: bool = False
    takes_share: bool = False

    def __post_init__(self) -> None:
        if not FORM.fullmatch(self.form):
            raise UsageError(
                f"subset strategy {self.form!r}: expected NAME, NAME:N, NAME@K or NAME:ARGUMENT@K"
            )

    @property
    def name(self) -> str:
        """The part of the form in front of `:` or `@`."""
        return re.split("[:@]", self.form, maxsplit=1)[0]

    @property
    def separator(self) -> str:
        """What follows the name: `:`, `@` or nothing."""
        return self.form[len(self.name) : len(self.name) + 1]

    @property
    def argument_form(self) -> str:
        """What stands between `:` and `@`; empty for a strategy without arguments."""
        return self.form[len(self.name) + 1 :].rpartition("@")[0]


SUBSET_STRATEGIES: Registry[SubsetStrategy] = Registry(
    "subset strategy", "mlflow_dr.subset_strategies"
)


def subset_strategy(
    form: str,
    chooses: Literal["passages", "candidates", "queries", "corpus"] = "passages",
    uses_seed: bool = False,
    takes_share: bool = False,
) -> Callable[[Choose], SubsetStrategy]:
    """Decorate a function to register it as a subset strategy; see `SubsetStrategy`.

    Raises:
        UsageError: the form is malformed, or its name is taken.
    """

    def decorate(choose: Choose) -> SubsetStrategy:
        strategy = SubsetStrategy(form, choose, chooses, uses_seed, takes_share)
        return SUBSET_STRATEGIES.register(strategy.name)(strategy)

    return decorate


@subset_strategy("full", chooses="corpus")
def _full(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    return [np.arange(len(sources.corpus))]


@subset_strategy("random:N", uses_seed=True, takes_share=True)
def _random(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    """N passages at random; a smaller sample is part of a larger one."""
    by_id = np.argsort(sources.corpus.tie_ranks())
    order = np.random.default_rng(sources.seed).permutation(len(by_id))
    return [by_id[order[: term.count_of(len(by_id))]]]


@subset_strategy("queries:N", chooses="queries", uses_seed=True, takes_share=True)
def _queries(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    """N queries at random; a smaller sample is part of a larger one."""
    queries = sources.topics.queries
    by_id = np.array(sorted(range(len(queries)), key=lambda position: queries[position].id))
    order = np.random.default_rng(sources.seed).permutation(len(by_id))
    return [by_id[order[: term.count_of(len(by_id))]]]


@subset_strategy("bm25@K")
def _bm25(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    """The K best passages of each query by BM25."""
    queries = sources.topics.queries
    passages = _cached_top_passages(sources, ("bm25",), Bm25Retriever, term.count)
    unmatched = sum(len(rows) == 0 for rows in passages)
    warn_of_no_matches(
        unmatched, len(queries), f"subset {term} has only judged passages for these queries"
    )
    return passages


@subset_strategy("encoder:NAME@K")
def _encoder(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    """The K best passages of each query by an encoder.

    Raises:
        UsageError: no such encoder, or no such checkpoint.
        CheckpointError: the encoder's files are damaged.
        TrackingError: no such model, or no server.
    """
    # imports mlflow and torch
    from mlflow_dr.encoder.files import encoder_directory
    from mlflow_dr.retrieval.dense import DenseRetriever
    from mlflow_dr.tracking.encoders import local_encoder, open_encoder, resolve_encoder

    def retriever(source: Checkpoint | str) -> Retriever:
        encoder = open_encoder(source)
        return DenseRetriever(encoder, sources.device, sources.dtype, sources.search_backend)

    if term.step is None:
        source: Checkpoint | str = resolve_encoder(term.arguments[0], sources.tracking_uri)
    elif sources.published is None:
        raise UsageError(
            f"subset {term}: step-{term.step} refers to a checkpoint of a run; pass --run-id, or "
            "name an encoder"
        )
    else:
        source = sources.published(term.step)
    if not isinstance(source, str) and source.manifest:
        # a cached choice needs no files, which may have been deleted by now
        identity = (source.manifest, sources.dtype)
        return _cached_top_passages(sources, identity, lambda: retriever(source), term.count)
    with local_encoder(source) as name:
        directory = encoder_directory(name)
        identity = (digest_of(*_file_digests(directory)), sources.dtype)
        return _cached_top_passages(
            sources, identity, lambda: retriever(str(directory)), term.count
        )


@subset_strategy("ranking:FILE@K")
def _ranking(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
    """The K best passages of each query in ranking files.

    Raises:
        DataError: a file is missing or malformed, or about another collection.
    """
    queries = sources.topics.queries
    rankings = [
        read_ranking(Path(name), term.count, queries, sources.corpus) for name in term.arguments
    ]
    return [np.unique(np.concatenate(rows)) for rows in zip(*rankings, strict=True)]


subset_strategy("pool:FILE,FILE@K")(_ranking.choose)
subset_strategy("rerank:FILE@K", chooses="candidates")(_ranking.choose)


def _cached_top_passages(
    sources: SubsetSources, identity: Sequence[str], retriever: Callable[[], Retriever], k: int
) -> list[np.ndarray]:
    """The best k passages of each query, `(<= k,) int64`, the best first; searched once.

    Args:
        identity: names the retriever.
        retriever: makes it, if nothing is cached.
    """
    queries = sources.topics.queries
    texts = [repr((query.id, query.text, list(query.tokens or ()))) for query in queries]
    key = digest_of(LAYOUT, sources.corpus.digest, *identity, k, *texts)
    about = about_entry(sources.corpus.directory)

    def write(partial: Path) -> None:
        results = retriever().search(sources.corpus, queries, k)
        partial.mkdir()
        np.save(partial / ROWS, np.concatenate([result.rows for result in results]))

    ranked = np.load(cache_entry(CACHE_KIND, key, write, about) / ROWS)
    return [rows[rows >= 0] for rows in ranked]


def _file_digests(directory: Path) -> list[str]:
    """The contents of the files that an encoder's vectors depend on."""
    files = sorted({path for pattern in ENCODER_FILES for path in directory.rglob(pattern)})
    return [f"{path.relative_to(directory)} {file_sha256(path)}" for path in files]
