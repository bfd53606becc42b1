"""The commands as functions: keywords are the flags, and what they return shows itself.

Each function makes the configuration that its command makes, and calls what its command calls.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

from mlflow_dr.api.keywords import keywords, known_keywords, make_config
from mlflow_dr.api.options import (
    CompareOptions,
    EncodeOptions,
    EvaluateOptions,
    FidelityOptions,
    LoadOptions,
    MineOptions,
    Paths,
    SearchOptions,
    Texts,
    ValidateOptions,
)
from mlflow_dr.api.training_options import RunOptions, TrainOptions
from mlflow_dr.encoder.arguments import (
    AnyEncoder,
    encoder_name,
    named_encoder,
    named_or_none,
)
from mlflow_dr.errors import UsageError
from mlflow_dr.fidelity_study.config import FidelityConfig
from mlflow_dr.fields import LoadConfig
from mlflow_dr.files import PathLike
from mlflow_dr.mining.mine import MiningConfig, MiningResult
from mlflow_dr.validation.config import RunConfig, ValidateConfig
from mlflow_dr.validation.evaluate_config import CompareConfig, EvaluateConfig
from mlflow_dr.vectors.config import EncodeConfig, SearchConfig

if TYPE_CHECKING:  # torch and mlflow take seconds to import
    from mlflow_dr.decisions.comparison import Comparison
    from mlflow_dr.encoder.model import Encoder
    from mlflow_dr.fidelity_study.agreement import FidelityResult
    from mlflow_dr.report.contents import RunReport
    from mlflow_dr.report.training import TrainedRun
    from mlflow_dr.validation.report import Report
    from mlflow_dr.vectors.folder import VectorFolder
    from mlflow_dr.vectors.found import Found

LOADED = "a loaded encoder"


class Run(Protocol):
    """What `train` returns."""

    @property
    def id(self) -> str:
        """Of the MLflow run."""


def train(
    dataset: PathLike | None = None,
    model: AnyEncoder | None = None,
    **flags: Unpack[TrainOptions],
) -> TrainedRun:
    """Train an encoder and publish its checkpoints to MLflow, as `mlflow-dr train` does.

    Args:
        dataset: the collection to train on; the built-in demo when None.
        model: the encoder to begin with; what the recipe of the collection says when None.
        flags: all other flags of `mlflow-dr train`, such as `learning_rate=1e-5`; `config` names a
            file of flags.

    Returns:
        The run; it has no id in the processes of torchrun after the first.

    Raises:
        UsageError: an unknown flag or value, or a collection without training examples.
        TrackingError: no server, or the last checkpoint could not be published.
        TrainingError: the loss is not a finite number.
    """
    from mlflow_dr.report.training import TrainedRun, trained_run
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import find_run
    from mlflow_dr.training.parsing import parse_training, training_argv
    from mlflow_dr.training.train import train as train_request

    with named_or_none(model) as name:
        request = parse_training(training_argv({"dataset": dataset, "model": name, **flags}))
        if request.engine.compile_only:
            raise UsageError("compile_only trains nothing; use `mlflow-dr train --compile-only`")
        run_id = train_request(request)
    if not run_id:
        return TrainedRun("", "", (), ())
    return trained_run(find_run(connect(request.publish.tracking_uri), run_id))


def run(
    dataset: PathLike | None = None,
    model: AnyEncoder | None = None,
    **flags: Unpack[RunOptions],
) -> RunReport:
    """Train, and validate each checkpoint at the same time, as `mlflow-dr run` does.

    Args:
        dataset: the collection to train and to validate on; the built-in demo when None.
        model: the encoder to begin with; what the recipe of the collection says when None.
        flags: all other flags of `mlflow-dr run` and of `mlflow-dr train`.

    Returns:
        The curves, and the best checkpoint.

    Raises:
        UsageError: an unknown flag or value, or a collection without training examples.
        TrackingError: no server.
        ChildError: the trainer or the validator ended with an error.
        KeyboardInterrupt: the kernel was interrupted; both processes have ended.
    """
    from mlflow_dr.launch import launch
    from mlflow_dr.report.contents import read_report
    from mlflow_dr.training.parsing import training_argv

    known = known_keywords(RunConfig)
    own = {key: value for key, value in flags.items() if key in known}
    others = {key: value for key, value in flags.items() if key not in known}
    with named_or_none(model) as name:
        config = make_config(RunConfig, own, dataset=dataset, model=name)
        tracked = launch(config, [*config.training_flags, *training_argv(others, known)])
    tracked.fetch()
    return read_report(tracked, config.metric)


@keywords(ValidateOptions, ValidateConfig)
def validate(run: str | Run | None = None, **options: Unpack[ValidateOptions]) -> RunReport:
    """Validate each checkpoint of a run or a directory, now and as they come, until it is over.

    Args:
        run: what `train` returned, the id of a run, the beginning of its id, or its name; with
            `checkpoints_dir`, where the figures go, a new run when None.
        options: the flags of `mlflow-dr validate`.

    Returns:
        The curves, and the best checkpoint.

    Raises:
        UsageError: neither a run nor a directory, or a name that stands for another validation.
        TrackingError: no such run, no server, or no checkpoint has a value.
        UnavailableError: checkpoint after checkpoint cannot be read on this machine.
    """
    from mlflow_dr.report.contents import read_report
    from mlflow_dr.validation.validate import validate as validate_config

    config = make_config(ValidateConfig, options, run_id=_run_id(run))
    if config.experiment is not None:
        raise UsageError("an experiment is followed by `mlflow-dr validate --experiment`")
    followed, _ = validate_config(config)
    first = config.all_validations[0]
    metric = config.metric or f"{first.name}/{first.settings.measures[0].metric}"
    tracked = followed.run
    if tracked is None:
        raise UsageError("an experiment has no curve of its own")
    tracked.fetch()
    return read_report(tracked, metric)


def curve(
    run: str | Run, *, metric: str | None = None, tracking_uri: str | None = None
) -> RunReport:
    """Read the curves of a run, also while it is going on, as `mlflow-dr report` does.

    Args:
        run: what `train` returned, the id of a run, the beginning of its id, or its name.
        metric: decides which checkpoint is best (default: the first measure of the validation that
            began first).
        tracking_uri: the tracking server (default: MLFLOW_TRACKING_URI).

    Returns:
        The curves, and the best checkpoint.

    Raises:
        UsageError: the run has no such metric.
        TrackingError: no such run, no server, or no checkpoint has a value.
    """
    from mlflow_dr.report.contents import read_report
    from mlflow_dr.tracking.client import connect
    from mlflow_dr.tracking.runs import resolve_run

    client = connect(tracking_uri, may_create=False)
    return read_report(resolve_run(client, _run_id(run) or ""), metric)


@keywords(EvaluateOptions, EvaluateConfig)
def evaluate(
    encoder: AnyEncoder, dataset: PathLike | None = None, **options: Unpack[EvaluateOptions]
) -> Report:
    """Measure an encoder on a collection, without tracking.

    Args:
        encoder: what is measured.
        dataset: demo, msmarco, a folder, irds:<id>, a hub name, or a suite such as nanobeir.
        options: the flags of `mlflow-dr evaluate`.

    Returns:
        The measures, the values of each query and the ranking.

    Raises:
        UsageError: an unknown dataset, split, device or encoder, or a file that exists already.
        DataError: the collection's files are damaged.
        CheckpointError: the encoder's files are damaged.
    """
    from mlflow_dr.validation.evaluate import evaluate_encoder

    with named_encoder(encoder) as name:
        return evaluate_encoder(make_config(EvaluateConfig, options, encoder=name, dataset=dataset))


@keywords(CompareOptions, CompareConfig)
def compare(*encoders: AnyEncoder, **options: Unpack[CompareOptions]) -> Comparison:
    """Compare two or more encoders with the first of them, query by query.

    Args:
        encoders: runs by id or name (their best checkpoints), RUN@STEP, or encoders, which need
            `dataset`.
        options: the flags of `mlflow-dr compare`.

    Returns:
        Means, and the differences with their intervals and p-values.

    Raises:
        UsageError: an encoder, dataset, split or measure that does not exist, or values of
            different collections.
        DataError: values or files are damaged.
        CheckpointError: a checkpoint cannot be evaluated.
        TrackingError: no such run or checkpoint, or no server.
    """
    from mlflow_dr.validation.compare import compare as compare_config

    with ExitStack() as stack:
        names = [stack.enter_context(named_encoder(encoder)) for encoder in encoders]
        config = make_config(CompareConfig, options, operands=names)
        comparison = compare_config(config)
    loaded = {
        name for name, given in zip(names, encoders, strict=True) if encoder_name(given) is None
    }
    labels = tuple(LOADED if label in loaded else label for label in comparison.labels)
    return replace(comparison, labels=labels)


@keywords(FidelityOptions, FidelityConfig)
def fidelity(run: str | Run | None = None, **options: Unpack[FidelityOptions]) -> FidelityResult:
    """Find the subset of the corpus that chooses the right checkpoint in the least time.

    Args:
        run: what `train` returned, the id of a run, the beginning of its id, or its name.
        options: the flags of `mlflow-dr fidelity`.

    Returns:
        The figures of each subset, and which one to validate on.

    Raises:
        UsageError: neither a run nor a directory, no subset, or fewer than three checkpoints.
        DataError: the collection's files are damaged.
        TrackingError: no such run, or no server.
    """
    from mlflow_dr.fidelity_study.run_study import fidelity as fidelity_config

    return fidelity_config(make_config(FidelityConfig, options, run_id=_run_id(run)))


@keywords(EncodeOptions, EncodeConfig)
def encode(
    encoder: AnyEncoder,
    dataset: PathLike | None = None,
    *,
    output: PathLike,
    **options: Unpack[EncodeOptions],
) -> VectorFolder:
    """Encode the passages of a collection, or the queries of a split, into files of vectors.

    Args:
        encoder: what encodes.
        dataset: demo, msmarco, a folder, irds:<id>, or a hub name.
        output: the folder to write. If it has a part of these vectors already, that is kept.
        options: the flags of `mlflow-dr encode`.

    Returns:
        The folder, which `search` takes.

    Raises:
        UsageError: an unknown dataset, split, device or encoder, or a folder with other vectors.
        DataError: the collection's files are damaged.
        CheckpointError: the encoder's files are damaged, or it gives NaN.
    """
    from mlflow_dr.vectors.encoding import encode as encode_config
    from mlflow_dr.vectors.folder import VectorFolder

    with named_encoder(encoder) as name:
        config = make_config(EncodeConfig, options, encoder=name, dataset=dataset, output=output)
        return VectorFolder(Path(output), encode_config(config), encoder)


@keywords(SearchOptions, SearchConfig)
def search(question: Texts | None, sources: Paths, **options: Unpack[SearchOptions]) -> Found:
    """Find the passages for a question, or rank passages for the queries of a split and measure.

    Args:
        question: one or several texts; None for the queries of `queries` or `split`.
        sources: a folder that `encode` has written, or Parquet files of other programs.
        options: the flags of `mlflow-dr search`.

    Returns:
        The passages of each question, with scores and texts; or the measures of a split.

    Raises:
        UsageError: vectors of different encoders or corpora, or nothing to search for.
        DataError: a file is damaged.
        CheckpointError: the encoder gives NaN.
    """
    from mlflow_dr.vectors.folder import VectorFolder
    from mlflow_dr.vectors.searching import search as search_config

    if question is not None and not question:
        raise UsageError("question is empty; give a text, or None for the queries of a split")
    encoder = options.get("encoder")
    if encoder is None and isinstance(sources, VectorFolder):
        encoder = sources.encoder
    with named_or_none(encoder) as name:
        others = {**options, "encoder": name}
        return search_config(make_config(SearchConfig, others, question=question, sources=sources))


@keywords(MineOptions, MiningConfig)
def mine(dataset: PathLike, *, output: PathLike, **options: Unpack[MineOptions]) -> MiningResult:
    """Find hard negatives for training queries; `train_dir` of `train` reads the file.

    Args:
        dataset: demo, msmarco, a folder, irds:<id>, or a hub name.
        output: the training file to write, as JSON lines; compressed if it ends in .gz.
        options: the flags of `mlflow-dr mine`; `miner` is the flag `--with`.

    Returns:
        How many queries and negatives the file has.

    Raises:
        UsageError: an unknown dataset, encoder or rule, or a file that exists already.
        DataError: the collection's files are damaged.
    """
    from mlflow_dr.mining.mine import mine as mine_config

    with named_or_none(options.get("miner")) as name:
        others = {**options, "miner": name}
        return mine_config(make_config(MiningConfig, others, dataset=dataset, output=output))


@keywords(LoadOptions, LoadConfig)
def load_encoder(encoder: AnyEncoder, **options: Unpack[LoadOptions]) -> Encoder:
    """Load an encoder; `sentence_transformer()` gives it as an object of that library.

    Args:
        encoder: a directory, a hub name, `models:/...`, or a checkpoint such as `curve.best`.
        options: what replaces settings of the encoder, by the names of the flags.

    Returns:
        The encoder in fp32 on the processor, in evaluation mode.

    Raises:
        UsageError: no encoder has this name.
        TrackingError: no such model, or no server.
        CheckpointError: its files are damaged, missing or of an unknown kind.
    """
    from mlflow_dr.tracking.encoders import open_encoder

    config = make_config(LoadConfig, options)
    with named_encoder(encoder) as name:
        return open_encoder(
            name,
            config.tracking_uri,
            trust_remote_code=config.trust_remote_code,
            **config.encoder_changes,
        )


def _run_id(run: str | Run | None) -> str | None:
    return run if run is None or isinstance(run, str) else run.id
