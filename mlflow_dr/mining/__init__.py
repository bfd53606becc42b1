"""Hard negatives: what a search finds for training queries and is not relevant."""
