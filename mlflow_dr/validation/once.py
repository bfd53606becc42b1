"""One evaluation without tracking: any encoder, one collection, a JSON report and a run file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_dr.collection.catalogue import open_collection
from mlflow_dr.collection.formats import chosen_split
from mlflow_dr.encoder.config import changes_of
from mlflow_dr.encoder.directory import load_encoder
from mlflow_dr.engines.devices import resolve_device, resolve_dtype
from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write
from mlflow_dr.retrieval.measures import DEFAULT_MEASURES, check_depth, parse_measures
from mlflow_dr.retrieval.ranking import write_ranking
from mlflow_dr.subsets.spec import FULL, RELEVANT, parse_subset
from mlflow_dr.subsets.strategies import CachedSearching
from mlflow_dr.subsets.subset import make_subset
from mlflow_dr.tracking.encoders import encoder_errors, local_encoder
from mlflow_dr.validation.evaluate import Prepared, Report, Settings, evaluate

if TYPE_CHECKING:  # without a run no mlflow is needed, which takes seconds to import
    from mlflow_dr.tracking.runs import TrackedRun

REPORT = "report.json"


@dataclass(frozen=True)
class Once:
    """What `mlflow-dr evaluate` was asked.

    Attributes:
        encoder: a directory, a hub name or `models:/<id>`.
        dataset: the collection.
        split: the queries; the development split when None.
        measures: such as `ndcg@10 recall@100`.
        depth: passages for each query; the largest cut-off when None.
        output: the JSON report's place.
        ranking: the TREC run file's place.
        force: replace these two if they are there.
        device: see `resolve_device`.
        dtype: see `resolve_dtype`.
        keep_own_id: keep a passage whose id is the query's id.
        subset: what is searched, such as `bm25@50`; the whole corpus when None.
        seed: of what the subset draws by lot.
        judged: which judged passages are always in it: `relevant` or `all`.
        pooling: replaces what the directory says; so do the next two.
        normalize: likewise.
        max_length: likewise, for queries and passages.
        q_max_len: likewise, for queries.
        p_max_len: likewise, for passages.
        tokenizer: a directory or hub name whose tokenizer is taken instead.
        trust_remote_code: whether code in the directory may run.
        tracking_uri: where `models:/` is looked up.
    """

    encoder: str
    dataset: str
    split: str | None = None
    measures: str = DEFAULT_MEASURES
    depth: int | None = None
    output: Path | None = None
    ranking: Path | None = None
    force: bool = False
    device: str = "auto"
    dtype: str = "auto"
    keep_own_id: bool = False
    subset: str | None = None
    seed: int = 0
    judged: str = RELEVANT
    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    q_max_len: int | None = None
    p_max_len: int | None = None
    tokenizer: str | None = None
    trust_remote_code: bool = False
    tracking_uri: str | None = None

    def encoder_changes(self) -> dict[str, Any]:
        """What the flags say about the encoder."""
        query_length = self.q_max_len or self.max_length
        passage_length = self.p_max_len or self.max_length
        return changes_of(
            self.pooling, self.normalize, query_length, passage_length, self.tokenizer
        )


def evaluate_once(request: Once, run: TrackedRun | None = None) -> Report:
    """Evaluate an encoder, and write what was asked for.

    Args:
        request: what is evaluated.
        run: gets the measures as metrics and the report as an artifact.

    Raises:
        UsageError: an unknown dataset, split, measure, device or encoder, or a file that is there
            already.
        DataError: the collection's files are damaged, or its ids are such that no ranking can be
            written.
        CheckpointError: the encoder's files are damaged.
    """
    measures = parse_measures(request.measures)
    depth = check_depth(measures, request.depth)
    dtype = resolve_dtype(request.dtype, resolve_device(request.device))
    spec = parse_subset(request.subset, request.seed, request.judged) if request.subset else None
    for path in (request.output, request.ranking):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: the folder {path.absolute().parent} does not exist")
        if path is not None and path.is_file() and not request.force:
            raise UsageError(f"{path}: is there already; --force replaces it")
    collection = open_collection(request.dataset)
    split = chosen_split(collection, request.split)
    name = request.encoder
    with local_encoder(name, request.tracking_uri) as directory, encoder_errors(name):
        encoder = load_encoder(
            directory, trust_remote_code=request.trust_remote_code, **request.encoder_changes()
        )
    settings = Settings(measures, depth, request.device, request.dtype, request.keep_own_id)
    prepared = Prepared(collection, split)
    if spec is not None:
        searching = CachedSearching(
            prepared.corpus, request.device, dtype, tracking_uri=request.tracking_uri
        )
        subset = make_subset(spec, prepared.corpus, prepared.topics, searching)
        prepared = Prepared(collection, split, prepared.searched, subset)
    if request.ranking is not None:
        prepared.check_ids()
    report = evaluate(encoder, prepared, settings)
    text = json.dumps(_as_json(request, split, depth, report)) + "\n"
    if request.output is not None:
        with atomic_write(request.output) as partial:
            partial.write_text(text)
    if request.ranking is not None:
        write_ranking(request.ranking, report.ranking)
    if run is not None:
        values = {one.metric: report.measures[one] for one in measures}
        run.log_report({**values, "seconds": report.seconds}, {REPORT: text})
    return report


def _as_json(request: Once, split: str, depth: int, report: Report) -> dict[str, Any]:
    return {
        "encoder": request.encoder,
        "dataset": request.dataset,
        "split": split,
        "subset": request.subset or FULL,
        "measures": report.measures,
        "queries": report.per_query,
        "depth": depth,
        "dtype": report.dtype,
        "seconds": report.seconds,
        "passages": report.passages,
    }
