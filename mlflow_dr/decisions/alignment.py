"""Values of several encoders, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlflow_dr.errors import DataError


def aligned(
    labels: Sequence[str],
    tables: Sequence[Mapping[str, Mapping[str, float]]],
    measure: str,
) -> tuple[list[str], np.ndarray]:
    """One measure of each encoder, in the order of the first one's queries.

    Args:
        labels: what the encoders are called, for errors.
        tables: of each encoder, query id -> measure -> value.
        measure: such as `mrr@10`.

    Returns:
        The ids of the queries, and the values, `(n_encoders, n_queries) float64`.

    Raises:
        DataError: the queries differ, the measure is missing, or a value is no number.
    """
    ids = list(tables[0])
    for label, table in zip(labels, tables, strict=True):
        if table.keys() != tables[0].keys():
            only_there = len(table.keys() - tables[0].keys())
            raise DataError(
                f"{labels[0]} and {label} were measured on other queries: "
                f"{len(tables[0].keys() - table.keys())} of {len(ids)} are missing from the "
                f"latter, and {only_there} of {len(table)} from the former"
            )
        if without := next((one for one in ids if measure not in table[one]), None):
            known = ", ".join(table[without]) or "none"
            raise DataError(f"{label} has no values of {measure}; it has: {known}")
    values = np.array([[table[one][measure] for one in ids] for table in tables], np.float64)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        worst = int(np.argmin(finite))
        count = int((~np.isfinite(values[worst])).sum())
        raise DataError(f"{count} values of {measure} of {labels[worst]} are not finite numbers")
    return ids, values
