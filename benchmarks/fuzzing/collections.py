"""BEIR's folders, Asyncval's files, and DPR's table of passages."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import damage, odd, reading
from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from mlflow_dr.collection.catalogue import Collection, open_collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.retrieval.measures import measure_ranking, parse_measures

PASSAGES = [
    ("d1", "Lighthouse", "The keeper counts the ships that pass at night."),
    ("d2", "", 'A harbour pilot boards every tanker, "Zürich" first.'),
    ("d-3", "Kelp", "Kelp forests shelter otters, urchins and young rockfish."),
    ("4", "Tide 東京", 'The tide tables are printed a year ahead; 15" apart.'),
    ("d5", "Sextant", "A sextant measures the angle between horizon and star."),
    ("d6", "", "Storm warnings are hoisted as black cones on the mast."),
    ("dé7", "Ferry", "The ferry leaves the island at six and returns at noon 😀."),
]
QUERIES = [
    ("q1", "who counts ships", ["the keeper", "a keeper"]),
    ("q2", "what shelters otters?", []),
    ("3", "when does the ferry leave", ["six"]),
    ("qé", "störm warnings", []),
]
JUDGED = [
    ("q1", "d1", 2),
    ("q1", "d5", 1),
    ("q2", "d-3", 1),
    ("q2", "d1", 0),
    ("3", "dé7", 1),
    ("3", "4", -1),
    ("qé", "d6", 3),
    ("qé", "4", 1),
]
MEASURES = "mrr@10 ndcg@10 recall@5"


def passages_of(corpus: Corpus) -> list[Any]:
    return [
        (
            passage.id,
            passage.title,
            passage.text,
            None if passage.tokens is None else list(passage.tokens),
        )
        for batch in corpus.batches()
        for passage in batch
    ]


def read(collection: Collection, split: str) -> dict[str, Any]:
    """Read a collection with mlflow_dr, and measure a fixed ranking on it."""
    passages = passages_of(collection.corpus())
    topics = collection.topics(split)
    qrels = {query: dict(judged) for query, judged in topics.qrels.items()}
    ids = [passage[0] for passage in passages]
    ranking = {query: reading.ranked(ids, query) for query in qrels}
    return {
        "passages": passages,
        "queries": [
            (
                query.id,
                query.text,
                list(query.answers),
                None if query.tokens is None else list(query.tokens),
            )
            for query in topics.queries
        ],
        "qrels": qrels,
        "values": measure_ranking(ranking, qrels, parse_measures(MEASURES)),
    }


def right(
    passages: reading.Passages, queries: dict[str, Any], qrels: dict[str, Any]
) -> dict[str, Any]:
    """The same by the independent reader; `queries` maps ids to text, answers and tokens."""
    topics = reading.topics(queries, qrels, passages)
    ids = [passage[0] for passage in passages]
    return {"passages": passages, **topics, "values": reading.measured(topics["qrels"], ids)}


def hurt(chance: Random, path: Path, trees: list[Any] | None) -> tuple[Path, str]:
    """Damage a file, or one of its JSON records `trees`; returns its path and a description."""
    if trees and chance.random() < 0.55:
        index = chance.randrange(len(trees))
        trees = list(trees)
        trees[index], how = damage.tree(chance, trees[index])
        end = chance.choice((b"\n", b"\n", b"\r\n"))
        path.write_bytes(b"".join(damage.dumped(chance, record) + end for record in trees))
        return path, f"{path.name}: record {index}: {how}"
    path_then, how = damage.packed(chance, path)
    if not how:
        how = damage.file(chance, path)
    return path_then, f"{path.name}: {how}"


def jsonl(path: Path, values: list[Any]) -> None:
    path.write_text(
        "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8"
    )


def table(path: Path, rows: list[Any], header: str = "") -> None:
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    path.write_text(header + text, encoding="utf-8")


def beir_folder(folder: Path) -> dict[str, Any]:
    """Write a sound folder; returns the records of its files."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": i, "title": title, "text": text} for i, title, text in PASSAGES]
    queries = [
        {"_id": i, "text": text, "metadata": {"answers": some} if some else {}}
        for i, text, some in QUERIES
    ]
    files: dict[str, Any] = {"corpus.jsonl": corpus, "queries.jsonl": queries}
    for name, values in files.items():
        jsonl(folder / name, values)
    table(folder / "qrels/dev.tsv", JUDGED, "query-id\tcorpus-id\tscore\n")
    return files


def renamed(chance: Random, folder: Path) -> str:
    """Give a passage or query another id in all files."""
    old = chance.choice([*(passage[0] for passage in PASSAGES[:3]), "q1", "q2"])
    index = chance.randint(0, len(old))
    new = old[:index] + chance.choice(odd.CONTROLS) + old[index:]
    for path in folder.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        inside = json.dumps(new)[1:-1] if path.suffix == ".jsonl" else new
        marks = '"{}"' if path.suffix == ".jsonl" else "{}\t"
        path.write_text(text.replace(marks.format(old), marks.format(inside)), encoding="utf-8")
    return f"{old} is {new!r} in all files"


