"""What is searched and judged: records, one file per format, the catalogue, the built-in demo."""
