"""Collections as MLflow shows datasets: with digest, sizes and where they come from.

MLflow imports this module whenever it is imported itself, to make a constructor of it
(`mlflow.data.from_dense_retrieval`); so nothing heavy is behind it. MLflow looks at annotations as
classes: none is deferred here.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.evaluation_dataset import EvaluationDataset
from mlflow.data.pyfunc_dataset_mixin import PyFuncConvertibleDatasetMixin, PyFuncInputsOutputs

from mlflow_dr.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from mlflow_dr.collection.catalogue import Collection
    from mlflow_dr.collection.corpus import Corpus
    from mlflow_dr.collection.records import Topics

INTERFACE = ("name", "source", "splits", "corpus", "topics")
LONGEST_NAME = 500


class CollectionSource(DatasetSource):
    """Where a collection comes from.

    Args:
        collection: what `open_collection` takes.
        split: whose queries are meant, if any.
        source: in words that another person can follow.
    """

    def __init__(self, collection: str, split: str | None = None, source: str = "") -> None:
        self.collection = collection
        self.split = split
        self.source = source

    @staticmethod
    def _get_source_type() -> str:
        return "mlflow_dr"

    def load(self) -> "Collection":
        """Open the collection.

        Raises:
            UsageError: this machine knows nothing of that name.
        """
        from mlflow_dr.collection.catalogue import open_collection

        return open_collection(self.collection)

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        """Whether it is an opened collection or a name of ir_datasets."""
        if isinstance(raw_source, str):
            from mlflow_dr.collection.catalogue import IR_DATASETS_PREFIX

            return raw_source.startswith(IR_DATASETS_PREFIX)
        return all(hasattr(raw_source, name) for name in INTERFACE)

    @classmethod
    def _resolve(cls, raw_source: Any) -> "CollectionSource":
        if isinstance(raw_source, str):
            return cls(raw_source)
        return cls(raw_source.name, source=raw_source.source)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"collection": self.collection, "split": self.split, "source": self.source}

    @classmethod
    def from_dict(cls, source_dict: Mapping[str, Any]) -> "CollectionSource":
        """From what `to_dict` gave.

        Raises:
            UsageError: the collection is not named.
        """
        if "collection" not in source_dict:
            raise UsageError(f"{dict(source_dict)} names no collection; expected key 'collection'")
        return cls(
            source_dict["collection"], source_dict.get("split"), source_dict.get("source", "")
        )


class CollectionDataset(Dataset, PyFuncConvertibleDatasetMixin):
    """The judged queries of one split and the corpus that they search.

    Args:
        collection: the collection.
        split: the split of the queries.
        name: shown by MLflow; the collection's when None.
        digest: shown by MLflow; that of the contents when None, which reads the corpus.
    """

    def __init__(
        self,
        collection: "Collection",
        split: str,
        name: str | None = None,
        digest: str | None = None,
    ) -> None:
        self.collection = collection
        self.split = split
        source = CollectionSource(collection.name, split, collection.source)
        super().__init__(source, name or shown_name(collection.name), digest)

    @cached_property
    def corpus(self) -> "Corpus":
        """The passages."""
        return self.collection.corpus()

    @cached_property
    def topics(self) -> "Topics":
        """The judged queries."""
        return self.collection.topics(self.split)

    def _compute_digest(self) -> str:
        from mlflow_dr.files import digest_of

        return digest_of(self.corpus.digest, self.topics.digest)

    @property
    def profile(self) -> dict[str, Any]:
        """Sizes."""
        return profile_of(len(self.corpus), self.topics, self.split)

    @property
    def schema(self) -> None:
        """None: it is no table."""

    def to_dict(self) -> dict[str, str]:
        """What MLflow keeps of it."""
        return {**super().to_dict(), "profile": json.dumps(self.profile)}

    def queries(self) -> "pd.DataFrame":
        """Ids and texts of the queries: columns `query_id` and `query`."""
        import pandas as pd

        rows = [(query.id, query.text) for query in self.topics.queries]
        return pd.DataFrame(rows, columns=["query_id", "query"])

    def to_pyfunc(self) -> PyFuncInputsOutputs:
        """The queries' texts, for a model that takes texts."""
        return PyFuncInputsOutputs([self.queries()[["query"]]])

    def to_evaluation_dataset(
        self, path: str | None = None, feature_names: list[str] | None = None
    ) -> "JudgedQueries":
        """What `mlflow.models.evaluate` hands to evaluators."""
        return JudgedQueries(self, path, feature_names)


class JudgedQueries(EvaluationDataset):
    """A split's queries as MLflow's evaluators get them, with the collection behind them.

    Attributes:
        origin: the dataset that was given to `mlflow.models.evaluate`.
    """

    def __init__(
        self, origin: CollectionDataset, path: str | None, feature_names: list[str] | None
    ) -> None:
        super().__init__(
            origin.queries(),
            name=origin.name,
            path=path,
            feature_names=feature_names,
            digest=origin.digest,
        )
        self.origin = origin


def from_dense_retrieval(
    collection: "str | Path | Collection",
    split: str | None = None,
    name: str | None = None,
    digest: str | None = None,
) -> CollectionDataset:
    """A split of a collection as an MLflow dataset; `mlflow.data.from_dense_retrieval`.

        dataset = mlflow.data.from_dense_retrieval("irds:vaswani")
        mlflow.log_input(dataset, context="validation")

    Args:
        collection: what `mlflow-dr evaluate --dataset` takes, or an opened collection.
        split: the queries; the development split, else the test split, when None.
        name: shown by MLflow; the collection's when None.
        digest: shown by MLflow; that of the contents when None.

    Raises:
        UsageError: an unknown collection or split, or one without judged queries.
        DataError: the collection's files are damaged.
    """
    from mlflow_dr.collection.catalogue import chosen_split, open_collection

    if isinstance(collection, str | Path):
        collection = open_collection(str(collection))
    return CollectionDataset(collection, chosen_split(collection, split), name, digest)


def profile_of(passages: int, topics: "Topics", split: str) -> dict[str, Any]:
    """Sizes of what is searched and asked; one for each digest, of which MLflow keeps the first."""
    return {
        "passages": passages,
        "queries": len(topics.queries),
        "judgements": sum(len(judged) for judged in topics.qrels.values()),
        "split": split,
    }


def shown_name(collection: str) -> str:
    """A collection's name as MLflow shows it, which takes no more than 500 characters."""
    from mlflow_dr.files import digest_of

    if len(collection) <= LONGEST_NAME:
        return collection
    end = f"... ({digest_of(collection)})"
    return collection[: LONGEST_NAME - len(end)] + end
