"""What `mlflow-dr doctor` checks: each check does in small what training and validating do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mlflow_dr.doctor.finding import Finding, caught
from mlflow_dr.doctor.machine import (
    check_cache,
    check_devices,
    check_disks,
    check_faiss,
    check_python,
)
from mlflow_dr.doctor.services import check_hub, check_tracking


def examine(uri: str | None = None) -> Iterator[Finding]:
    """All findings about this machine and its services, as they are made.

    Args:
        uri: the tracking server; MLflow's own when None.
    """
    checks: Sequence[tuple[str, Callable[[], Iterator[Finding]]]] = (
        ("Python", check_python),
        ("devices", check_devices),
        ("FAISS", check_faiss),
        ("cache", check_cache),
        ("disk", check_disks),
        ("tracking", partial(check_tracking, uri)),
        ("hub", check_hub),
    )
    for name, check in checks:
        yield from caught(name, check)
