"""What follows from the curve: which checkpoint is best, when to stop, what to keep."""
