"""The layouts of collections on the hub, downloaded from an endpoint on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from mlflow_dr.collection.catalogue import Collection, open_collection, parse_mixture
from mlflow_dr.collection.hub_tables import find_tables
from mlflow_dr.collection.records import Query
from mlflow_dr.errors import DataError, UsageError

if TYPE_CHECKING:
    from hub_endpoint import HubEndpoint

CORPUS = [
    {"_id": "p1", "title": "Kelp", "text": "otters shelter in kelp"},
    {"_id": "p2", "title": "", "text": "salt corrodes iron"},
    {"_id": "p3", "title": "", "text": "gulls follow trawlers"},
]
QUERIES = [{"_id": "q1", "text": "where do otters live"}, {"_id": "q2", "text": "what rusts"}]
QRELS = [
    {"query-id": "q1", "corpus-id": "p1", "score": 2},
    {"query-id": "q2", "corpus-id": "p2", "score": 1},
]
JUDGED = {"q1": {"p1": 2}, "q2": {"p2": 1}}
PLAIN = {query: dict.fromkeys(passages, 1) for query, passages in JUDGED.items()}


def card(configs: Mapping[str, Mapping[str, str]]) -> str:
    """A card as `datasets` writes it: configuration -> split -> pattern."""
    lines = ["---", "license: mit", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, pattern in splits.items():
            lines += [f"  - split: {split}", f"    path: {pattern}"]
    return "\n".join([*lines, "---", "# A data set", ""])


def rows(texts: Sequence[Mapping[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The same records with only these fields."""
    return [{name: text[name] for name in names} for text in texts]


def check(collection: Collection, split: str, judged: Mapping[str, Mapping[str, int]]) -> None:
    """The collection has the passages, queries and judgements of this file."""
    assert collection.splits == [split]
    topics = collection.topics(split)
    assert [query[:2] for query in topics.queries] == [tuple(q.values()) for q in QUERIES]
    assert topics.qrels == judged
    assert collection.corpus().ids.to_pylist() == ["p1", "p2", "p3"]


def test_beirs_pair_of_repositories(hub_endpoint: HubEndpoint) -> None:
    tables = {"corpus.jsonl.gz": CORPUS, "queries.jsonl.gz": QUERIES}
    hub_endpoint.put("BeIR/sea", {"README.md": "---\nlicense: mit\n---\n", "sea.py": "", **tables})
    hub_endpoint.put("BeIR/sea-qrels", {"README.md": "", "test.tsv": QRELS, "train.tsv": QRELS[:1]})
    collection = open_collection("BeIR/sea")
    assert collection.splits == ["test", "train"]
    assert collection.corpus()[0].title == "Kelp"
    assert collection.examples()[0].query == Query("q1", "where do otters live")
    check(open_collection("BeIR/sea:test"), "test", JUDGED)


def test_beirs_tables_as_parquet(hub_endpoint: HubEndpoint) -> None:
    configs = {"corpus": {"corpus": "corpus/corpus-*"}, "queries": {"queries": "queries/queries-*"}}
    hub_endpoint.put(
        "BeIR/sea",
        {
            "README.md": card(configs),
            "corpus/corpus-00000-of-00002.parquet": CORPUS[:2],
            "corpus/corpus-00001-of-00002.parquet": CORPUS[2:],
            "queries/queries-00000-of-00001.parquet": QUERIES,
        },
    )
    hub_endpoint.put("BeIR/sea-qrels", {"validation.tsv": QRELS})
    check(open_collection("BeIR/sea"), "validation", JUDGED)


