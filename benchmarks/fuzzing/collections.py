"""BEIR's folders, Asyncval's files, and DPR's table of passages."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzzing import damage, odd, reading
from benchmarks.fuzzing.case import Case, Kind, UnreadableError
from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.collection.formats import Collection
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
        (one.id, one.title, one.text, None if one.tokens is None else list(one.tokens))
        for batch in corpus.batches()
        for one in batch
    ]


def read(collection: Collection, split: str) -> dict[str, Any]:
    """All that mlflow_dr makes of a collection, measured on some ranking."""
    passages = passages_of(collection.corpus())
    topics = collection.topics(split)
    qrels = {query: dict(judged) for query, judged in topics.qrels.items()}
    ids = [one[0] for one in passages]
    ranking = {query: reading.ranked(ids, query) for query in qrels}
    return {
        "passages": passages,
        "queries": [
            (one.id, one.text, list(one.answers), None if one.tokens is None else list(one.tokens))
            for one in topics.queries
        ],
        "qrels": qrels,
        "values": measure_ranking(ranking, qrels, parse_measures(MEASURES)),
    }


def right(
    passages: reading.Passages, queries: dict[str, Any], qrels: dict[str, Any]
) -> dict[str, Any]:
    """The same by the plain reading; `queries` are id -> text, answers, tokens."""
    topics = reading.topics(queries, qrels, passages)
    ids = [one[0] for one in passages]
    return {"passages": passages, **topics, "values": reading.measured(topics["qrels"], ids)}


def hurt(chance: Random, path: Path, trees: list[Any] | None) -> tuple[Path, str]:
    """Damage a file of JSON lines (or of anything, without `trees`); where it is then, and how."""
    if trees and chance.random() < 0.55:
        place = chance.randrange(len(trees))
        trees = list(trees)
        trees[place], how = damage.tree(chance, trees[place])
        end = chance.choice((b"\n", b"\n", b"\r\n"))
        path.write_bytes(b"".join(damage.dumped(chance, one) + end for one in trees))
        return path, f"{path.name}: record {place}: {how}"
    path_then, how = damage.packed(chance, path)
    if not how:
        how = damage.file(chance, path)
    return path_then, f"{path.name}: {how}"


def jsonl(path: Path, values: list[Any]) -> None:
    path.write_text(
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in values), encoding="utf-8"
    )


def table(path: Path, rows: list[Any], header: str = "") -> None:
    text = "".join("\t".join(map(str, one)) + "\n" for one in rows)
    path.write_text(header + text, encoding="utf-8")


def beir_folder(folder: Path) -> dict[str, Any]:
    """Write a sound folder; the records of its files."""
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
    old = chance.choice([*(one[0] for one in PASSAGES[:3]), "q1", "q2"])
    place = chance.randint(0, len(old))
    new = old[:place] + chance.choice(odd.CONTROLS) + old[place:]
    for path in folder.rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        inside = json.dumps(new)[1:-1] if path.suffix == ".jsonl" else new
        marks = '"{}"' if path.suffix == ".jsonl" else "{}\t"
        path.write_text(text.replace(marks.format(old), marks.format(inside)), encoding="utf-8")
    return f"{old} is {new!r} in all files"


def beir(chance: Random, room: Path) -> Case:
    folder = room / "set"
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
        there = {
            one: next(folder.glob(f"{one}*"), folder / one) for one in [*files, "qrels/dev.tsv"]
        }
        there["corpus.jsonl"] = folder / (
            "corpus.jsonl.gz" if path.name == "corpus.jsonl.gz" else "corpus.jsonl"
        )
        passages = reading.json_passages(there["corpus.jsonl"])
        put = reading.records(there["queries.jsonl"], arrays=False)
        reading.unique([reading.identifier(one, "_id") for one in put])
        known = {
            reading.identifier(one, "_id"): (reading.text(one, "text"), _answers(one), None)
            for one in put
        }
        ids = {one[0] for one in passages} | set(known)
        return right(passages, known, reading.qrels(there["qrels/dev.tsv"], ids))

    names = ("corpus.jsonl", "queries.jsonl", "dev.tsv", "qrels")
    return Case(how, lambda: read(open_collection(str(folder)), "dev"), plain, names)


def _answers(record: dict[str, Any]) -> list[str]:
    metadata = record.get("metadata")
    return reading.answers(
        metadata if "answers" not in record and isinstance(metadata, dict) else record
    )


def asyncval(chance: Random, room: Path) -> Case:
    tokenised = chance.random() < 0.3
    shape = (lambda text: [len(one) for one in text.split()]) if tokenised else (lambda text: text)
    passages = [{"text_id": i, "text": shape(text)} for i, _, text in PASSAGES]
    queries = [{"text_id": i, "text": shape(text)} for i, text, _ in QUERIES]
    shards = room / "candidates"
    shards.mkdir()
    files: dict[str, Any] = {"split00.jsonl": passages[:4], "split01.json": passages[4:]}
    for name, values in files.items():
        jsonl(shards / name, values)
    files["dev.json"] = queries
    jsonl(room / "dev.json", queries)
    table(room / "qrels.tsv", [(q, 0, p, n) for q, p, n in JUDGED])
    name = chance.choice([*files, "qrels.tsv"])
    target = shards / name if name.startswith("split") else room / name
    if name in files and chance.random() < 0.3:
        target.write_bytes(damage.dumped(chance, files[name], chance.choice((None, 1))))
        path, how = hurt(chance, target, None)
    else:
        path, how = hurt(chance, target, files.get(name))
    if chance.random() < 0.1:
        (shards / chance.choice(("README.md", ".DS_Store", "done"))).write_bytes(b"\x00")
    there = {
        one: path if one == name else (shards / one if one.startswith("split") else room / one)
        for one in [*files, "qrels.tsv"]
    }

    def plain() -> Any:
        made = [one for file in ("split00.jsonl", "split01.json") for one in _texts(there[file])]
        made_queries = _texts(there["dev.json"])
        for group in (made, made_queries):
            reading.unique([one[0] for one in group])
            if len({one[3] is None for one in group}) > 1:
                raise UnreadableError("text and token ids")
        if not made:
            raise UnreadableError("no passage")
        known = {one[0]: (one[2], [], one[3]) for one in made_queries}
        ids = {one[0] for one in made} | set(known)
        return right(made, known, reading.qrels(there["qrels.tsv"], ids))

    collection = f"asyncval:{shards}?queries={there['dev.json']}&qrels={there['qrels.tsv']}"
    return Case(how, lambda: read(open_collection(collection), "dev"), plain, (name, "candidates"))


def _texts(path: Path) -> reading.Passages:
    if path.is_dir() or not (path.exists() or path.is_symlink()):
        return []  # what is no file, or not there, is passed over
    made: reading.Passages = []
    for one in reading.records(path):
        text, tokens = reading.text_or_tokens(one.get("text"))
        made.append((reading.identifier(one, "text_id"), "", text, tokens))
    return made


def dpr_table(chance: Random, room: Path) -> Case:
    from mlflow_dr.collection.training_files import corpus_of_file

    rows = [(i, f'"{text.replace(chr(34), chr(34) * 2)}"', title) for i, title, text in PASSAGES]
    table(room / "psgs.tsv", rows, chance.choice(("id\ttext\ttitle\n", "")))
    act = chance.randrange(3)
    if act == 0:
        lines = (room / "psgs.tsv").read_text(encoding="utf-8").split("\n")
        place = chance.randrange(len(lines))
        cells = lines[place].split("\t")
        cell = chance.randrange(len(cells))
        cells[cell] = (
            chance.choice((*odd.STRINGS, '"', 'a "b', '"a', 'a"', '"a"b', '""', "'"))
            .replace("\ud800", "")
            .replace("\udfff", "")
        )
        lines[place] = "\t".join(cells)
        (room / "psgs.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
        path, how = room / "psgs.tsv", f"line {place}, cell {cell} = {cells[cell]!r:.40}"
    else:
        path, how = hurt(chance, room / "psgs.tsv", None)
    return Case(
        how,
        lambda: passages_of(corpus_of_file(path)),
        lambda: reading.table_passages(path),
        ("psgs.tsv",),
    )


KINDS = [Kind("beir", beir, 10), Kind("asyncval", asyncval, 9), Kind("dpr-table", dpr_table, 5)]
