"""The only room that knows MLflow: runs, checkpoints, results, dataset inputs, plugin hooks."""
