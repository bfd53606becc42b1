"""What all cells of a loader study load: the passages, their tokenizer, and the order of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from mlflow_dr.cache import cache_entry
from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.records import Passage
from mlflow_dr.encoder.config import EncoderConfig
from mlflow_dr.encoder.files import encoder_directory
from mlflow_dr.encoder.tokenize import TextTokenizer, load_tokenizer
from mlflow_dr.errors import DataError, UsageError, quoted
from mlflow_dr.files import digest_of
from mlflow_dr.stores.store import DocumentStore

LAYOUT = 1
WORDS_PER_PASSAGE = 59  # as in MS MARCO
PASSAGES_OF_WORDS = 20_000  # whose words generated passages are made of
PASSAGES_PER_DRAW = 10_000
PASSAGES_OF_VOCABULARY = 20_000
COMPARED = 1000
NULL = "null"


def enlarged(corpus: Corpus, n_passages: int | None, seed: int) -> Corpus:
    """The corpus and, after its passages, generated ones up to a number.

    A generated passage has 59 words, drawn from the corpus as often as they occur there, so that
    tokenising it takes as long as real text of that length.

    Args:
        corpus: the real passages.
        n_passages: how many there are in the end; those of the corpus when None.
        seed: random seed of the words.

    Raises:
        UsageError: the corpus is larger, or has token ids instead of text.
    """
    if corpus.tokenised:
        raise UsageError("the passages of this dataset are token ids; a study needs their text")
    if n_passages is None or n_passages == len(corpus):
        return corpus
    if n_passages < len(corpus):
        raise UsageError(
            f"--passages {n_passages}: the dataset has {len(corpus)} passages; name as many or more"
        )
    return cached_corpus(
        digest_of("loaders", LAYOUT, corpus.digest, n_passages, seed),
        chain(
            chain.from_iterable(corpus.batches()),
            generated_passages(corpus, n_passages - len(corpus), seed),
        ),
        n_passages,
        "passages of a loader study",
    )


def generated_passages(corpus: Corpus, count: int, seed: int) -> Iterator[Passage]:
    """Passages of words of a corpus.

    Raises:
        DataError: the corpus has no words.
    """
    some = islice(chain.from_iterable(corpus.batches()), PASSAGES_OF_WORDS)
    words = [word for passage in some for word in passage.text.split()]
    if not words:
        raise DataError("passages cannot be generated, because the dataset has no words")
    prefix = "generated-"
    while pc.any(pc.starts_with(corpus.ids, prefix)).as_py():
        prefix += "more-"
    generator = np.random.default_rng(seed)
    for start in range(0, count, PASSAGES_PER_DRAW):
        size = (min(PASSAGES_PER_DRAW, count - start), WORDS_PER_PASSAGE)
        for number, drawn in enumerate(generator.integers(len(words), size=size).tolist()):
            text = " ".join([words[index] for index in drawn])
            yield Passage(f"{prefix}{start + number}", "", text)


def write_sampled_rows(directory: Path, n_passages: int, count: int, seed: int) -> Path:
    """Write the rows that every cell reads, in this order, `(count,) int64`; returns the file."""
    path = directory / "rows.npy"
    rows = np.random.default_rng(seed).integers(n_passages, size=count, dtype=np.int64)
    np.save(path, rows)
    return path


def document_tokenizer(name: str, max_length: int) -> TextTokenizer:
    """The tokenizer of an encoder, without its prompts: cells load documents, whatever is trained.

    Args:
        name: directory or hub name of the encoder.
        max_length: the most tokens of a document.

    Raises:
        UsageError: no encoder has this name.
    """
    tokenizer = load_tokenizer(str(encoder_directory(name)))
    return TextTokenizer(tokenizer, EncoderConfig(passage_max_length=max_length))


def tiny_encoder_directory(corpus: Corpus, max_length: int) -> Path:
    """A small encoder whose vocabulary is learnt from the corpus, made once and cached."""

    def write(partial: Path) -> None:
        import torch

        from mlflow_dr.encoder.backbone import tiny_encoder
        from mlflow_dr.encoder.saving import save_encoder

        some = islice(chain.from_iterable(corpus.batches()), PASSAGES_OF_VOCABULARY)
        config = EncoderConfig(passage_max_length=max_length, query_max_length=max_length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_encoder(partial, tiny_encoder((passage.text for passage in some), config))

    return cache_entry("loaders", digest_of("tiny", LAYOUT, corpus.digest, max_length), write)


def check_stores(
    stores: Mapping[str, DocumentStore],
    corpus: Corpus,
    text_tokenizer: TextTokenizer | None,
    seed: int,
) -> None:
    """Compare what stores give with the corpus: 1,000 random passages, the first and the last.

    Args:
        stores: name -> store, all made of this corpus.
        corpus: the passages.
        text_tokenizer: of the store `tokens`; None without it.
        seed: random seed of the rows.

    Raises:
        DataError: a store gives something else, with its name and the passage.
    """
    generator = np.random.default_rng(seed)
    rows = [0, len(corpus) - 1, *generator.integers(len(corpus), size=COMPARED).tolist()]
    passages = corpus.passages(rows)
    for name, store in stores.items():
        if name == NULL:
            continue
        if len(store) != len(corpus):
            raise DataError(f"store {name}: {len(store)} passages instead of {len(corpus)}")
        found = store.get_many(rows)
        if store.holds == "tokens" and text_tokenizer is not None:
            token_ids = text_tokenizer.passage_ids(passages)
            equal = [list(a) == list(b) for a, b in zip(found, token_ids, strict=True)]
        else:
            equal = [a[1:3] == b[1:3] for a, b in zip(found, passages, strict=True)]
        if not all(equal):
            row = rows[equal.index(False)]
            raise DataError(
                f"store {name}: something else than the corpus has for passage "
                f"{quoted(corpus[row].id)} (row {row}); remove the store from the cache"
            )
