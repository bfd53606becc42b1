"""Which part of a corpus a validation encodes."""
