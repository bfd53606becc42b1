"""An evaluation against NumPy's sorting and trec_eval's measures."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
from torch import Tensor

from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.encoder import token_table
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import CheckpointError, DataError, DeviceError, UsageError
from mlflow_dr.retrieval import encode, shard_search
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.evaluate import evaluate
from mlflow_dr.validation.report import Report
from mlflow_dr.validation.validations import EvalConfig

MEASURES = "mrr@10 ndcg@10 recall@20 map@5"
SUBJECTS = ("gull", "ship", "otter", "storm", "ferry", "diver", "pilot", "star")
PLACES = ("harbour", "wreck", "mast", "island", "channel", "horizon", "port")


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> Path:
    """112 passages, every text twice, so that scores tie; `q3` is also a passage's id."""
    corpus: dict[str, Any] = {}
    for number in range(2):
        for subject in SUBJECTS:
            for place in PLACES:
                key = f"{subject}-{place}-{number}"
                corpus[key] = (subject, f"the {subject} at the {place} " * (1 + len(place) % 3))
    corpus["q3"] = "the storm at the mast"
    queries = {
        "q1": "gull harbour",
        "q2": "which ship is at the island",
        "q3": "the storm at the mast",
        "q4": "otter",
    }
    return beir_folder(
        corpus,
        queries,
        dev={
            "q1": {"gull-harbour-0": 2, "gull-harbour-1": 1, "star-port-0": 0},
            "q2": {"ship-island-1": 1},
            "q3": {"storm-mast-0": 1, "storm-mast-1": 1, "q3": 1},
            "q4": {f"otter-{place}-0": 1 for place in PLACES},
        },
        small={"q2": {"ship-island-1": 1}},
    )


