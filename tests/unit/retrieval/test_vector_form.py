"""Fewer dimensions and fewer bits, compared with sentence-transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mlflow_dr.collection.corpus import Corpus, cached_corpus
from mlflow_dr.collection.records import Passage, Query
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.errors import UsageError
from mlflow_dr.retrieval import vector_form
from mlflow_dr.retrieval.dense import SearchRequest, dense_search
from mlflow_dr.retrieval.vector_form import (
    VectorForm,
    forms,
    parse_dims,
    parse_precisions,
    ranges_of,
    sampled_rows,
)


@pytest.fixture
def vectors() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(500, 48, generator=generator)
    made[:, 3] = 0.5  # a dimension without a range
    return torch.nn.functional.normalize(made, dim=1)


@pytest.mark.parametrize("dims", [None, 16, 48])
def test_truncation_equals_the_library(vectors: Tensor, dims: int | None) -> None:
    from sentence_transformers.util import truncate_embeddings

    theirs = truncate_embeddings(vectors, dims)
    torch.testing.assert_close(VectorForm(dims).truncated(vectors), theirs, rtol=0, atol=0)
    normalized = torch.nn.functional.normalize(theirs, dim=1)
    ours = VectorForm(dims, normalize=True).truncated(vectors)
    torch.testing.assert_close(ours, normalized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dims", [None, 20])
def test_quantised_vectors_equal_the_library(vectors: Tensor, dims: int | None) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    floats = VectorForm(dims).truncated(vectors).numpy()
    codes = quantize_embeddings(floats, "int8").astype(np.float64) + 128
    starts, ends = floats.min(axis=0), floats.max(axis=0)
    steps = np.where(ends == starts, 1, (ends - starts) / 255)
    ours = VectorForm(dims, "int8").stored(vectors, ranges_of(floats)).numpy()
    np.testing.assert_allclose(ours, starts + codes * steps, rtol=0, atol=1e-6)

    bits = np.unpackbits(quantize_embeddings(floats, "ubinary"), axis=1)[:, : floats.shape[1]]
    ours = VectorForm(dims, "binary").stored(vectors).numpy()
    np.testing.assert_array_equal(ours, bits.astype(np.float32) * 2 - 1)


def _corpus(texts: list[str]) -> Corpus:
    words = " ".join(texts).split()
    passages = (
        Passage(f"p{number:03}", "", " ".join(words[number % 70 : number % 70 + 3 + number % 5]))
        for number in range(90)
    )
    return cached_corpus("forms", passages)


@pytest.mark.parametrize("normalize", [True, False])
def test_one_pass_ranks_every_form_as_the_library_does(
    make_tiny: Callable[..., Encoder],
    texts: list[str],
    normalize: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from sentence_transformers.util import truncate_embeddings
    from sentence_transformers.util.quantization import quantize_embeddings

    from mlflow_dr.retrieval.encode import encode_all
    from mlflow_dr.stores.token_table import token_table

    caplog.set_level(logging.ERROR)
    encoder = make_tiny(pooling="mean", normalize=normalize)
    corpus = _corpus(texts)
    queries = [Query(f"q{number}", text) for number, text in enumerate(texts)]
    tokenizer = TextTokenizer.of(encoder)
    table = corpus_tokens(corpus, tokenizer)
    wanted = forms((8, 24), ("int8", "binary"))
    requests = [
        SearchRequest(queries, 5, form=VectorForm(form.dims, form.precision, normalize))
        for form in wanted
    ]
    found = dense_search(encoder, tokenizer, requests, table, corpus.tie_ranks(), quiet=True)

    passages = encode_all(encoder, table, tokenizer.pad_id)
    asked = encode_all(encoder, token_table(tokenizer.query_ids(queries)), tokenizer.pad_id)
    for form, result in zip(wanted, found, strict=True):
        small, of_queries = (
            truncate_embeddings(each, form.dims).clone() for each in (passages, asked)
        )
        if normalize and form.dims:
            small, of_queries = (
                torch.nn.functional.normalize(each, dim=1) for each in (small, of_queries)
            )
        stored = small.numpy().astype(np.float64)
        if form.precision == "int8":
            ends = np.ptp(stored, axis=0)
            codes = quantize_embeddings(small.numpy(), "int8").astype(np.float64) + 128
            stored = stored.min(axis=0) + codes * np.where(ends == 0, 1, ends / 255)
        elif form.precision == "binary":
            bits = np.unpackbits(quantize_embeddings(small.numpy(), "ubinary"), axis=1)
            stored = bits[:, : small.shape[1]] * 2.0 - 1
        scores = of_queries.numpy().astype(np.float64) @ stored.T
        best = -np.sort(-scores, axis=1)[:, :5]
        np.testing.assert_allclose(result.scores, best, rtol=0, atol=1e-5)
        at_rows = np.take_along_axis(scores, result.rows, 1)
        np.testing.assert_allclose(result.scores, at_rows, rtol=0, atol=1e-5)


def test_more_dimensions_than_there_are(
    make_tiny: Callable[..., Encoder], texts: list[str]
) -> None:
    encoder = make_tiny()
    tokenizer = TextTokenizer.of(encoder)
    corpus = _corpus(texts)
    request = SearchRequest([Query("q", "t")], 1, form=VectorForm(10_000))
    with pytest.raises(UsageError, match=rf"dims 10000: .* have {encoder.dimension} dimensions"):
        dense_search(
            encoder, tokenizer, [request], corpus_tokens(corpus, tokenizer), corpus.tie_ranks()
        )


def test_the_sample_of_ranges_depends_on_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_form, "SAMPLE", 10)
    rows = np.arange(0, 100, 2)
    sample = sampled_rows(rows)
    assert len(set(sample.tolist()) & set(rows.tolist())) == 10
    assert sample.tolist() == sampled_rows(rows).tolist() == sorted(sample.tolist())
    assert sampled_rows(rows[:10]).tolist() == rows[:10].tolist()


def test_forms_begin_with_all_of_the_vector() -> None:
    assert [form.slug for form in forms((64,), ("int8", "binary"))] == [
        *("", "int8", "binary", "64d", "64d-int8", "64d-binary")
    ]
    assert parse_dims(["64,256", "8"]) == (64, 256, 8)
    assert parse_precisions(["float32, int8"]) == ("float32", "int8")


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (parse_dims, "64,0", "dims '0': expected whole numbers above 0"),
        (parse_dims, "", "dims ''"),
        (parse_dims, "-3", "dims '-3'"),
        (parse_dims, "1e3", "dims '1e3'"),
        (parse_dims, "64,64", "dims: a value stands twice"),
        (parse_precisions, "int4", "precision 'int4': expected some of float32, int8, binary"),
        (parse_precisions, "int8,int8", "precision: a value stands twice"),
    ],
)
def test_malformed_values(read: Callable[[list[str]], object], text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read([text])
