"""Several encoders on the same queries, by the values that are kept or by evaluating them now.

Where all values are kept torch is not needed, so it waits until it is: it takes seconds to import.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import chosen_split
from mlflow_dr.collection.records import Query
from mlflow_dr.decisions.comparison import (
    LETTERS,
    Comparison,
    check_comparison_output,
    check_count,
    compare_values,
    write_comparison,
)
from mlflow_dr.encoder.config import changes_of
from mlflow_dr.errors import MlflowDrError, NoValuesError, UsageError
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES, Measure, parse_measures
from mlflow_dr.tracking.artifacts import PerQuery, per_query_values
from mlflow_dr.tracking.encoders import encoder_errors
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.validations import FIRST_NAME, config_differences, validation_collection
from mlflow_dr.validation.operands import Operand, find_operands

if TYPE_CHECKING:
    from mlflow_dr.validation.evaluate import Prepared

log = logging.getLogger(__name__)

# of a validation's configuration, what decides whether values may be compared
COMPARABLE = ("corpus", "topics", "subset", "keep_own_id")
FULL_CORPUS = "full"
AUTO = "auto"


@dataclass(frozen=True)
class Comparing:
    """What `mlflow-dr compare` was asked.

    Attributes:
        operands: two or more of run ids (their best checkpoints), `RUN@STEP`, `models:/<id>`, and
            encoders by directory or hub name; the others are compared with the first.
        name: the validation whose values are taken.
        measure: what is compared; the validation's first measure when None.
        dataset: the collection on which those are evaluated now that have no values.
        split: its queries; those of the validation, else the development split, when None.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`; as the validation has it when `auto`.
        output: a folder for the values of all queries and a picture.
        force: replace these two if they are there.
        q_max_len: tokens of a query for encoders that are evaluated now; their own when None.
        p_max_len: tokens of a passage, in the same way.
        seed: of the randomisation test and the bootstrap.
        trust_remote_code: whether code in an encoder's directory may run.
        tracking_uri: where runs and checkpoints are looked up.
    """

    operands: tuple[str, ...]
    name: str = FIRST_NAME
    measure: str | None = None
    dataset: str | None = None
    split: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    output: Path | None = None
    force: bool = False
    q_max_len: int | None = None
    p_max_len: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        check_count(len(self.operands))

    @property
    def lengths(self) -> dict[str, Any]:
        """The lengths that were asked for, as `load_encoder` takes them."""
        return changes_of(None, None, self.q_max_len, self.p_max_len)


class Lengths(NamedTuple):
    """How much of a text an encoder reads at most, in tokens; None where nothing says it."""

    queries: int | None
    passages: int | None


class Kept(NamedTuple):
    """The values of an operand, or why there are none."""

    values: PerQuery | None
    why_not: str = ""


def compare(request: Comparing) -> Comparison:
    """Compare encoders with the first of them, and write what was asked for.

    Raises:
        UsageError: an operand, dataset, split, measure or device that is not there, or operands
            that were measured on other collections.
        DataError: values or files that are damaged, or of other queries.
        CheckpointError: a checkpoint that cannot be evaluated.
        TrackingError: no such run or checkpoint, or no server.
    """
    asked = _measure(request.measure)
    if request.output is not None and request.output.exists() and not request.output.is_dir():
        raise UsageError(f"{request.output}: expected a folder, not a file")
    check_comparison_output(request.output, request.force)
    if request.dataset is not None:
        _check_device(request)
    operands = find_operands(request.operands, request.name, asked, request.tracking_uri)
    kept = [_kept(one, request.name) for one in operands]
    known = [one for one, (values, _) in zip(operands, kept, strict=True) if values is not None]
    basis = known[0].config if known else {}
    prepared = _prepared(request, basis)
    _refuse_other_queries(known, prepared, basis)
    measures = parse_measures(str(basis.get("measures") or request.measure or DEFAULT_MEASURES))
    tables: list[PerQuery] = []
    lengths: list[Lengths] = []
    for operand, (values, why_not) in zip(operands, kept, strict=True):
        if values is None:
            if prepared is None:
                raise UsageError(f"{why_not}; give --dataset to evaluate it now")
            values, of_encoder = _evaluated(operand, request, prepared, measures, basis)
            lengths.append(of_encoder)
        else:
            lengths.append(_known_lengths(operand))
        tables.append(values)
    _tell_other_lengths(lengths)
    comparison = compare_values(
        [one.label for one in operands],
        tables,
        str(asked or measures[0]),
        request.seed,
        {query.id: query.text for query in _queries(request.name, known, prepared)},
    )
    if request.output is not None:
        write_comparison(comparison, request.output)
    return comparison


def _measure(text: str | None) -> Measure | None:
    if text is None:
        return None
    measures = parse_measures(text)
    if len(measures) != 1:
        raise UsageError(f"one measure is compared, not {len(measures)}: {text!r}")
    return measures[0]


def _check_device(request: Comparing) -> None:
    from mlflow_dr.engines.devices import resolve_device, resolve_dtype

    resolve_dtype(request.dtype, resolve_device(request.device))


def _kept(operand: Operand, name: str) -> Kept:
    """The values that a validator has kept."""
    if operand.run is None or operand.checkpoint is None:
        forms = "a run id, RUN@STEP or models:/<id>"
        return Kept(None, f"{operand.given!r} is not {forms}, and an encoder has to be evaluated")
    try:
        return Kept(per_query_values(operand.run, operand.checkpoint, name))
    except NoValuesError as error:
        return Kept(None, str(error))


def _prepared(request: Comparing, basis: Mapping[str, object]) -> Prepared | None:
    """The collection that was named."""
    if request.dataset is None:
        return None
    from mlflow_dr.validation.evaluate import Prepared

    collection = open_collection(request.dataset)
    split = request.split or str(basis.get("split", ""))
    return Prepared(collection, chosen_split(collection, split or None))


def _refuse_other_queries(
    known: Sequence[Operand], prepared: Prepared | None, basis: Mapping[str, object]
) -> None:
    """Refuse to compare what was measured on other queries, passages or judgements.

    Raises:
        UsageError: with both configurations.
    """
    configs = [(one.label, {key: one.config.get(key) for key in COMPARABLE}) for one in known]
    if prepared is not None:
        now = {
            "corpus": prepared.corpus.digest,
            "topics": prepared.topics.digest,
            "subset": FULL_CORPUS,
            "keep_own_id": basis.get("keep_own_id", False),
        }
        configs.append((f"{prepared.collection.name}/{prepared.split}", now))
    for label, config in configs[1:]:
        if config != configs[0][1]:
            raise UsageError(
                f"values of other collections do not compare: of {configs[0][0]} "
                f"{config_differences(configs[0][1], config)} as of {label}"
            )


def _evaluated(
    operand: Operand,
    request: Comparing,
    prepared: Prepared,
    measures: tuple[Measure, ...],
    basis: Mapping[str, object],
) -> tuple[PerQuery, Lengths]:
    """The values of an encoder on the collection that was named, and its lengths."""
    from mlflow_dr.encoder.directory import load_encoder
    from mlflow_dr.validation.evaluate import Settings, evaluate

    depth = basis.get("depth")
    settings = Settings(
        measures,
        depth if isinstance(depth, int) else None,
        request.device,
        str(basis.get("dtype", AUTO)) if request.dtype == AUTO else request.dtype,
        bool(basis.get("keep_own_id", False)),
    )
    log.info("%s is evaluated on %s/%s", operand.label, prepared.collection.name, prepared.split)
    checkpoint = operand.checkpoint
    source = nullcontext(operand.given) if checkpoint is None else checkpoint_files(checkpoint)
    with source as files, encoder_errors(operand.label):
        encoder = load_encoder(
            files,
            trust_remote_code=request.trust_remote_code,
            safetensors_only=checkpoint is not None and not checkpoint.directory,
            **{**operand.encoder_changes, **request.lengths},
        )
    queries = encoder.query_encoder.settings.query_max_length
    lengths = Lengths(queries, encoder.settings.passage_max_length)
    return evaluate(encoder, prepared, settings).per_query, lengths


def _known_lengths(operand: Operand) -> Lengths:
    """What a validation, or else the training, says of an encoder's lengths; None where neither."""
    params = operand.run.fetch().data.params if operand.run else {}
    found = (
        operand.config.get(key) or params.get(param)
        for key, param in (("query_max_length", "q_max_len"), ("passage_max_length", "p_max_len"))
    )
    return Lengths(*(int(str(one)) if str(one).isdecimal() else None for one in found))


def _tell_other_lengths(lengths: Sequence[Lengths]) -> None:
    """Say that encoders read texts of other lengths, which makes a difference of its own."""
    for what, values in zip(Lengths._fields, zip(*lengths, strict=True), strict=True):
        if len({one for one in values if one is not None}) > 1:
            said = ", ".join(
                f"{letter} {one or 'unknown'}" for letter, one in zip(LETTERS, values, strict=False)
            )
            log.warning(
                "the encoders read %s of other lengths in tokens (%s), which alone makes a "
                "difference; --q-max-len and --p-max-len set those of encoders evaluated now",
                *(what, said),
            )


def _queries(name: str, known: Sequence[Operand], prepared: Prepared | None) -> Sequence[Query]:
    """The queries, where the collection is at hand: named, or a file of this machine."""
    if prepared is not None:
        return prepared.topics.queries
    operand = known[0]
    collection = validation_collection(operand.run, name) if operand.run else None
    if collection is None or not Path(collection).exists():
        log.info("--dataset %s would show the texts of the queries", collection or "NAME")
        return ()
    try:
        topics = open_collection(collection).topics(str(operand.config.get("split")))
    except MlflowDrError as error:
        log.info("the texts of the queries cannot be shown: %s", error)
        return ()
    return topics.queries if topics.digest == operand.config.get("topics") else ()
