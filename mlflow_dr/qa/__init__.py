"""Question answering from beginning to end: retriever, results, reader, predictions and a page."""
