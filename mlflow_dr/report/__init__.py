"""A run on one page: curves, the best checkpoint, queries, speed and cost."""