@pytest.mark.parametrize("has_card", [True, False])
def test_mtebs_configurations(hub_endpoint: HubEndpoint, has_card: bool) -> None:
    configs = {
        "default": {"train": "qrels/train.jsonl", "test": "qrels/test.jsonl"},
        "corpus": {"corpus": "corpus.jsonl"},
        "queries": {"queries": "queries.jsonl"},
    }
    hub_endpoint.put(
        "mteb/sea",
        {
            "README.md": card(configs) if has_card else "",
            "corpus.jsonl": CORPUS,
            "queries.jsonl": QUERIES,
            "qrels/test.jsonl": [dict(row, score=float(row["score"])) for row in QRELS],
            "qrels/train.jsonl": QRELS[1:],
        },
    )
    collection = open_collection("mteb/sea")
    assert collection.splits == ["test", "train"]
    assert collection.topics("train").qrels == {"q2": {"p2": 1}}
    assert len(collection.examples()) == 1
    check(open_collection("mteb/sea:test"), "test", JUDGED)


def test_mtebs_parquet_with_judgements_in_data(hub_endpoint: HubEndpoint) -> None:
    configs = {
        "corpus": {"corpus": "corpus/corpus-*"},
        "default": {"dev": "data/dev-*"},
        "queries": {"queries": "queries/queries-*"},
    }
    files = {
        "corpus/corpus-00000-of-00001.parquet": CORPUS,
        "data/dev-00000-of-00001.parquet": QRELS,
        "queries/queries-00000-of-00001.parquet": QUERIES,
    }
    hub_endpoint.put("mteb/sea", {"README.md": card(configs), **files})
    check(open_collection("mteb/sea"), "dev", JUDGED)


def test_mtebs_languages(hub_endpoint: HubEndpoint) -> None:
    tables = {"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS}
    renamed = {"corpus": [{**row, "id": row["_id"]} for row in CORPUS]}
    files = {
        f"{language}-{kind}/dev-00000-of-00001.parquet": renamed.get(kind, table)
        for language in ("ar", "sw")
        for kind, table in tables.items()
    }
    configs = {path.partition("/")[0]: {"dev": path.partition("/")[0] + "/dev-*"} for path in files}
    hub_endpoint.put("mteb/seas", {"README.md": card(configs), **files})
    check(open_collection("mteb/seas/sw"), "dev", JUDGED)
    assert not [path for path in hub_endpoint.requested if "ar-" in path]
    with pytest.raises(UsageError, match=r"has several collections; name one .* has: ar, sw"):
        _ = open_collection("mteb/seas").splits
    with pytest.raises(UsageError, match=r"has no collection 'fr'.* such as mteb/seas/ar"):
        _ = open_collection("mteb/seas/fr").splits


def test_nanobeir_with_a_repository_for_each_collection(hub_endpoint: HubEndpoint) -> None:
    kinds = ("corpus", "qrels", "queries")
    hub_endpoint.put(
        "zeta-alpha-ai/NanoSea",
        {
            "README.md": card({kind: {"train": f"{kind}/train-*"} for kind in kinds}),
            "corpus/train-00000-of-00001.parquet": rows(CORPUS, "_id", "text"),
            "qrels/train-00000-of-00001.parquet": rows(QRELS, "query-id", "corpus-id"),
            "queries/train-00000-of-00001.parquet": QUERIES,
        },
    )
    check(open_collection("zeta-alpha-ai/NanoSea"), "test", PLAIN)


def test_nanobeir_with_a_configuration_for_each_collection(hub_endpoint: HubEndpoint) -> None:
    """Whose splits are the tables."""
    files = {
        f"NanoSea_fr/{table}-00000-of-00001.parquet": content
        for table, content in (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS))
    }
    hub_endpoint.put("someone/NanoBEIR-clean", files)
    check(open_collection("someone/NanoBEIR-clean/NanoSea_fr"), "test", JUDGED)


def test_nanobeir_with_a_split_for_each_collection(hub_endpoint: HubEndpoint) -> None:
    names, files = ("NanoSea", "NanoSky"), {}
    for name in names:
        end = f"{name}-00000-of-00001.parquet"
        qrels = [{"query-id": row["query-id"], "corpus-id": [row["corpus-id"]]} for row in QRELS]
        files |= {f"corpus/{end}": rows(CORPUS, "_id", "text"), f"queries/{end}": QUERIES}
        files |= {f"qrels/{end}": qrels, f"bm25/{end}": [{"query-id": "q1", "corpus-ids": ["p2"]}]}
    kinds = ("bm25", "corpus", "qrels", "queries")
    configs = {kind: {name: f"{kind}/{name}-*" for name in names} for kind in kinds}
    hub_endpoint.put("sentence-transformers/NanoBEIR-sw", {"README.md": card(configs), **files})
    check(open_collection("sentence-transformers/NanoBEIR-sw/NanoSky"), "test", PLAIN)
    downloaded = {path.split("/")[2] for path in hub_endpoint.requested}
    assert downloaded == {"README.md", "corpus", "queries", "qrels"}
    assert not [path for path in hub_endpoint.requested if "NanoSea-" in path]


