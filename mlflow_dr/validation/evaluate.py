"""Evaluate one encoder on a collection or a suite: encode, search exactly, measure, report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow_dr.cache import unchanged_cache
from mlflow_dr.collection.catalogue import Collection, chosen_split, open_collection
from mlflow_dr.encoder.model import Encoder, with_settings
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.engine import Engine
from mlflow_dr.engines.opening import check_devices_and_dtype, open_engine
from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write
from mlflow_dr.retrieval.dense import SearchRequest, dense_search, rows_to_encode
from mlflow_dr.retrieval.estimate import Estimate, Interval
from mlflow_dr.retrieval.measures import (
    Measure,
    answers_depth,
    check_depth,
    mean_values,
    measure_topics,
    of_pool,
)
from mlflow_dr.retrieval.ranking import (
    NamedRanking,
    Ranking,
    SearchResult,
    n_excluded,
    without_excluded,
    write_ranking,
)
from mlflow_dr.subsets.spec import FULL, SubsetSpec
from mlflow_dr.tracking.encoders import open_encoder
from mlflow_dr.validation.dataset import EvalDataset
from mlflow_dr.validation.estimating import SubsetEstimator
from mlflow_dr.validation.evaluate_config import EvaluateConfig
from mlflow_dr.validation.pool import measure_pool
from mlflow_dr.validation.report import Report, mean_report, metric_values
from mlflow_dr.validation.validations import EvalConfig

if TYPE_CHECKING:  # without a run no mlflow is needed, which takes seconds to import
    from mlflow_dr.tracking.runs import TrackedRun

REPORT = "report.json"


def evaluate(
    encoder: Encoder,
    data: EvalDataset,
    settings: EvalConfig,
    quiet: bool = False,
    engine: Engine | None = None,
) -> Report:
    """Encode queries and corpus, search exactly, measure; see `evaluate_all`."""
    (report,) = evaluate_all(encoder, [(data, settings)], quiet, engine)
    return report


def evaluate_all(
    encoder: Encoder,
    requests: Sequence[tuple[EvalDataset, EvalConfig]],
    quiet: bool = False,
    engine: Engine | None = None,
) -> list[Report]:
    """Encode several sets of queries and their common corpus once, search exactly, measure each.

    If all requests search subsets, each passage of a subset is encoded once, and each request
    searches its own subset.

    Args:
        encoder: moved to the device, and into the number format.
        requests: datasets over one corpus, on one device and in one number format.
        quiet: no progress bar.
        engine: where encoding runs; opened as the settings say when None.

    Returns:
        A report for each, with the seconds and passages of all together.

    Raises:
        CheckpointError: the encoder gives NaN.
        DataError: a file in the cache was damaged during the evaluation.
        DeviceError: no such device.
        UsageError: a measure's cut-off is above the depth, or the split lacks judgements or
            answers that it needs.
        ValueError: corpora, devices or formats differ.
    """
    searched = [pair for pair in requests if not of_pool(pair[1].measures)]
    found = iter(_search_all(encoder, searched, quiet, engine) if searched else ())
    return [
        _pool_report(encoder, data, settings) if of_pool(settings.measures) else next(found)
        for data, settings in requests
    ]


def _pool_report(encoder: Encoder, data: EvalDataset, settings: EvalConfig) -> Report:
    start = time.perf_counter()
    per_query, dtype = measure_pool(encoder, data.rank_pool, settings)
    seconds = time.perf_counter() - start
    return Report(mean_values(per_query), per_query, {}, seconds, len(data.rank_pool.corpus), dtype)


@unchanged_cache()
def _search_all(
    encoder: Encoder,
    requests: Sequence[tuple[EvalDataset, EvalConfig]],
    quiet: bool,
    engine: Engine | None,
) -> list[Report]:
    """Reports of requests that are of a ranking."""
    tokens, common = requests[0][0].tokens, requests[0][1]
    _check_requests(requests)
    depths = _depths(requests)
    encoder = with_settings(encoder, common.prompts)
    text_tokenizer = TextTokenizer.of(encoder)
    estimators = [
        SubsetEstimator(data, settings) if settings.estimate else None
        for data, settings in requests
    ]
    searches = _searches(requests, estimators, encoder.settings.normalize)
    rows = rows_to_encode(searches, len(tokens.corpus))
    table = tokens.table(text_tokenizer, rows)

    opened = nullcontext(engine) if engine else closing(open_engine(common.engine, common.device))
    with opened as engine:
        start = time.perf_counter()
        dtype = engine.resolve_dtype(common.dtype)
        engine.load(encoder, dtype)
        _prepare_answers(requests)
        results = dense_search(
            encoder,
            text_tokenizer,
            searches,
            table,
            tokens.tie_ranks,
            quiet=quiet,
            backend=common.search_backend,
            engine=engine,
        )
    tails = iter(results[len(requests) :])
    measured = [
        _measure(data, settings, depth, result)
        if estimator is None
        else _estimate(data, settings, depth, result, estimator.estimates(result, next(tails)))
        for (data, settings), depth, estimator, result in zip(
            requests, depths, estimators, results[: len(requests)], strict=True
        )
    ]
    seconds = time.perf_counter() - start
    passages = len(table) if rows is None else len(rows)
    return [
        Report(mean_values(per_query), per_query, ranking, seconds, passages, dtype, intervals)
        for per_query, ranking, intervals in measured
    ]


def _prepare_answers(requests: Sequence[tuple[EvalDataset, EvalConfig]]) -> None:
    """Start processes that look for answers while the search goes on, if they are worth it."""
    for data, settings in requests:
        if found := answers_depth(settings.measures):
            data.tokens.matcher(settings.match).prepare(len(data.topics.queries), found)


def _check_requests(requests: Sequence[tuple[EvalDataset, EvalConfig]]) -> None:
    """Refuse what one pass cannot do; warn of relevant passages that are left out.

    Raises:
        UsageError: a measure needs judgements or answers that a split lacks.
        ValueError: corpora, devices, formats or prompts differ.
    """
    tokens, common = requests[0][0].tokens, requests[0][1]
    for data, settings in requests:
        is_same = data.corpus.digest == tokens.corpus.digest
        places = {
            (each.engine, each.device, each.dtype, each.query_prompt, each.passage_prompt)
            for each in (settings, common)
        }
        if not is_same or len(places) > 1:
            raise ValueError(
                "one pass is over one corpus, on one device, in one number format, with one prompt"
            )
        data.check_measures(settings)
        if not settings.keep_own_id:
            data.warn_of_own_ids()


def tokenise(encoder: Encoder, requests: Sequence[tuple[EvalDataset, EvalConfig]]) -> None:
    """Make what `evaluate_all` makes of a corpus only once, whatever the weights.

    Args:
        encoder: has the tokenizer.
        requests: as `evaluate_all` takes them.
    """
    requests = [pair for pair in requests if not of_pool(pair[1].measures)]
    if not requests:
        return
    tokens = requests[0][0].tokens
    encoder = with_settings(encoder, requests[0][1].prompts)
    rows = rows_to_encode(_searches(requests), len(tokens.corpus))
    tokens.table(TextTokenizer.of(encoder), rows)
    tokens.tie_ranks  # noqa: B018 - computed once


def _depths(requests: Sequence[tuple[EvalDataset, EvalConfig]]) -> list[int]:
    return [check_depth(settings.measures, settings.depth) for _, settings in requests]


def _searches(
    requests: Sequence[tuple[EvalDataset, EvalConfig]],
    estimators: Sequence[SubsetEstimator | None] = (),
    normalize: bool = False,
) -> list[SearchRequest]:
    """A search for each request, then one in the sample of each that estimates."""
    searches = [
        data.search(depth + n_excluded(data.topics.queries, data.keeps_own_id(settings)))._replace(
            form=settings.form(normalize)
        )
        for depth, (data, settings) in zip(_depths(requests), requests, strict=True)
    ]
    for index, estimator in enumerate(estimators):
        if estimator is not None:
            rows = estimator.relevant_rows()
            searches[index] = searches[index]._replace(extra_rows=rows)
            searches.append(estimator.request()._replace(form=searches[index].form))
    return searches


class Measured(NamedTuple):
    """The values of each query, the ranking, and the intervals of means that are estimates."""

    per_query: dict[str, dict[Measure, float]]
    ranking: Ranking
    intervals: Mapping[Measure, Interval]


def _estimate(
    data: EvalDataset,
    settings: EvalConfig,
    depth: int,
    result: SearchResult,
    estimates: Mapping[Measure, Estimate],
) -> Measured:
    """The values on the full corpus; the ranking is the subset's."""
    measured = _measure(data, settings, depth, result)
    per_query = {
        query.id: {measure: float(estimates[measure].per_query[index]) for measure in estimates}
        for index, query in enumerate(data.topics.queries)
    }
    return Measured(
        {query_id: per_query[query_id] for query_id in measured.per_query},
        measured.ranking,
        {measure: each.mean for measure, each in estimates.items()},
    )


