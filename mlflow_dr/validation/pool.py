"""Average rank and NLL of an encoder on a pool of passages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlflow_dr.collection.rank_pool import RankPool
from mlflow_dr.devices import AUTO, resolve_devices, resolve_dtype, torch_dtype
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.token_table import corpus_tokens
from mlflow_dr.encoder.tokenize import TextTokenizer
from mlflow_dr.engines.opening import LOCAL
from mlflow_dr.retrieval.average_rank import batch_nll, own_ranks
from mlflow_dr.retrieval.encode import encode_all
from mlflow_dr.retrieval.measures import Measure
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.validation.validations import EvalConfig

AVERAGE_RANK = "average_rank"


def measure_pool(
    encoder: Encoder, pool: RankPool, settings: EvalConfig
) -> tuple[dict[str, dict[Measure, float]], str]:
    """Encode the questions and passages of a pool on one device of this machine, and measure.

    `average_rank@30` is the rank of each question's first positive among the first positives of all
    questions and up to 30 hard and 30 other negatives of each. `nll@16` is the loss in batches of
    16 questions, each with its positive and its first hard negative.

    Args:
        encoder: moved to the device, and into the number format.
        pool: the questions and passages.
        settings: measures, device and number format.

    Returns:
        The values of each question by its id, and the number format.

    Raises:
        CheckpointError: the encoder gives NaN.
        DeviceError: no such device.
    """
    device = resolve_devices(settings.device if settings.engine == LOCAL else AUTO)[0]
    dtype = resolve_dtype(settings.dtype, device)
    encoder.eval().to(device, torch_dtype(dtype))
    query_encoder = encoder.query_encoder
    query_tokenizer = TextTokenizer.of(query_encoder)
    passage_tokenizer = TextTokenizer.of(encoder)
    query_table = token_table(query_tokenizer.query_ids(pool.queries))
    table = corpus_tokens(pool.corpus, passage_tokenizer)
    queries = encode_all(query_encoder, query_table, query_tokenizer.pad_id, "query").float()
    passages = encode_all(encoder, table, passage_tokenizer.pad_id, "passage").float()
    columns: list[np.ndarray] = []
    for measure in settings.measures:
        if measure.name == AVERAGE_RANK:
            rows = pool.rows(measure.cutoff)
            own = np.searchsorted(rows, pool.positives)
            columns.append(own_ranks(queries, passages[rows], own))
        else:
            columns.append(batch_nll(queries, passages, _with_negative(pool), measure.cutoff))
    names = [query.id for query in pool.queries]
    rows_of_values = zip(*(column.tolist() for column in columns), strict=True)
    values = {
        name: dict(zip(settings.measures, row, strict=True))
        for name, row in zip(names, rows_of_values, strict=True)
    }
    return values, dtype


def _with_negative(pool: RankPool) -> Sequence[np.ndarray]:
    """Each question's positive and its first hard negative, as DPR's validation takes them."""
    pairs = zip(pool.positives, pool.negatives, strict=True)
    return [np.array([positive, *negatives[:1]]) for positive, negatives in pairs]
