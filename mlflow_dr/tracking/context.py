"""Tags that MLflow puts on the runs of mlflow_dr's own commands; no torch behind it."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlflow_dr.version import VERSION

COMMAND_VARIABLE = "MLFLOW_DR_COMMAND"
PACKAGES = ("torch", "transformers")


class DenseRetrievalRunContext(RunContextProvider):
    """Version, command, host and library versions, on runs that our command line makes."""

    def in_context(self) -> bool:
        """Whether this process is one of our commands."""
        return COMMAND_VARIABLE in os.environ

    def tags(self) -> dict[str, str]:
        """The tags."""
        tags = {
            "mlflow_dr.version": VERSION,
            "mlflow_dr.command": os.environ[COMMAND_VARIABLE],
            "mlflow_dr.host": platform.node(),
            "mlflow_dr.cores": str(os.cpu_count()),
        }
        for package in PACKAGES:
            try:
                tags[f"mlflow_dr.{package}"] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return tags