def test_miracls_tables_by_language(hub_endpoint: HubEndpoint) -> None:
    folder = "miracl-v1.0-sw"
    topics = "".join(f"{query['_id']}\t{query['text']}\n" for query in QUERIES)
    qrels = "q1 Q0 p1 1\nq2 Q0 p2 1\nq2 Q0 p3 0\n".replace(" ", "\t")
    hub_endpoint.put(
        "miracl/miracl",
        {
            "README.md": "",
            f"{folder}/topics/topics.{folder}-dev.tsv": topics,
            f"{folder}/topics/topics.{folder}-test-a.tsv": topics,
            f"{folder}/qrels/qrels.{folder}-dev.tsv": qrels,
        },
    )
    passages = [{"docid": p["_id"], "title": p["title"], "text": p["text"]} for p in CORPUS]
    hub_endpoint.put(
        "miracl/miracl-corpus",
        {
            "miracl-corpus-v1.0-sw/docs-0.jsonl.gz": passages[:2],
            "miracl-corpus-v1.0-sw/docs-1.jsonl.gz": passages[2:],
            "miracl-corpus-v1.0-ar/docs-0.jsonl.gz": passages,
        },
    )
    judged = {"q1": {"p1": 1}, "q2": {"p2": 1, "p3": 0}}
    check(open_collection("miracl/miracl/sw"), "dev", judged)
    assert not [path for path in hub_endpoint.requested if "-ar/" in path]


def test_brights_examples_that_name_their_documents(hub_endpoint: HubEndpoint) -> None:
    documents = [{"id": row["_id"], "content": row["text"]} for row in CORPUS]
    examples = [
        {
            "id": query["_id"],
            "query": query["text"],
            "reasoning": "because",
            "excluded_ids": excluded,
            "gold_ids_long": ["l1"],
            "gold_ids": [gold],
            "gold_answer": "yes",
        }
        for query, gold, excluded in zip(QUERIES, ("p1", "p2"), (["N/A"], ["p3"]), strict=True)
    ]
    kinds = ("documents", "examples", "long_documents", "gpt4_reason")
    configs = {kind: {"biology": f"{kind}/biology-*"} for kind in kinds}
    end = "biology-00000-of-00001.parquet"
    hub_endpoint.put(
        "xlangai/BRIGHT",
        {
            "README.md": card(configs),
            f"documents/{end}": documents,
            f"examples/{end}": examples,
            f"gpt4_reason/{end}": examples,
            f"long_documents/{end}": [{"id": "l1", "content": "long"}],
        },
    )
    collection = open_collection("xlangai/BRIGHT/biology")
    check(collection, "test", PLAIN)
    assert [query.excluded for query in collection.topics("test").queries] == [[], ["p3"]]
    long = open_collection("xlangai/BRIGHT/biology-long")
    assert long.topics("test").qrels == {"q1": {"l1": 1}, "q2": {"l1": 1}}


def test_a_revision_is_read_and_a_split_is_the_only_one(hub_endpoint: HubEndpoint) -> None:
    files = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.jsonl": QRELS}
    old = hub_endpoint.put("mteb/sea", files, "v1")
    hub_endpoint.put("mteb/sea", {**files, "qrels/dev.jsonl": QRELS, "corpus.jsonl": CORPUS[:2]})
    for revision in ("v1", old, old[:40]):
        check(open_collection(f"mteb/sea@{revision}:test"), "test", JUDGED)
    assert open_collection("mteb/sea").splits == ["dev", "test"]
    assert len(open_collection("mteb/sea:dev").corpus()) == 2
    with pytest.raises(UsageError, match="no split 'tset'; did you mean 'test'"):
        _ = open_collection("mteb/sea:tset").splits
    with pytest.raises(DataError, match=r"cannot be downloaded .*RevisionNotFound"):
        _ = open_collection("mteb/sea@v2").splits


