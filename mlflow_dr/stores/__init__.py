"""Document stores: ways to keep the passages of a corpus and to read some of them by row."""
