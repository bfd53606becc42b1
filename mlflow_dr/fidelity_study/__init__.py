"""Whether a subset of the corpus chooses the checkpoint that the whole corpus chooses."""