def test_without_a_network_the_cache_is_read(
    hub_endpoint: HubEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    files = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.jsonl": QRELS}
    hub_endpoint.put("mteb/sea", {"README.md": "", **files})
    check(open_collection("mteb/sea"), "test", JUDGED)
    hub_endpoint.requested.clear()
    check(open_collection("mteb/sea"), "test", JUDGED)
    assert not hub_endpoint.requested  # what is cached is not fetched again
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check(open_collection("mteb/sea"), "test", JUDGED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(open_collection("mteb/sea"), "test", JUDGED)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qrels/test.jsonl": [{"query-id": "q1"}]}, r"test.jsonl:1: expected query-id, corpus-id"),
        (
            {"qrels/test.jsonl": [dict(QRELS[0], score=0.5)]},
            r"test.jsonl:1: relevance 0.5 is not a whole number",
        ),
        (
            {"qrels/test.jsonl": [QRELS[0], dict(QRELS[0], score=1)]},
            r"test.jsonl:2: .* have relevance 1 here and 2 in an earlier record",
        ),
        ({"queries.jsonl": [{"_id": "q1", "title": "t"}]}, r"queries.jsonl:1: expected an id"),
        ({"queries.jsonl": [QUERIES[0]] * 2}, r"queries.jsonl:2: query id 'q1' is used twice"),
        ({"corpus.jsonl": b'{"_id": "p1", '}, r"corpus.jsonl:1: not JSON"),
        ({"qrels/test.jsonl": [dict(QRELS[0], **{"query-id": "?"})]}, "no judgement is left"),
    ],
)
def test_malformed_tables(
    hub_endpoint: HubEndpoint, files: Mapping[str, Any], message: str
) -> None:
    good = {"corpus.jsonl": CORPUS, "queries.jsonl": QUERIES, "qrels/test.jsonl": QRELS}
    hub_endpoint.put("mteb/sea", {**good, **files})
    with pytest.raises(DataError, match=message):
        open_collection("mteb/sea").topics("test")


def test_a_repository_of_no_known_layout(hub_endpoint: HubEndpoint) -> None:
    hub_endpoint.put("a/pictures", {"README.md": "", "x/cat.png": b""})
    with pytest.raises(DataError, match=r"a/pictures: its files .*cat.png.* no known layout"):
        _ = open_collection("a/pictures").splits
    with pytest.raises(DataError, match="no file or folder 'a/nothing/here@v1' here either"):
        _ = open_collection("a/nothing/here@v1").splits


def test_a_damaged_card_is_an_error(hub_endpoint: HubEndpoint) -> None:
    hub_endpoint.put("a/b", {"README.md": "---\nconfigs: [\n---\n", "corpus.jsonl": CORPUS})
    with pytest.raises(DataError, match=r"a/b: README.md cannot be read"):
        _ = open_collection("a/b").splits


def test_odd_cards_are_ignored() -> None:
    files = ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]
    for configs in (["corpus"], [{"config_name": "corpus"}], [{"data_files": [{"split": "x"}]}]):
        assert find_tables(files, configs)[""].qrels == {"test": ["qrels/test.tsv"]}


def test_a_mixture_may_name_revisions() -> None:
    commit = "1" * 40
    assert parse_mixture(f"mteb/a@v1+mteb/b@main@3+mteb/c@{commit}+mteb/d@2") == [
        ("mteb/a@v1", None),
        ("mteb/b@main", 3.0),
        (f"mteb/c@{commit}", None),
        ("mteb/d", 2.0),
    ]
    assert parse_mixture("mteb/a@3:train") == [("mteb/a@3:train", None)]
