"""Which passages a subset holds, and why."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.records import Query, Topics
from mlflow_dr.subsets.spec import SubsetTerm, parse_subset
from mlflow_dr.subsets.strategies import SUBSET_STRATEGIES, SubsetSources, SubsetStrategy
from mlflow_dr.subsets.subset import Subset, make_subset

N = 50
BM25 = SUBSET_STRATEGIES.get("bm25")
TOPICS = Topics(
    [Query(f"q{number}", "text") for number in range(10)],
    {f"q{number}": {f"p{number}": 1, f"p{number + 20}": 0} for number in range(10)},
)


def corpus(order: Sequence[int] = range(N)) -> Corpus:
    ids = [f"p{number}" for number in order]
    return Corpus(pa.table({"id": ids, "title": [""] * N, "text": ids}))


@pytest.fixture(autouse=True)
def ranked_queries(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """BM25 finds the passages of a query's own number and the next ones, plus 30."""
    queries: list[list[str]] = []

    def choose(term: SubsetTerm, sources: SubsetSources) -> list[np.ndarray]:
        queries.append([query.id for query in sources.topics.queries])
        return [
            sources.corpus.rows_of([f"p{30 + int(query.id[1:]) + n}" for n in range(term.count)])
            for query in sources.topics.queries
        ]

    monkeypatch.setitem(SUBSET_STRATEGIES._parts, "bm25", SubsetStrategy("bm25@K", choose))
    return queries


def made(text: str, order: Sequence[int] = range(N), **more: object) -> Subset:
    spec = parse_subset(text, **more)  # type: ignore[arg-type]
    return make_subset(spec, SubsetSources(corpus(order), TOPICS))


def ids(subset: Subset) -> set[str]:
    return set(subset.corpus.ids.take(pa.array(subset.rows)).to_pylist())


RELEVANT = {f"p{number}" for number in range(10)}


def test_top_passages_and_relevant_ones() -> None:
    assert ids(made("bm25@3")) == RELEVANT | {f"p{number}" for number in range(30, 42)}
    everything_judged = made("bm25@1", judged="all")
    assert {f"p{number}" for number in range(20, 30)} <= ids(everything_judged)


@pytest.mark.parametrize(("blanks", "warned"), [(True, False), (False, True)])
def test_a_subset_by_bm25_of_text_without_blanks(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    blanks: bool,
    warned: bool,
) -> None:
    texts = [f"\u98ce{chr(0x4E00 + n)} \u8f66{chr(0x4E00 + n)}" for n in range(4)]
    texts = texts if blanks else [text.replace(" ", "") for text in texts]
    ids_of = [f"p{n}" for n in range(4)]
    of = Corpus(pa.table({"id": ids_of, "title": [""] * 4, "text": texts}))
    queries = [Query(f"q{n}", texts[n][-2:]) for n in range(4)]
    topics = Topics(queries, {f"q{n}": {f"p{n}": 1} for n in range(4)})
    monkeypatch.setitem(SUBSET_STRATEGIES._parts, "bm25", BM25)
    for _ in range(2):  # found, and taken from the cache
        caplog.clear()
        subset = make_subset(parse_subset("bm25@2"), SubsetSources(of, topics))
        assert len(subset) == 4
        message = "BM25 found no passage for 4 of 4 queries: subset bm25@2 has only judged passages"
        assert (message in caplog.text) == warned


def test_a_random_sample_depends_on_ids_and_seed_not_on_the_order_of_the_corpus() -> None:
    shuffled = np.random.default_rng(5).permutation(N).tolist()
    assert ids(made("random:12")) == ids(made("random:12", shuffled))
    assert ids(made("random:12")) != ids(made("random:12", seed=1))
    assert made("random:12").digest == made("random:12", shuffled).digest
    assert len(ids(made("random:12")) - RELEVANT) in range(12 - 10, 13)


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    assert ids(made("random:5")) < ids(made("random:25")) < ids(made("random:1000"))
    assert len(made("random:1000")) == N


def test_origins() -> None:
    subset = made("bm25@1+random:20")
    origins = dict(zip(*subset.table().to_pydict().values(), strict=True))
    assert origins.keys() == ids(subset)
    assert {origin for document_id, origin in origins.items() if document_id in RELEVANT} <= {
        "judged",
        "judged + random:20",
    }
    assert subset.sizes == {
        "judged": 10,
        "bm25@1": 10,
        "random:20": sum("random:20" in origin for origin in origins.values()),
    }
    assert subset.sizes["random:20"] == 20


def test_queries_are_chosen_first_and_passages_for_these(ranked_queries: list[list[str]]) -> None:
    subset = made("bm25@1+queries:4")
    drawn = [query.id for query in subset.topics.queries]
    assert len(drawn) == 4
    assert ranked_queries == [drawn]
    assert subset.topics.qrels.keys() == set(drawn)
    assert len(subset) == 4 + 4
    more = [query.id for query in made("queries:7").topics.queries]
    assert set(drawn) < set(more)
    assert len(made("queries:7")) == N
    assert len(made("queries:700").topics.queries) == 10


def test_each_query_ranks_its_own_candidates(tmp_path: Path) -> None:
    path = tmp_path / "top.tsv"
    path.write_text("".join(f"q{n}\tp{40 + n % 3}\t1\nq{n}\tp45\t2\n" for n in range(10)))
    subset = made(f"rerank:{path}@1")
    assert subset.candidates is not None
    assert [sorted(rows.tolist()) for rows in subset.candidates] == [
        [n, 40 + n % 3] for n in range(10)
    ]
    assert ids(subset) == RELEVANT | {"p40", "p41", "p42"}
    assert subset.digest != made(f"ranking:{path}@1").digest
    assert made(f"ranking:{path}@1").candidates is None


def test_a_pool_of_files(tmp_path: Path) -> None:
    for name, offset in (("a", 40), ("b", 45)):
        lines = [f"q{n}\tp{offset + n % 2}\t1\n" for n in range(10)]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    subset = made(f"pool:{tmp_path}/a.tsv,{tmp_path}/b.tsv@3")
    assert ids(subset) == RELEVANT | {"p40", "p41", "p45", "p46"}
    assert subset.names == ("judged", "pool:a.tsv,b.tsv@3")


@pytest.mark.parametrize("text", ["bm25@2", "random:9", "queries:3"])
def test_the_digest_is_that_of_the_contents(text: str) -> None:
    assert made(text).digest == made(text).digest
    digests = {made(other).digest for other in ("bm25@2", "bm25@3", "random:9", "queries:3")}
    assert len(digests) == 4
