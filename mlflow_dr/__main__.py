"""`python -m mlflow_dr` is `mlflow-dr`."""

from mlflow_dr.cli import main

main()
