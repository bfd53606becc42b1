"""Damaged entries of the cache: they are rebuilt, with the same result as from an empty cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzzing import damage
from benchmarks.fuzzing.case import AnyOf, Case, Kind
from benchmarks.fuzzing.collections import PASSAGES, QUERIES, jsonl, passages_of
from benchmarks.fuzzing.examples import ours
from benchmarks.fuzzing.layouts import records_of
from mlflow_dr.files import cache_dir


@cache
def tiny() -> Any:
    """A small encoder, the same in every process."""
    import torch

    from mlflow_dr.encoder.backbone import tiny_encoder
    from mlflow_dr.encoder.config import EncoderConfig

    torch.manual_seed(0)
    texts = [f"{title} {text}" for _, title, text in PASSAGES] + [text for _, text, _ in QUERIES]
    return tiny_encoder(
        texts, EncoderConfig(pooling="mean", query_max_length=16, passage_max_length=24)
    ).eval()


def _corpus_file(workdir: Path) -> Path:
    path = workdir / "corpus.jsonl"
    if not path.exists():
        jsonl(path, [{"_id": i, "title": title, "text": text} for i, title, text in PASSAGES])
    return path


def corpora(workdir: Path) -> Any:
    from mlflow_dr.collection.training_files import corpus_of_file

    corpus = corpus_of_file(_corpus_file(workdir))
    ids = [passage[0] for passage in PASSAGES]
    return [
        passages_of(corpus),
        corpus.digest,
        len(corpus),
        corpus.rows_of(ids).tolist(),
        corpus.tie_ranks().tolist(),
    ]


def examples(workdir: Path) -> Any:
    from mlflow_dr.collection.catalogue import open_examples

    if not (workdir / "train.jsonl").exists():
        jsonl(workdir / "train.jsonl", records_of("Tevatron"))
    made = open_examples(workdir / "train.jsonl")
    return [ours(made), made.digest, made.negative_counts().tolist()]


def tokens(workdir: Path) -> Any:
    from mlflow_dr.collection.training_files import corpus_of_file
    from mlflow_dr.encoder.token_table import corpus_tokens, subset_tokens
    from mlflow_dr.encoder.tokenize import TextTokenizer

    encoder = tiny()
    text_tokenizer = TextTokenizer.of(encoder)
    corpus = corpus_of_file(_corpus_file(workdir))
    rows = np.array([1, 3])
    made = [subset_tokens(corpus, rows, text_tokenizer), corpus_tokens(corpus, text_tokenizer)]
    ids, lengths = made[1].packed(np.arange(len(corpus)))
    read = [
        [made[0][int(row)].tolist() for row in rows],
        [made[1][row].tolist() for row in range(len(corpus))],
    ]
    return [read, made[1].lengths.tolist(), ids.tolist(), lengths.tolist()]


def top_passages(workdir: Path) -> Any:
    from mlflow_dr.collection.records import Query, Topics
    from mlflow_dr.collection.training_files import corpus_of_file
    from mlflow_dr.subsets.spec import parse_subset
    from mlflow_dr.subsets.strategies import SubsetSources

    corpus = corpus_of_file(_corpus_file(workdir))
    queries = [Query(query[0], query[1]) for query in QUERIES]
    (term,) = parse_subset("bm25@3").terms
    chosen = term.strategy.choose(term, SubsetSources(corpus, Topics(queries, {})))
    return [rows.tolist() for rows in chosen]


def fidelity(workdir: Path) -> Any:
    from mlflow_dr.fidelity_study.study import cached_array, store_array

    values = {"a": [0.5, 0.25, 1.0], "b": [0.0, 1 / 3, 0.125], "seconds": [1.5, 2.5]}
    if all(cached_array(key) is None for key in values):
        for key, numbers in values.items():
            store_array(key, np.array(numbers))
    arrays = [cached_array(key) for key in values]
    return [None if array is None else array.tolist() for array in arrays]


def entry(read: Callable[[Path], Any], folders: tuple[str, ...]) -> Callable[[Random, Path], Case]:
    """Cases that create a cache entry, damage it, and read it again."""

    def make(chance: Random, workdir: Path) -> Case:
        right = read(workdir)
        folder = cache_dir() / chance.choice(folders)
        # a hidden file is no part of an entry
        paths = (path for path in folder.rglob("*") if not path.name.startswith("."))
        files = sorted(path for path in paths if path.is_file())
        path = chance.choice([file for file in files if file.suffix != ".lock"] * 9 + files)
        act = chance.randrange(14)
        how = f"{path.relative_to(cache_dir()).parts[-1]}: "
        if act == 0:
            (path.parent / chance.choice((".x", "more", f"{path.name}~"))).write_bytes(b"\x00")
            how += "a file more"
        elif act == 1:
            other = chance.choice(files)
            if other != path:
                data = other.read_bytes()
                path.unlink()
                path.write_bytes(data)
            how += "another file of the entry"
        elif act == 2:
            top = next(ancestor for ancestor in (path, *path.parents) if ancestor.parent == folder)
            shutil.rmtree(top) if top.is_dir() else top.unlink()
            if chance.random() < 0.5:
                top.mkdir()
            else:
                top.write_bytes(b"")
            how += "an entry that is empty"
        else:
            data = path.read_bytes()
            path.unlink()  # memory-mapped files stay unchanged
            path.write_bytes(data)
            how += damage.file(chance, path)
        return Case(how, lambda: read(workdir), lambda: right, (), refusable=False)

    return make


def replaced(chance: Random, workdir: Path) -> Case:
    """A file is replaced by another of the same size and modification time."""
    read, name, old, new = chance.choice(
        (
            (corpora, "corpus.jsonl", b"ferry", b"barge"),
            (examples, "train.jsonl", b"tanker", b"vessel"),
        )
    )
    read(workdir)
    path = workdir / name
    state, data = path.stat(), path.read_bytes()
    if chance.random() < 0.5:
        path.unlink()
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    def right() -> Any:
        shutil.rmtree(cache_dir())
        return read(workdir)

    return Case(
        f"{name} replaced by one of its size and time", lambda: read(workdir), right, (), False
    )


def kept(chance: Random, workdir: Path) -> Case:
    """Values of a study: they may be lost, but never wrong."""
    case = entry(fidelity, ("fidelity",))(chance, workdir)
    lossy = [(array, None) for array in case.right()]
    return case._replace(right=lambda: AnyOf(list(map(list, product(*lossy)))))


KINDS = [
    Kind("cache-corpora", entry(corpora, ("corpora",)), 5),
    Kind("cache-tokens", entry(tokens, ("tokens", "tokens", "corpora")), 5, tiny),
    Kind("cache-examples", entry(examples, ("examples",)), 5),
    Kind("cache-top-passages", entry(top_passages, ("top_passages", "top_passages", "corpora")), 4),
    Kind("cache-fidelity", kept, 3),
    Kind("cache-replaced", replaced, 1),
]
