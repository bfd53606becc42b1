"""What figures say: which checkpoint is best, and whether a difference is more than chance."""
