"""A suite on a run: a curve for each collection, and one for their mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from mlflow_dr.collection.suites import NANOBEIR_NAMES
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.report.contents import read_report
from mlflow_dr.report.page import report_page
from mlflow_dr.tracking.checkpoints import publish, run_checkpoints
from mlflow_dr.tracking.following import FollowedRun
from mlflow_dr.tracking.results import mark_failed, record_result
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.tracking.validations import chosen_metric
from mlflow_dr.training.data import validated_dataset
from mlflow_dr.training.parsing import parse_training
from mlflow_dr.validation import encoders
from mlflow_dr.validation.config import ValidateConfig
from mlflow_dr.validation.validate import validate
from mlflow_dr.validation.validator import run_validator
from mlflow_dr.validation.worker import Counts

if TYPE_CHECKING:
    from hub_endpoint import HubEndpoint

HERE = {"device": "cpu", "dtype": "fp32", "follow": False}
PROMPT = "Divers found the wreck upright on a sandy bed. Divers "
REPO = "sentence-transformers/NanoBEIR-en"


@pytest.fixture
def publishing(
    run: TrackedRun, make_tiny: Callable[..., Encoder], tmp_path: Path
) -> Callable[[int], Path]:
    """Publishes an encoder of other weights for each step; returns its directory."""

    def publish_step(step: int) -> Path:
        directory = tmp_path / f"step-{step}"
        save_encoder(directory, make_tiny(seed=step, pooling="mean", normalize=True))
        publish(run, directory, step)
        return directory

    return publish_step


@pytest.fixture
def folders(beir_folder: Callable[..., Path], texts: list[str]) -> list[Path]:
    """Two collections of one passage more and less."""
    return [
        beir_folder(
            {f"p{number}": text for number, text in enumerate(texts[start:])},
            {f"q{number}": text.split(" ", 2)[2] for number, text in enumerate(texts[start:])},
            folder=name,
            dev={f"q{number}": {f"p{number}": 1} for number in range(4)},
        )
        for name, start in (("sea", 0), ("sky", 3))
    ]


def watch(run: TrackedRun, dataset: Any, **fields: Any) -> Counts:
    config = ValidateConfig(dataset=str(dataset), **{**HERE, **fields})
    return run_validator(FollowedRun(run), config, lambda seconds: None)


def values(client: MlflowClient, run: TrackedRun) -> Mapping[str, float]:
    return client.get_run(run.id).data.metrics


def nanobeir(texts: list[str]) -> dict[str, Any]:
    """The files of `NanoBEIR-en`: thirteen small collections, each of other words."""
    words = " ".join(texts).split()
    files: dict[str, Any] = {}
    for number, name in enumerate(NANOBEIR_NAMES, start=3):
        passages = [" ".join(words[i : i + number]) for i in range(0, 60, 3)]
        corpus = [{"_id": f"d{i:02}", "text": text} for i, text in enumerate(passages)]
        # some queries have the id of a passage, as in ArguAna
        queries = [{"_id": f"d{i:02}", "text": words[(i * number) % 70]} for i in range(7)]
        qrels = [
            {"query-id": query["_id"], "corpus-id": f"d{(i * number + j) % 20:02}"}
            for i, query in enumerate(queries)
            for j in range(1 + i % 3)
        ]
        end = f"Nano{name}-00000-of-00001.parquet"
        files |= {f"corpus/{end}": corpus, f"queries/{end}": queries, f"qrels/{end}": qrels}
    return files


def test_nanobeir_equals_the_evaluator_of_sentence_transformers(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], Path],
    hub_endpoint: HubEndpoint,
    texts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator

    hub_endpoint.put(REPO, nanobeir(texts))
    encoder = publishing(10)
    measures = "ndcg@10 mrr@10 recall@10 precision@10"
    assert watch(run, "nanobeir", measures=measures).validations == 14

    def read(_: Any, subset: str, split: str, required_columns: Any) -> Any:
        (file,) = (tmp_path / "hub").glob(f"*/snapshots/*/{subset}/{split}-*")
        return pq.read_table(file).to_pylist()

    monkeypatch.setattr(NanoBEIREvaluator, "_load_dataset_subset_split", read)
    theirs = NanoBEIREvaluator(write_csv=False)(SentenceTransformer(str(encoder), device="cpu"))
    ours = values(client, run)
    for measure in measures.split():
        key = measure.replace("@", "_at_")
        assert ours[f"val/{key}"] == pytest.approx(
            theirs[f"NanoBEIR_mean_cosine_{measure}"], abs=1e-5
        )
        for name in NANOBEIR_NAMES:
            expected = theirs[f"Nano{name}_cosine_{measure}"]
            assert ours[f"val-Nano{name}/{key}"] == pytest.approx(expected, abs=1e-5)
    assert len({ours[f"val-Nano{name}/ndcg_at_10"] for name in NANOBEIR_NAMES}) > 6
    assert str(chosen_metric(run)) == "val/ndcg_at_10"  # the mean decides


def test_each_checkpoint_is_loaded_once_and_each_corpus_encoded_once(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], Path],
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded: list[int] = []
    load = encoders.load_checkpoint
    monkeypatch.setattr(
        encoders,
        "load_checkpoint",
        lambda one, *rest: loaded.append(one.step) or load(one, *rest),
    )
    publishing(1)
    publishing(2)
    suite = "+".join(map(str, folders))
    counts = watch(run, suite, measures="mrr@10")
    assert (counts.done, counts.validations, loaded) == (2, 6, [1, 2])
    for step in (0, 1):
        sea, sky, mean = (
            client.get_metric_history(run.id, f"{name}/mrr_at_10")[step].value
            for name in ("val-sea", "val-sky", "val")
        )
        assert mean == pytest.approx((sea + sky) / 2)
    report = read_report(run)
    assert [curve.subset for curve in report.curves] == ["mean", "full", "full"]
    assert "Validation val on several collections, their mean;" in report_page(report)
    assert watch(run, suite, measures="mrr@10").validations == 0  # nothing is done twice
    assert watch(run, f"{folders[1]}+{folders[0]}", measures="mrr@10").validations == 0
    third = tmp_path / "third.yaml"
    third.write_text(f"sea: {folders[0]}\nsky: {folders[1]}\nsun: {folders[0]}\n")
    with pytest.raises(UsageError, match=r"validation 'val' of run .*: corpus is .* mean_of is"):
        watch(run, third, measures="mrr@10")


def test_a_mean_waits_for_other_validators_and_fails_with_its_collections(
    client: MlflowClient, run: TrackedRun, publishing: Callable[[int], Path], folders: list[Path]
) -> None:
    suite = "+".join(map(str, folders))
    for step in (1, 2):
        publishing(step)
    first, second = sorted(run_checkpoints(run), key=lambda checkpoint: checkpoint.step)
    # another validator has done one collection of the first step, and failed with the second
    done = {"mrr_at_10": 0.25, "seconds": 2.0, "passages_per_second": 5.0}
    record_result(run, first, "val-sea", done, ("sea", "0"))
    mark_failed(run, second, "val-sky", "it is damaged")
    counts = watch(run, suite, measures="mrr@10")
    assert not counts.are_good
    (point,) = client.get_metric_history(run.id, "val/mrr_at_10")
    (sky,) = client.get_metric_history(run.id, "val-sky/mrr_at_10")
    assert (point.step, point.value) == (1, pytest.approx((0.25 + sky.value) / 2))
    tags = client.get_logged_model(second.model_id).tags
    assert "val-sky has failed: it is damaged" in tags["mlflow_dr.validation.val.failed"]


def test_a_directory_of_checkpoints_on_a_suite(
    client: MlflowClient,
    publishing: Callable[[int], Path],
    folders: list[Path],
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    directory = publishing(1)
    fields = {"checkpoints_dir": directory.parent, "measures": "mrr@10", **HERE}
    followed, counts = validate(ValidateConfig(dataset="+".join(map(str, folders)), **fields))
    assert followed.run is not None
    assert counts.validations == 3
    found = values(client, followed.run)
    each = [found[f"val-{name}/mrr_at_10"] for name in ("sea", "sky")]
    assert found["val/mrr_at_10"] == pytest.approx(sum(each) / 2)


def test_training_leaves_a_suite_to_validators(folders: list[Path]) -> None:
    suite = "+".join(map(str, folders))
    flags = ["--dataset", str(folders[0]), "--validation_dataset", suite]
    assert validated_dataset(parse_training(flags).data) == suite
    with pytest.raises(UsageError, match="--validation_split dev is of one collection"):
        validated_dataset(parse_training([*flags, "--validation_split", "dev"]).data)


def test_each_collection_of_a_suite_may_have_prompts_and_subsets(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], Path],
    folders: list[Path],
    tmp_path: Path,
) -> None:
    file = tmp_path / "suite.yaml"
    sea, sky = folders
    file.write_text(f"sea: {{dataset: {sea}, query_prompt: '{PROMPT}'}}\nsky: {sky}\n")
    directory = publishing(1)
    watch(run, file, measures="mrr@10", subset="random:2")
    watch(run, file, measures="mrr@10", name="full")
    found = values(client, run)
    for suffix in ("-random_2", ""):
        name = "val" if suffix else "full"
        each = [found[f"{name}-{member}{suffix}/mrr_at_10"] for member in ("sea", "sky")]
        assert found[f"{name}{suffix}/mrr_at_10"] == pytest.approx(sum(each) / 2)
    plain = load_encoder(directory)
    prompted = load_encoder(directory, query_prompt=PROMPT)
    for encoder, expected in ((plain, False), (prompted, True)):
        config = ValidateConfig(dataset=str(sea), measures="mrr@10", **HERE)
        value = _evaluated(encoder, config)
        assert (value == pytest.approx(found["full-sea/mrr_at_10"])) is expected


def _evaluated(encoder: Encoder, config: ValidateConfig) -> float:
    from mlflow_dr.collection.catalogue import open_collection
    from mlflow_dr.validation.dataset import EvalDataset
    from mlflow_dr.validation.evaluate import evaluate

    (validation,) = config.all_validations
    data = EvalDataset(open_collection(str(config.dataset)), "dev")
    report = evaluate(encoder, data, validation.settings, quiet=True)
    return next(iter(report.measures.values()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refine": "full@3", "subset": "bm25@5"}, "refine: a suite has no single best"),
        ({"keep_up": True, "subset": ("bm25@5", "full")}, "keep_up chooses among subsets of one"),
        ({"split": "tset"}, r"sea.split: .* has no split 'tset'"),
    ],
)
def test_what_a_suite_cannot_do(folders: list[Path], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ValidateConfig(dataset="+".join(map(str, folders)), **fields)


def test_collections_with_other_measures_have_no_mean(folders: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "suite.yaml"
    lines = itertools.zip_longest(("sea", "sky"), folders, ("mrr@10", "ndcg@10"))
    file.write_text("".join(f"{n}: {{dataset: {d}, measures: {m}}}\n" for n, d, m in lines))
    with pytest.raises(UsageError, match="all collections of a suite need the same measures"):
        ValidateConfig(dataset=str(file))
    file.write_text("sea: {dataset: nowhere, colour: red}\n")
    with pytest.raises(UsageError, match="sea: no key 'colour'"):
        ValidateConfig(dataset=str(file))


def test_fewer_dimensions_and_bits_have_curves_of_their_own(
    client: MlflowClient,
    run: TrackedRun,
    publishing: Callable[[int], Path],
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    evaluate_all = encoders.evaluate_all
    monkeypatch.setattr(
        encoders,
        "evaluate_all",
        lambda encoder, pairs, *rest: (
            passes.append(len(pairs)) or evaluate_all(encoder, pairs, *rest)
        ),
    )
    publishing(1)
    sizes = {"dims": "4,16", "precision": "binary", "measures": "mrr@10"}
    watch(run, "+".join(map(str, folders)), **sizes)
    assert passes == [6, 6]  # each corpus is encoded once
    found = values(client, run)
    suffixes = ("", "-binary", "-4d", "-4d-binary", "-16d", "-16d-binary")
    for suffix in suffixes:
        each = [found[f"val-{name}{suffix}/mrr_at_10"] for name in ("sea", "sky")]
        assert found[f"val{suffix}/mrr_at_10"] == pytest.approx(sum(each) / 2)
    assert found["val/mrr_at_10"] > found["val-4d-binary/mrr_at_10"]
    with pytest.raises(UsageError, match=r"dims 4096: the encoder's vectors have"):
        watch(run, folders[0], dims=[4096], name="large", measures="mrr@10")


def test_sizes_of_a_file_may_be_numbers(folders: list[Path]) -> None:
    config = ValidateConfig(
        dataset=str(folders[0]), dims=[8, 16], precision="int8", refine="full@2", subset="bm25@2"
    )
    names = [validation.name for validation in config.all_validations]
    slug = "val-bm25_at_2"
    assert names == [
        *(slug, f"{slug}-int8", f"{slug}-8d", f"{slug}-8d-int8", f"{slug}-16d", f"{slug}-16d-int8"),
        "val",
    ]
    with pytest.raises(UsageError, match="dims 'x': expected whole numbers"):
        ValidateConfig(dims="x")
