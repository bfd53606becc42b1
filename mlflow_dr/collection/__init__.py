"""Datasets: passages, judged queries and training examples, in one file per format."""
