"""Compare encoders on the same queries, by values that validators have kept or by evaluating now.

If all values are kept torch is not needed. It takes seconds to import, so it is imported late.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow_dr.collection.catalogue import chosen_split, open_collection
from mlflow_dr.collection.records import Query
from mlflow_dr.decisions.best import find_best
from mlflow_dr.decisions.comparison import (
    LETTERS,
    Comparison,
    check_comparison_output,
    check_count,
    compare_values,
    write_comparison,
)
from mlflow_dr.encoder.config import changes_of
from mlflow_dr.errors import MlflowDrError, NoValuesError, TrackingError, UsageError
from mlflow_dr.retrieval.measures import (
    DEFAULT_MEASURES,
    OF_READER,
    Measure,
    answers_depth,
    recorded_measures,
)
from mlflow_dr.tracking.artifacts import PerQuery, per_query_values
from mlflow_dr.tracking.checkpoints import Checkpoint, checkpoint_of_step
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.encoders import MODEL_SCHEME, open_encoder
from mlflow_dr.tracking.registry import checkpoint_by_uri
from mlflow_dr.tracking.runs import TrackedRun, find_run, resolve_run
from mlflow_dr.tracking.validations import (
    Metric,
    config_differences,
    metric_error,
    run_validations,
    validation_collection,
)
from mlflow_dr.validation.evaluate_config import CompareConfig
from mlflow_dr.validation.validations import EvalConfig

if TYPE_CHECKING:
    from mlflow_dr.validation.dataset import EvalDataset

log = logging.getLogger(__name__)

# keys of a validation's configuration that must be equal for values to be comparable
COMPARABLE = ("corpus", "topics", "subset", "keep_own_id", "results", "gold_passages")
OF_ANSWERS = ("match", "answers")
FULL_CORPUS = "full"
AUTO = "auto"
RUN = re.compile(r"([^/\\]+?)(?:@(\d+))?")
RUN_ID = re.compile(r"[0-9a-f]{32}")
# keys of a validation's configuration that replace the checkpoint's own settings
ENCODER_CHANGES = ("pooling", "normalize", "query_max_length", "passage_max_length", "tokenizer")


@dataclass(frozen=True)
class Operand:
    """An encoder that is compared.

    Attributes:
        given: what the user wrote.
        run: the run that published it; None for an encoder.
        checkpoint: None for an encoder.
        config: the validation's configuration on that run; empty if it has none.
    """

    given: str
    run: TrackedRun | None = None
    checkpoint: Checkpoint | None = None
    config: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in the comparison."""
        if self.run is None or self.checkpoint is None:
            return self.given
        return f"{self.run.name} step {self.checkpoint.step}, {self.checkpoint.uri}"

    @property
    def encoder_changes(self) -> dict[str, Any]:
        """What the validation replaces of the encoder's settings."""
        return {key: self.config[key] for key in ENCODER_CHANGES if key in self.config}


def find_operands(
    operands: Sequence[str], name: str, measure: Measure | None, tracking_uri: str | None = None
) -> list[Operand]:
    """The encoders that operands stand for; a server is requested only if one of them may be on it.

    Args:
        operands: `RUN` (an id, the beginning of one, or a name), `RUN@STEP`, what
            `checkpoint_by_uri` takes, or an encoder's directory or hub name.
        name: the validation by which a run's best checkpoint is chosen.
        measure: the measure by which it is chosen; the validation's first when None.
        tracking_uri: where runs and checkpoints are looked up.

    Raises:
        UsageError: a run has no such step, validation or measure.
        TrackingError: no such run or checkpoint, nothing was measured, or no server.
    """
    connected = cache(lambda: connect(tracking_uri, may_create=False))

    def find_operand_run(text: str) -> TrackedRun | None:
        """The run; None if the text can only be an encoder's name."""
        try:
            return resolve_run(connected(), text)
        except UsageError:  # several runs
            raise
        except TrackingError:
            if RUN_ID.fullmatch(text):
                raise
            return None

    def find(text: str) -> Operand:
        if text.startswith(MODEL_SCHEME):
            checkpoint = checkpoint_by_uri(connected(), text)
            if not checkpoint.run_id:
                return Operand(text)
            run = find_run(connected(), checkpoint.run_id)
            return Operand(text, run, checkpoint, run_validations(run).get(name, {}))
        match = RUN.fullmatch(text)
        named = find_operand_run(match[1]) if match and not Path(text).is_dir() else None
        if match is None or named is None:
            return Operand(text)
        config = run_validations(named).get(name, {})
        if match[2] is not None:
            return Operand(text, named, checkpoint_of_step(named, int(match[2])), config)
        if not config:
            raise UsageError(
                f"run {named.id} has no validation {name!r} to choose its best checkpoint by; give "
                "another --name, or RUN@STEP"
            )
        metric = (measure or recorded_measures(str(config["measures"]))[0]).metric
        return Operand(text, named, find_best(named, f"{name}/{metric}").checkpoint, config)

    return [find(text) for text in operands]