def _measure(data: EvalDataset, settings: EvalConfig, depth: int, result: SearchResult) -> Measured:
    """The values on what was searched."""
    topics, ids = data.topics, data.corpus.ids
    keep_own_id = data.keeps_own_id(settings)
    rows, scores = without_excluded(topics.queries, ids, result.rows, result.scores, keep_own_id)
    ranking = NamedRanking(topics.queries, ids, rows, scores, depth)
    hits = None
    if found := answers_depth(settings.measures):
        hits = data.tokens.matcher(settings.match).hits(topics.queries, rows[:, :found])
    return Measured(measure_topics(topics, ranking, settings.measures, hits), ranking, {})


def evaluate_encoder(config: EvaluateConfig, run: TrackedRun | None = None) -> Report:
    """Evaluate an encoder without tracking, and write a report and a ranking to files.

    Args:
        config: the encoder, the collection or suite, and the files.
        run: gets the measures as metrics and the report as an artifact.

    Returns:
        The report; of a suite, the means with the report of each collection.

    Raises:
        UsageError: an unknown dataset, split, device or encoder, or a file that exists already.
        DataError: the collection's files are damaged, or no ranking can be written of its ids.
        CheckpointError: the encoder's files are damaged.
    """
    members = config.members
    configs = list(members.values()) or [config]
    for each in configs:
        check_devices_and_dtype(each.engine, each.device, each.dtype)
    _check_files(config)
    opened = [_opened(each) for each in configs]
    encoder = open_encoder(
        config.encoder,
        config.tracking_uri,
        trust_remote_code=config.trust_remote_code,
        **config.encoder_changes,
    )
    datasets = [_dataset(each, *pair) for each, pair in zip(configs, opened, strict=True)]
    if config.ranking is not None:
        datasets[0].check_ids()
    reports = [_report(encoder, *pair) for pair in zip(configs, datasets, strict=True)]
    report = mean_report(dict(zip(members, reports, strict=True))) if members else reports[0]
    values = list(map(_as_json, configs, datasets, reports))
    if members:
        collections = dict(zip(members, values, strict=True))
        about = {"encoder": config.encoder, "dataset": config.dataset, "measures": report.measures}
        values = [{**about, "collections": collections}]
    text = json.dumps(values[0]) + "\n"
    if config.output is not None:
        with atomic_write(config.output) as partial:
            partial.write_text(text)
    if config.ranking is not None:
        write_ranking(config.ranking, [report.ranking])
    if run is not None:
        run.log_report(metric_values(report), {REPORT: text})
    return report