class Rounded(Encoder):
    """Vectors in 1024ths: their products add up exactly, so that equal texts have equal scores."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (1024 * super().forward(input_ids, attention_mask)).round() / 1024


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch) -> Encoder:
    """A tiny encoder whose vectors are bit-identical in every batch."""
    monkeypatch.setitem(encode.TOKENS_PER_BATCH, "cpu", 1)
    tiny = make_tiny(pooling="mean", normalize=True, query_prompt="find ", passage_max_length=48)
    return Rounded(tiny.backbone, tiny.tokenizer, tiny.settings).eval()


def settings(measures: str = MEASURES, **others: Any) -> EvalConfig:
    return EvalConfig(parse_measures(measures), device="cpu", **({"dtype": "fp32"} | others))


def evaluated(encoder: Encoder, folder: Path, split: str = "dev", **others: Any) -> Report:
    prepared = EvalDataset(BeirFolder(folder), split)
    return evaluate(encoder, prepared, settings(**others), quiet=True)


def independent(
    encoder: Encoder, folder: Path, split: str, keep_own_id: bool, depth: int = 20
) -> tuple[dict[str, list[str]], dict[str, dict[str, float]]]:
    """Rankings and measures with one text at a time, a full sort, and pytrec_eval."""
    collection = BeirFolder(folder)
    topics = collection.topics(split)

    def vector(text: str, length: int) -> np.ndarray:
        batch = encoder.tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            return encoder(batch["input_ids"], batch["attention_mask"])[0].numpy()

    passages = [p for batch in collection.corpus().batches() for p in batch]
    vectors = {p.id: vector(f"{p.title} {p.text}".strip(), 48) for p in passages}
    rankings, runs = {}, {}
    for query in topics.queries:
        asked = vector("find " + query.text, 32)
        scored = [
            (float(asked @ vectors[p.id]), p.id)
            for p in passages
            if keep_own_id or p.id != query.id
        ]
        best = sorted(scored, key=lambda pair: (pair[0], pair[1].encode()), reverse=True)[:depth]
        rankings[query.id] = [pid for _, pid in best]
        runs[query.id] = {pid: float(len(best) - rank) for rank, (_, pid) in enumerate(best)}
    names = {"ndcg_cut.10", "recall.20", "map_cut.5"}
    judged = {q: dict(found) for q, found in topics.qrels.items()}
    full = pytrec_eval.RelevanceEvaluator(judged, names).evaluate(runs)
    tens = {q: dict(list(run.items())[:10]) for q, run in runs.items()}
    mrr = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(tens)
    values = {
        q: {
            "mrr@10": mrr[q]["recip_rank"],
            "ndcg@10": full[q]["ndcg_cut_10"],
            "recall@20": full[q]["recall_20"],
            "map@5": full[q]["map_cut_5"],
        }
        for q in runs
    }
    return rankings, values


@pytest.mark.parametrize(("keep_own_id", "times"), [(False, 1), (True, 0)])
def test_left_out_relevant_passages_log_one_warning(
    encoder: Encoder,
    beir_folder: Callable[..., Path],
    texts: list[str],
    caplog: pytest.LogCaptureFixture,
    keep_own_id: bool,
    times: int,
) -> None:
    numbered = {str(number): text for number, text in enumerate(texts)}
    folder = beir_folder(numbered, {"1": "ships", "2": "iron"}, dev={"1": {"1": 1}, "2": {"2": 0}})
    prepared = EvalDataset(BeirFolder(folder), "dev")
    for _ in range(2):
        evaluate(encoder, prepared, settings("mrr@3", keep_own_id=keep_own_id), quiet=True)
    told = [message for message in caplog.messages if "is relevant" in message]
    assert len(told) == times
    assert all(
        "for 1 queries ('1', ...)" in message and "--keep-own-id" in message for message in told
    )


@pytest.mark.parametrize("keep_own_id", [False, True])
def test_rankings_and_measures_are_those_of_a_full_sort(
    encoder: Encoder, folder: Path, keep_own_id: bool
) -> None:
    rankings, values = independent(encoder, folder, "dev", keep_own_id)
    report = evaluated(encoder, folder, keep_own_id=keep_own_id)
    assert {q: [pid for pid, _ in found] for q, found in report.ranking.items()} == rankings
    for query_id, expected in values.items():
        assert report.per_query[query_id] == pytest.approx(expected)
    for name, mean in report.measures.items():
        assert mean == pytest.approx(np.mean([values[q][name] for q in values]))
    assert 0 < report.measures["mrr@10"] < 1
    assert (report.passages, report.dtype) == (113, "fp32")
    assert report.seconds > 0


def test_a_querys_own_passage_is_left_out_unless_it_is_kept(encoder: Encoder, folder: Path) -> None:
    def ids(**others: Any) -> list[str]:
        return [pid for pid, _ in evaluated(encoder, folder, **others).ranking["q3"]]

    assert "q3" not in ids()
    assert "q3" in ids(keep_own_id=True, depth=113)
    # what takes its place: the depth is reached all the same
    assert len(ids()) == len(ids(keep_own_id=True)) == 20


def test_another_querys_id_is_a_passage_like_any_other(encoder: Encoder, folder: Path) -> None:
    ranking = evaluated(encoder, folder, depth=113).ranking
    assert ["q3" in [pid for pid, _ in ranking[q]] for q in ("q1", "q2", "q3", "q4")] == [
        True,
        True,
        False,
        True,
    ]


def test_queries_of_other_sets_do_not_enter_the_mean(encoder: Encoder, folder: Path) -> None:
    """Two sets of queries over one corpus: a set's mean is over its own queries."""
    whole = evaluated(encoder, folder, "dev")
    small = evaluated(encoder, folder, "small")
    assert small.ranking.keys() == small.per_query.keys() == {"q2"}
    assert small.measures == pytest.approx(whole.per_query["q2"])
    assert whole.per_query.keys() == {"q1", "q2", "q3", "q4"}


def test_judged_queries_that_the_query_file_lacks_do_not_score_0(
    encoder: Encoder, folder: Path
) -> None:
    """One file of judgements for several files of queries, as BEIR's CQADupStack has them."""
    lines = (folder / "queries.jsonl").read_text().splitlines()
    expected = evaluated(encoder, folder).per_query
    (folder / "queries.jsonl").write_text("\n".join(lines[:2]))
    report = evaluated(encoder, folder)
    assert report.per_query.keys() == {"q1", "q2"}
    mean = (expected["q1"]["ndcg@10"] + expected["q2"]["ndcg@10"]) / 2
    assert report.measures["ndcg@10"] == pytest.approx(mean)