class Lengths(NamedTuple):
    """The longest query and passage of an encoder, in tokens; None if it is unknown."""

    queries: int | None
    passages: int | None


def compare(config: CompareConfig) -> Comparison:
    """Compare encoders with the first of them, and write what was asked for.

    Raises:
        UsageError: an operand, dataset, split, measure or device that does not exist, or operands
            that were measured on other collections.
        DataError: values or files that are damaged, or of other queries.
        CheckpointError: a checkpoint that cannot be evaluated.
        TrackingError: no such run or checkpoint, or no server.
    """
    check_count(len(config.operands))
    measure = _measure(config.measure)
    if config.output is not None and config.output.exists() and not config.output.is_dir():
        raise UsageError(f"{config.output}: expected a folder, not a file")
    check_comparison_output(config.output, config.force)
    if config.dataset is not None:
        _check_device(config)
    operands = find_operands(config.operands, config.name, measure, config.tracking_uri)
    kept = [_kept_values(operand, config.name) for operand in operands]
    measured = [
        operand for operand, (values, _) in zip(operands, kept, strict=True) if values is not None
    ]
    basis = measured[0].config if measured else {}
    data = _eval_dataset(config, basis, measured[0].run if measured else None)
    measures = recorded_measures(str(basis.get("measures") or config.measure or DEFAULT_MEASURES))
    compared = measure or measures[0]
    match = str(basis.get("match", config.match))
    _refuse_other_queries(measured, data, basis, compared, match)
    tables: list[PerQuery] = []
    lengths: list[Lengths] = []
    for operand, (values, why_not) in zip(operands, kept, strict=True):
        if values is None:
            if OF_READER.fullmatch(measures[0]):
                raise UsageError(f"{why_not}; validate it by `mlflow-dr reader-validate` first")
            if data is None:
                raise UsageError(f"{why_not}; give --dataset to evaluate it now")
            values, own_lengths = _evaluate(operand, config, data, measures, basis)
            lengths.append(own_lengths)
        else:
            lengths.append(_known_lengths(operand))
        tables.append(values)
    _warn_of_lengths(lengths)
    comparison = compare_values(
        [operand.label for operand in operands],
        tables,
        str(compared),
        config.seed,
        {query.id: query.text for query in _queries(config.name, measured, data)},
        [
            metric_error(operand.checkpoint, Metric(config.name, compared.metric))
            if operand.checkpoint is not None
            else 0.0
            for operand in operands
        ],
    )
    if config.output is not None:
        write_comparison(comparison, config.output)
    return comparison


def _measure(text: str | None) -> Measure | None:
    if text is None:
        return None
    measures = recorded_measures(text)
    if len(measures) != 1:
        raise UsageError(f"expected one measure, not {len(measures)}: {text!r}")
    return measures[0]


def _check_device(config: CompareConfig) -> None:
    from mlflow_dr.devices import resolve_devices, resolve_dtype

    resolve_dtype(config.dtype, resolve_devices(config.device)[0])


def _kept_values(operand: Operand, name: str) -> tuple[PerQuery | None, str]:
    """The values that a validator has kept, or why there are none."""
    if operand.run is None or operand.checkpoint is None:
        forms = "a run id, RUN@STEP or models:/<id>"
        return None, f"{operand.given!r} is not {forms}, and an encoder has to be evaluated"
    try:
        return per_query_values(operand.run, operand.checkpoint, name), ""
    except NoValuesError as error:
        return None, str(error)


def _eval_dataset(
    config: CompareConfig, basis: Mapping[str, object], run: TrackedRun | None
) -> EvalDataset | None:
    """The collection that was named, with the queries that the run holds out."""
    if config.dataset is None:
        return None
    from mlflow_dr.validation.dataset import EvalDataset
    from mlflow_dr.validation.resolve import with_held_out

    split = config.split or str(basis.get("split", ""))
    collection = with_held_out(run, open_collection(config.dataset), split)
    return EvalDataset(collection, chosen_split(collection, split or None))


