"""The only package that imports MLflow: runs, checkpoints, results, datasets, plugin hooks."""
