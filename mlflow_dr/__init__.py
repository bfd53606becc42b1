"""Dense-retrieval training with asynchronous checkpoint validation, as a plugin to MLflow."""

from mlflow_dr.version import VERSION

__version__ = VERSION