@pytest.mark.parametrize("size", [1, 5, 64, 113])
def test_the_result_does_not_depend_on_the_size_of_a_chunk(
    encoder: Encoder, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(encoder, folder)
    monkeypatch.setattr(shard_search, "passages_per_chunk", lambda *_: size)
    report = evaluated(encoder, folder)
    assert report.measures == whole.measures
    for query_id, found in whole.ranking.items():
        assert [pid for pid, _ in report.ranking[query_id]] == [pid for pid, _ in found]


def test_a_corpus_smaller_than_the_depth(encoder: Encoder, folder: Path) -> None:
    report = evaluated(encoder, folder, depth=5000)
    assert {q: len(found) for q, found in report.ranking.items()} == {
        "q1": 113,
        "q2": 113,
        "q3": 112,
        "q4": 113,
    }
    for found in report.ranking.values():
        assert len({pid for pid, _ in found}) == len(found)
        assert all(-1.001 <= score <= 1.001 for _, score in found)


def test_a_depth_that_is_too_shallow(encoder: Encoder, folder: Path) -> None:
    with pytest.raises(UsageError, match=re.escape("depth 19 is too shallow for recall@20")):
        evaluated(encoder, folder, depth=19)


def test_an_unavailable_device_is_refused(encoder: Encoder, folder: Path) -> None:
    with pytest.raises(DeviceError):
        evaluate(
            encoder,
            EvalDataset(BeirFolder(folder), "dev"),
            EvalConfig(parse_measures(MEASURES), device="cuda:99"),
        )


def test_weights_with_nan_give_an_error_and_no_report(encoder: Encoder, folder: Path) -> None:
    broken = copy.deepcopy(encoder)
    broken.backbone.embeddings.word_embeddings.weight.data[:] = torch.nan
    with pytest.raises(CheckpointError, match="4 of 4 query vectors"):
        evaluated(broken, folder)
    # only beyond the longest query
    encoder.backbone.embeddings.position_embeddings.weight.data[32:] = torch.nan
    with pytest.raises(CheckpointError, match=r"\d+ of 113 passage vectors"):
        evaluated(encoder, folder)


def test_another_checkpoint_does_not_tokenise_the_corpus_again(
    make_tiny: Callable[..., Encoder], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = EvalDataset(BeirFolder(folder), "dev")
    first = evaluate(make_tiny(seed=1), prepared, settings(), quiet=True)
    monkeypatch.setattr(token_table, "write_table", lambda *_: pytest.fail("tokenised again"))
    second = evaluate(make_tiny(seed=2), prepared, settings(), quiet=True)
    anew = evaluated(make_tiny(seed=2), folder)
    assert first.ranking != second.ranking
    assert second.ranking == anew.ranking


@pytest.mark.parametrize("name", ["ids.bin", "corpus.arrow"])
def test_a_cache_damaged_during_evaluation_gives_no_report(
    encoder: Encoder, folder: Path, own_cache: Path, name: str
) -> None:
    prepared = EvalDataset(BeirFolder(folder), "dev")
    before = evaluate(encoder, prepared, settings(), quiet=True)
    (path,) = own_cache.rglob(name)
    path.touch()  # another time, and the same contents
    assert evaluate(encoder, prepared, settings(), quiet=True).per_query == before.per_query
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match=f"damaged while it was in use .*{name}"):
        evaluate(encoder, prepared, settings(), quiet=True)
    path.write_bytes(content)


def test_a_cache_replaced_during_evaluation_does_no_harm(
    encoder: Encoder, folder: Path, own_cache: Path
) -> None:
    prepared = EvalDataset(BeirFolder(folder), "dev")
    before = evaluate(encoder, prepared, settings(), quiet=True)
    shutil.rmtree(own_cache)
    assert evaluate(encoder, prepared, settings(), quiet=True).per_query == before.per_query
    again = evaluate(encoder, EvalDataset(BeirFolder(folder), "dev"), settings(), quiet=True)
    assert again.per_query == before.per_query
    assert evaluate(encoder, prepared, settings(), quiet=True).per_query == before.per_query


def test_other_tokenizer_settings_tokenise_the_corpus_again(
    make_tiny: Callable[..., Encoder], folder: Path
) -> None:
    prepared = EvalDataset(BeirFolder(folder), "dev")
    long = evaluate(make_tiny(), prepared, settings(), quiet=True)
    short = evaluate(make_tiny(passage_max_length=3), prepared, settings(), quiet=True)
    assert long.ranking != short.ranking
    assert evaluated(make_tiny(passage_max_length=3), folder).ranking == short.ranking


def test_bf16_is_close_to_fp32_but_not_the_same(
    make_tiny: Callable[..., Encoder], folder: Path
) -> None:
    exact = evaluated(make_tiny(normalize=True), folder, depth=113)
    rough = evaluated(make_tiny(normalize=True), folder, depth=113, dtype="bf16")
    assert rough.dtype == "bf16"
    differences = [
        abs(dict(rough.ranking[query_id])[pid] - score)
        for query_id, found in exact.ranking.items()
        for pid, score in found
    ]
    assert 1e-5 < max(differences) < 0.05
