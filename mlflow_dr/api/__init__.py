"""The commands as functions of Python: `mlflow_dr.train`, `mlflow_dr.validate` and so on."""
