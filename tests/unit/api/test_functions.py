"""The commands as functions: keywords, results, and encoders of every kind."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

import mlflow_dr
from mlflow_dr.api import options
from mlflow_dr.api.keywords import keyword_of, known_keywords, make_config
from mlflow_dr.api.training_options import RunOptions, TrainingFlags, TrainOptions
from mlflow_dr.cli.vectors import search_command
from mlflow_dr.config import Config
from mlflow_dr.encoder.arguments import PublishedCheckpoint
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fields import LoadConfig
from mlflow_dr.files import PathLike
from mlflow_dr.mining.mine import MiningConfig
from mlflow_dr.tracking.runs import TrackedRun
from mlflow_dr.training.arguments import (
    DataArguments,
    EngineArguments,
    LossArguments,
    ModelArguments,
    PublishArguments,
    RetrieverTrainingArguments,
)
from mlflow_dr.validation.config import RunConfig, ValidateConfig
from mlflow_dr.validation.evaluate_config import CompareConfig, EvaluateConfig
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig

# each with its TypedDict, and the fields that are arguments or make no sense in Python
FUNCTIONS: dict[str, tuple[type, type[Config], set[str]]] = {
    "load_encoder": (options.LoadOptions, LoadConfig, set()),
    "evaluate": (options.EvaluateOptions, EvaluateConfig, {"encoder", "dataset"}),
    "compare": (options.CompareOptions, CompareConfig, {"operands", "changed"}),
    "validate": (
        options.ValidateOptions,
        ValidateConfig,
        {"run_id", "experiment", "patience_seconds"},
    ),
    "fidelity": (options.FidelityOptions, FidelityConfig, {"run_id"}),
    "encode": (options.EncodeOptions, EncodeConfig, {"encoder", "dataset", "output", "check"}),
    "search": (options.SearchOptions, SearchConfig, {"question", "sources"}),
    "mine": (options.MineOptions, MiningConfig, {"dataset", "output"}),
}
TEXTS = {
    "p1": "The lighthouse stands on a rock.",
    "p2": "Gulls eat fish.",
    "p3": "The ferry leaves the island at six.",
}
QUERIES = {"q1": "what do gulls eat", "q2": "where is the lighthouse"}
JUDGED = {"q1": {"p2": 1}, "q2": {"p1": 1}}
FAST: dict[str, Any] = {"device": "cpu", "dtype": "fp32"}


@pytest.fixture
def folder(beir_folder: Callable[..., Path]) -> Path:
    return beir_folder(TEXTS, QUERIES, train=JUDGED, dev=JUDGED)


@pytest.fixture
def encoder(make_tiny: Callable[..., Encoder]) -> Encoder:
    return make_tiny(pooling="mean", normalize=True)


@pytest.fixture
def directory(encoder: Encoder, tmp_path: Path) -> Path:
    save_encoder(tmp_path / "encoder", encoder)
    return tmp_path / "encoder"


@pytest.fixture
def store(client: MlflowClient) -> Iterator[MlflowClient]:
    """Where MLflow looks, as it is set in a notebook."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(client.tracking_uri)
    yield client
    mlflow.set_tracking_uri(before)


def plain(annotation: Any) -> Any:
    """A type of a configuration without None and without what checks it."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        return plain(arguments[0])
    if type(None) in arguments:
        return plain(arguments[0])
    if typing.get_origin(annotation) is tuple:
        return tuple[plain(arguments[0]), ...]
    return annotation


# what a keyword may be where a configuration has another type
WIDER = {
    Path: PathLike,
    tuple[Path, ...]: options.Paths,
    tuple[str, ...]: options.Texts,
    tuple[int, ...]: int | Sequence[int],
    dict[str, Any]: Mapping[str, Any],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_types_of_keywords_are_those_of_the_flags(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keywords, model, _ = FUNCTIONS[name]
    monkeypatch.setattr(options, "PublishedCheckpoint", PublishedCheckpoint, raising=False)
    monkeypatch.setattr(options, "LoadedEncoder", Encoder, raising=False)
    types = typing.get_type_hints(keywords)
    for keyword, given in types.items():
        kind = plain(model.model_fields[known_keywords(model)[keyword].field].annotation)
        expected = WIDER.get(kind, kind)
        if expected is str:  # may be a path, an encoder, or several words
            assert str in (given, *typing.get_args(given)), keyword
        else:
            assert given == expected or keyword == "dims", keyword


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keywords_are_the_flags(name: str) -> None:
    keywords, model, others = FUNCTIONS[name]
    fields = {
        keyword_of(field, about): field
        for field, about in model.model_fields.items()
        if field not in others
    }
    assert keywords.__annotations__.keys() == fields.keys()
    shown = inspect.signature(getattr(mlflow_dr, name)).parameters
    assert shown.keys() >= fields.keys()
    for keyword, field in fields.items():
        about = model.model_fields[field]
        assert about.description
        line = f"    {keyword}: {' '.join(about.description.split())}\n"
        assert line in f"{getattr(mlflow_dr, name).__doc__}\n"
        if not known_keywords(model)[keyword].is_opposite:
            assert shown[keyword].default == about.default


def test_keywords_of_training_are_its_flags() -> None:
    """All of ours, and of Hugging Face's only such as exist; with the same types."""
    ours = (ModelArguments, LossArguments, DataArguments, PublishArguments, EngineArguments)
    theirs = typing.get_type_hints(RetrieverTrainingArguments)
    flags = {name: kind for part in ours for name, kind in typing.get_type_hints(part).items()}
    arguments = {"model_name_or_path", "dataset_name", "compile_only"}
    common = typing.get_type_hints(TrainingFlags)
    assert flags.keys() - arguments - {"engine"} <= common.keys()
    assert common.keys() - {"config"} <= flags.keys() | theirs.keys()
    for name, given in common.items():
        kind = plain({**theirs, **flags, "config": str}[name])
        if kind in (bool, int, float):
            assert given == kind, name

    own = {keyword_of(name, about) for name, about in RunConfig.model_fields.items()}
    added = typing.get_type_hints(RunOptions).keys() - common.keys()
    assert added - {"training_engine"} == own - common.keys() - {"dataset", "model"}
    assert typing.get_type_hints(TrainOptions).keys() - common.keys() == {"engine"}