def beir(chance: Random, workdir: Path) -> Case:
    folder = workdir / "set"
    files = beir_folder(folder)
    rows = chance.choice((JUDGED, [(q, 0, p, n) for q, p, n in JUDGED]))
    header = chance.choice(("query-id\tcorpus-id\tscore\n", "")) if rows is JUDGED else ""
    table(folder / "qrels/dev.tsv", rows, header)
    name = chance.choice([*files, "qrels/dev.tsv"])
    if chance.random() < 0.2:
        path, how = folder / name, renamed(chance, folder)
    else:
        path, how = hurt(chance, folder / name, files.get(name))
    if chance.random() < 0.1:
        (
            folder / chance.choice(("stray.txt", ".hidden", "corpus.jsonl~", "qrels/._dev.tsv"))
        ).write_bytes(b"\x00")

    def plain() -> Any:
        paths = {
            file_name: next(folder.glob(f"{file_name}*"), folder / file_name)
            for file_name in [*files, "qrels/dev.tsv"]
        }
        paths["corpus.jsonl"] = folder / (
            "corpus.jsonl.gz" if path.name == "corpus.jsonl.gz" else "corpus.jsonl"
        )
        passages = reading.json_passages(paths["corpus.jsonl"])
        put = reading.records(paths["queries.jsonl"], arrays=False)
        reading.unique([reading.identifier(record, "_id") for record in put])
        queries_by_id = {
            reading.identifier(record, "_id"): (
                reading.text(record, "text"),
                _answers(record),
                None,
            )
            for record in put
        }
        ids = {passage[0] for passage in passages} | set(queries_by_id)
        return right(passages, queries_by_id, reading.qrels(paths["qrels/dev.tsv"], ids))

    names = ("corpus.jsonl", "queries.jsonl", "dev.tsv", "qrels")
    return Case(how, lambda: read(open_collection(str(folder)), "dev"), plain, names)


def _answers(record: dict[str, Any]) -> list[str]:
    metadata = record.get("metadata")
    return reading.answers(
        metadata if "answers" not in record and isinstance(metadata, dict) else record
    )


def asyncval(chance: Random, workdir: Path) -> Case:
    tokenised = chance.random() < 0.3
    shape = (
        (lambda text: [len(word) for word in text.split()]) if tokenised else (lambda text: text)
    )
    passages = [{"text_id": i, "text": shape(text)} for i, _, text in PASSAGES]
    queries = [{"text_id": i, "text": shape(text)} for i, text, _ in QUERIES]
    shards = workdir / "candidates"
    shards.mkdir()
    files: dict[str, Any] = {"split00.jsonl": passages[:4], "split01.json": passages[4:]}
    for name, values in files.items():
        jsonl(shards / name, values)
    files["dev.json"] = queries
    jsonl(workdir / "dev.json", queries)
    table(workdir / "qrels.tsv", [(q, 0, p, n) for q, p, n in JUDGED])
    name = chance.choice([*files, "qrels.tsv"])
    target = shards / name if name.startswith("split") else workdir / name
    if name in files and chance.random() < 0.3:
        target.write_bytes(damage.dumped(chance, files[name], chance.choice((None, 1))))
        path, how = hurt(chance, target, None)
    else:
        path, how = hurt(chance, target, files.get(name))
    if chance.random() < 0.1:
        (shards / chance.choice(("README.md", ".DS_Store", "done"))).write_bytes(b"\x00")
    paths = {
        file_name: path
        if file_name == name
        else (shards / file_name if file_name.startswith("split") else workdir / file_name)
        for file_name in [*files, "qrels.tsv"]
    }

    def plain() -> Any:
        made = [
            passage for file in ("split00.jsonl", "split01.json") for passage in _texts(paths[file])
        ]
        made_queries = _texts(paths["dev.json"])
        for group in (made, made_queries):
            reading.unique([entry[0] for entry in group])
            if len({entry[3] is None for entry in group}) > 1:
                raise UnreadableError("text and token ids")
        if not made:
            raise UnreadableError("no passage")
        queries_by_id = {query[0]: (query[2], [], query[3]) for query in made_queries}
        ids = {passage[0] for passage in made} | set(queries_by_id)
        return right(made, queries_by_id, reading.qrels(paths["qrels.tsv"], ids))

    collection = f"asyncval:{shards}?queries={paths['dev.json']}&qrels={paths['qrels.tsv']}"
    return Case(how, lambda: read(open_collection(collection), "dev"), plain, (name, "candidates"))


def _texts(path: Path) -> reading.Passages:
    if path.is_dir() or not (path.exists() or path.is_symlink()):
        return []  # folders and missing files are skipped
    made: reading.Passages = []
    for record in reading.records(path):
        text, tokens = reading.text_or_tokens(record.get("text"))
        made.append((reading.identifier(record, "text_id"), "", text, tokens))
    return made


def dpr_table(chance: Random, workdir: Path) -> Case:
    from mlflow_dr.collection.training_files import corpus_of_file

    rows = [(i, f'"{text.replace(chr(34), chr(34) * 2)}"', title) for i, title, text in PASSAGES]
    table(workdir / "psgs.tsv", rows, chance.choice(("id\ttext\ttitle\n", "")))
    act = chance.randrange(3)
    if act == 0:
        lines = (workdir / "psgs.tsv").read_text(encoding="utf-8").split("\n")
        index = chance.randrange(len(lines))
        cells = lines[index].split("\t")
        cell = chance.randrange(len(cells))
        cells[cell] = (
            chance.choice((*odd.STRINGS, '"', 'a "b', '"a', 'a"', '"a"b', '""', "'"))
            .replace("\ud800", "")
            .replace("\udfff", "")
        )
        lines[index] = "\t".join(cells)
        (workdir / "psgs.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
        path, how = workdir / "psgs.tsv", f"line {index}, cell {cell} = {cells[cell]!r:.40}"
    else:
        path, how = hurt(chance, workdir / "psgs.tsv", None)
    return Case(
        how,
        lambda: passages_of(corpus_of_file(path)),
        lambda: reading.table_passages(path),
        ("psgs.tsv",),
    )


KINDS = [Kind("beir", beir, 10), Kind("asyncval", asyncval, 9), Kind("dpr-table", dpr_table, 5)]