def _refuse_other_queries(
    measured: Sequence[Operand],
    data: EvalDataset | None,
    basis: Mapping[str, object],
    measure: Measure,
    match: str,
) -> None:
    """Refuse to compare values that were measured on different queries, passages or judgements.

    Raises:
        UsageError: with both configurations.
    """
    keys = COMPARABLE + (OF_ANSWERS if answers_depth([measure]) else ())
    configs = [
        (operand.label, {key: operand.config.get(key) for key in keys}) for operand in measured
    ]
    if data is not None:
        now = {
            "corpus": data.corpus.digest,
            "topics": data.topics.digest,
            "subset": FULL_CORPUS,
            "keep_own_id": basis.get("keep_own_id", False),
            **data.answers_config(EvalConfig((measure,), match=match)),
        }
        # readers' validations have keys that this lacks
        configs.append((f"{data.collection.name}/{data.split}", {**dict.fromkeys(keys), **now}))
    for label, config in configs[1:]:
        if config != configs[0][1]:
            raise UsageError(
                f"values of other collections do not compare: of {configs[0][0]} "
                f"{config_differences(configs[0][1], config)} as of {label}"
            )


def _evaluate(
    operand: Operand,
    config: CompareConfig,
    data: EvalDataset,
    measures: tuple[Measure, ...],
    basis: Mapping[str, object],
) -> tuple[PerQuery, Lengths]:
    """The values of an encoder on the collection that was named, and its lengths."""
    from mlflow_dr.validation.evaluate import evaluate

    depth = basis.get("depth")
    settings = EvalConfig(
        measures,
        depth if isinstance(depth, int) else None,
        config.device,
        str(basis.get("dtype", AUTO)) if config.dtype == AUTO else config.dtype,
        bool(basis.get("keep_own_id", False)),
        match=str(basis.get("match", config.match)),
    )
    log.info("%s is evaluated on %s/%s", operand.label, data.collection.name, data.split)
    checkpoint = operand.checkpoint
    encoder = open_encoder(
        checkpoint or operand.given,
        label=operand.label,
        trust_remote_code=config.trust_remote_code,
        safetensors_only=checkpoint is not None and not checkpoint.directory,
        **{
            **operand.encoder_changes,
            **changes_of(None, None, config.q_max_len, config.p_max_len),
        },
    )
    queries = encoder.query_encoder.settings.query_max_length
    lengths = Lengths(queries, encoder.settings.passage_max_length)
    return evaluate(encoder, data, settings).per_query, lengths


def _known_lengths(operand: Operand) -> Lengths:
    """The lengths that a validation, or else the training, has recorded."""
    params = operand.run.fetch().data.params if operand.run else {}
    lengths = (
        operand.config.get(key) or params.get(param)
        for key, param in (("query_max_length", "q_max_len"), ("passage_max_length", "p_max_len"))
    )
    return Lengths(*(int(str(length)) if str(length).isdecimal() else None for length in lengths))


def _warn_of_lengths(lengths: Sequence[Lengths]) -> None:
    """Warn if encoders read texts up to different lengths, which alone makes a difference."""
    for texts, values in zip(Lengths._fields, zip(*lengths, strict=True), strict=True):
        if len({value for value in values if value is not None}) > 1:
            shown = ", ".join(
                f"{letter} {value or 'unknown'}"
                for letter, value in zip(LETTERS, values, strict=False)
            )
            log.warning(
                "the encoders read %s of other lengths in tokens (%s), which alone makes a "
                "difference; --q-max-len and --p-max-len set those of encoders evaluated now",
                *(texts, shown),
            )


def _queries(name: str, measured: Sequence[Operand], data: EvalDataset | None) -> Sequence[Query]:
    """The queries, if the collection was named or is on this machine."""
    if data is not None:
        return data.topics.queries
    from mlflow_dr.validation.resolve import with_held_out

    operand = measured[0]
    collection = validation_collection(operand.run, name) if operand.run else None
    if collection is None or not Path(collection).exists():
        log.info("--dataset %s would show the texts of the queries", collection or "NAME")
        return ()
    try:
        split = str(operand.config.get("split"))
        topics = with_held_out(operand.run, open_collection(collection), split).topics(split)
    except MlflowDrError as error:
        log.info("the texts of the queries cannot be shown: %s", error)
        return ()
    return topics.queries if topics.digest == operand.config.get("topics") else ()