def test_each_spelling_of_a_flag_is_a_keyword(tmp_path: Path) -> None:
    values = {"max_lag": 5, "once": True, "metrics": ["mrr@10", "ndcg@10"], "query_file": None}
    config = make_config(ValidateConfig, values, run_id="0", checkpoints_dir=tmp_path)
    assert (config.max_lag_seconds, config.follow) == (5, False)
    assert (config.measures, config.checkpoints_dir) == ("mrr@10 ndcg@10", tmp_path)
    mining = make_config(MiningConfig, {"keep_answers": True}, dataset="demo", output="mined")
    assert not mining.exclude_answers


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mesures": "mrr@10"}, "there is no keyword 'mesures'; did you mean 'measures'"),
        ({"max_lag": "soon"}, "max_lag is 'soon'; expected a number"),
        ({"once": "yes"}, "once is 'yes'; expected True or False"),
    ],
)
def test_wrong_keywords_are_named(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(ValidateConfig, keywords, run_id="0")


def test_an_encoder_is_a_name_or_an_object(
    encoder: Encoder, directory: Path, folder: Path, make_untied_encoder: Callable[..., Encoder]
) -> None:
    library = encoder.sentence_transformer()
    reports = [
        mlflow_dr.evaluate(each, folder, measures=["mrr@10", "ndcg@10"], **FAST)
        for each in (directory, str(directory), encoder, library)
    ]
    assert all(report.ranking == reports[0].ranking for report in reports)
    frame = reports[0].frame()
    assert (list(frame.index), list(frame.columns)) == (["q1", "q2"], ["mrr@10", "ndcg@10"])
    assert "<td>mrr@10</td>" in reports[0]._repr_html_()
    assert repr(reports[0]).startswith("mrr@10\t")
    assert next(encoder.parameters()).dtype.is_floating_point

    loaded = mlflow_dr.load_encoder(directory, q_max_len=7)
    assert loaded.settings.query_max_length == 7
    untied = make_untied_encoder()
    texts = list(QUERIES.values())
    vectors = untied.sentence_transformer().encode_query(texts)
    assert vectors.shape == (2, untied.dimension)
    with pytest.raises(UsageError, match=r"expected the name of an encoder, .* not 3"):
        mlflow_dr.evaluate(3, folder)  # type: ignore[arg-type]


def test_encoders_are_compared(
    encoder: Encoder, directory: Path, folder: Path, make_tiny: Callable[..., Encoder]
) -> None:
    other = make_tiny(seed=1, pooling="mean", normalize=True)
    comparison = mlflow_dr.compare(directory, other, dataset=folder, measure="mrr@10", **FAST)
    assert comparison.labels == (str(directory), "a loaded encoder")
    frame = comparison.frame()
    assert list(frame.columns) == ["query", "A", "B"]
    assert frame.loc["q1", "query"] == "what do gulls eat"
    assert "<svg" in comparison._repr_html_()
    assert "mean of 2 queries" in repr(comparison)


def test_a_question_is_searched(directory: Path, folder: Path, tmp_path: Path) -> None:
    loaded = mlflow_dr.load_encoder(directory)
    vectors = mlflow_dr.encode(loaded, folder, output=tmp_path / "vectors", **FAST)
    assert repr(vectors) == f"{tmp_path}/vectors: 3 vectors of {loaded.dimension} dimensions"
    assert vectors.frame().shape == (3, vectors.open().dimension)
    assert "3 passages" in vectors._repr_html_()
    found = mlflow_dr.search(list(QUERIES.values()), vectors, depth=2)
    report = mlflow_dr.evaluate(directory, folder, keep_own_id=True, depth=1000, **FAST)
    ids = [name for ranked in report.ranking.values() for name, _ in ranked[:2]]
    assert [hit.id for hit in found.hits] == ids
    assert all(hit.text == TEXTS[hit.id] for hit in found.hits)
    frame = found.frame()
    assert list(frame["rank"]) == [1, 2, 1, 2]
    assert "what do gulls eat" in found._repr_html_()
    assert repr(found).startswith("what do gulls eat\n1  ")
    measured = mlflow_dr.search(None, vectors, split="dev", measures="mrr@10")
    assert repr(measured).startswith("mrr@10\t")
    assert measured.frame()["mean"][0] == report.frame()["mrr@10"].mean()

    argv = [str(vectors.path), "--question", "what do gulls eat", "--depth", "1"]
    argv += ["--encoder", str(directory)]
    printed = CliRunner().invoke(search_command, argv).output.splitlines()
    assert printed[0] == "what do gulls eat"
    assert printed[1].split(maxsplit=3)[2:] == [ids[0], TEXTS[ids[0]]]
    with pytest.raises(UsageError, match="question shows passages; leave out --split"):
        mlflow_dr.search("what", vectors, split="dev")
    with pytest.raises(UsageError, match="question is empty"):
        mlflow_dr.search([], vectors)


def test_negatives_are_mined(folder: Path, tmp_path: Path) -> None:
    mined = mlflow_dr.mine(folder, output=tmp_path / "mined.jsonl", negatives=1)
    assert mined.queries == 2


def test_a_run_is_trained_validated_and_studied(
    store: MlflowClient, experiment: str, folder: Path, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:  # as in a thread of an application
        run = threads.submit(
            mlflow_dr.train,
            *(folder, "tiny"),
            max_steps=4,
            publish_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            output_dir=tmp_path / "output",
            experiment_name=store.get_experiment(experiment).name,
            use_cpu=True,
        ).result()
    assert run.steps == [0, 2, 4]
    assert list(run.frame()["step"]) == [1, 2, 3, 4]
    assert "<svg" in run._repr_html_()
    assert repr(run) == f"run {run.name} ({run.id}); checkpoints of steps 0, 2, 4"

    curve = mlflow_dr.validate(run, measures="mrr@10", once=True, **FAST)
    assert list(curve.frame()["step"]) == run.steps
    assert "<svg" in curve._repr_html_()
    assert repr(curve) == f"3 checkpoints of run {run.name}; best: {curve.best}"
    assert curve.best.uri in repr(curve.best)
    assert mlflow_dr.curve(run.name).frame().equals(curve.frame())
    best = mlflow_dr.load_encoder(curve.best)
    report = mlflow_dr.evaluate(best, folder, measures="mrr@10", **FAST)
    assert report.measures["mrr@10"] == pytest.approx(curve.best.first.value)

    study = mlflow_dr.fidelity(run, subset="random:1", steps=[0, 2, 4], resamples=10, **FAST)
    assert list(study.frame().index) == ["full", "random:1"]
    assert "<svg" in study._repr_html_()
    assert "random:1" in repr(study)


def test_flags_of_training_that_do_not_exist_are_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="unknown flag --learning_rat; did you mean --learning_r"):
        mlflow_dr.train(folder, learning_rat=1)
    with pytest.raises(UsageError, match="unknown flag --mesures; did you mean --measures"):
        mlflow_dr.run(folder, "tiny", mesures="mrr@10")
    with pytest.raises(UsageError, match="compile_only trains nothing"):
        mlflow_dr.train(folder, engine="jax", compile_only="v5e:2x4")


def test_a_trainer_and_a_validator_get_their_flags(
    monkeypatch: pytest.MonkeyPatch, measured: Callable, run: TrackedRun, directory: Path
) -> None:
    from mlflow_dr import launch

    calls: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *given: calls.append(given) or run)
    measured(5, 0.5, [0.5])
    curve = mlflow_dr.run("demo", directory, measures="mrr@10", max_steps=4, fp16=False, seed=1)
    ((config, flags),) = calls
    assert config.measures == "mrr@10"
    assert flags[:4] == ["--dataset", "demo", "--model", str(directory)]
    assert flags[4:] == ["--max_steps", "4", "--fp16", "False", "--seed", "1"]
    assert curve.best.checkpoint.step == 5
