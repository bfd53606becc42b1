"""A folder of vectors that was written, as a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_dr import pages
from mlflow_dr.encoder.arguments import AnyEncoder
from mlflow_dr.retrieval.vector_manifest import VectorManifest
from mlflow_dr.retrieval.vectors import Vectors, open_vectors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class VectorFolder:
    """A folder of vectors; `search` takes it as its path.

    Attributes:
        path: of the folder.
        manifests: of the shards that were written.
        encoder: what has encoded them.
    """

    path: Path
    manifests: Sequence[VectorManifest]
    encoder: AnyEncoder

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self) -> Vectors:
        """The vectors that are there, streamed from the files.

        Raises:
            UsageError: there are none, or they are pickles.
            DataError: a file is damaged.
        """
        return open_vectors(self.path, partial=True)

    def frame(self) -> pd.DataFrame:
        """A row for each vector, named by the id of its text."""
        import pandas as pd

        vectors = self.open()
        return pd.DataFrame(vectors.read(), index=vectors.ids.to_pylist())

    def __repr__(self) -> str:
        rows = sum(manifest.rows for manifest in self.manifests)
        return f"{self.path}: {rows} vectors of {self.manifests[0].dimension} dimensions"

    def _repr_html_(self) -> str:
        first = self.manifests[0]
        rows = [
            ("texts", f"{sum(each.rows for each in self.manifests):,} {first.kind}"),
            ("collection", "/".join(filter(None, (first.dataset, first.split)))),
            ("encoder", first.encoder),
            ("vectors", f"{first.dimension} dimensions, {first.vector_dtype}, {first.similarity}"),
            ("folder", self.path),
        ]
        return pages.table(("", ""), rows)