def _report(encoder: Encoder, config: EvaluateConfig, data: EvalDataset) -> Report:
    """The report of a collection, with those of the other forms of vectors, encoded once."""
    _, settings = config.spec_and_settings()
    requests = [(data, settings.of_form(form)) for form in config.forms]
    report, *others = evaluate_all(encoder, requests)
    slugs = [form.slug for form in config.forms[1:]]
    return replace(report, forms=dict(zip(slugs, others, strict=True)))


def _check_files(config: EvaluateConfig) -> None:
    """Refuse files that cannot be written, before anything is encoded."""
    for path in (config.output, config.ranking):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist")
        if path is not None and path.is_file() and not config.force:
            raise UsageError(f"{path} exists already; --force replaces it")
    if config.ranking is not None and of_pool(config.eval_config().measures):
        raise UsageError("--ranking: measures of a pool have no ranking; leave it out")


def _opened(config: EvaluateConfig) -> tuple[Collection, str]:
    """The collection, and the split to evaluate on."""
    name, split = config.one_dataset(config.split)
    collection = open_collection(name)
    return collection, chosen_split(collection, split)


def _dataset(config: EvaluateConfig, collection: Collection, split: str) -> EvalDataset:
    """What is searched: the collection, or the subset of it."""
    spec, settings = config.spec_and_settings()
    data = EvalDataset(collection, split)
    data.check_measures(settings)
    if spec == SubsetSpec():
        return data
    return data.on_subset(spec, settings, tracking_uri=config.tracking_uri)


def _figures(report: Report) -> dict[str, Any]:
    intervals = {name: [each.low, each.high] for name, each in report.intervals.items()}
    return {
        "measures": report.measures,
        **({"intervals": intervals} if intervals else {}),
        "queries": report.per_query,
    }


def _as_json(config: EvaluateConfig, data: EvalDataset, report: Report) -> dict[str, Any]:
    dataset, split = config.one_dataset(data.split)
    forms = {name: _figures(each) for name, each in report.forms.items()}
    return {
        "encoder": config.encoder,
        "dataset": dataset,
        "split": split,
        "subset": config.subset[0] if config.subset else FULL,
        **_figures(report),
        **({"forms": forms} if forms else {}),
        "depth": check_depth(list(report.measures), config.depth),
        "dtype": report.dtype,
        "seconds": report.seconds,
        "passages": report.passages,
    }
