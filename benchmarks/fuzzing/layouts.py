"""Sound training examples in each layout."""

from __future__ import annotations

from typing import Any

from benchmarks.fuzzing.collections import PASSAGES, QUERIES

BY_ID = "Tevatron by id"


def records_of(layout: str) -> list[dict[str, Any]]:
    """Three sound records."""
    text = {i: {"docid": i, "title": title, "text": words} for i, title, words in PASSAGES}
    ids = list(text)
    made: list[dict[str, Any]] = []
    for place, (query_id, query, answers) in enumerate(QUERIES[:3]):
        positives, negatives = ids[place : place + 2], ids[place + 2 : place + 5]
        scores = [1.5, 0.25, -3.0, 2.0, 0.0]
        if layout == "Tevatron":
            made.append(
                {
                    "query_id": query_id,
                    "query": query,
                    "answers": answers,
                    "positive_passages": [
                        {**text[one], "score": scores[n]} for n, one in enumerate(positives)
                    ],
                    "negative_passages": [
                        {**text[one], "score": scores[2 + n]} for n, one in enumerate(negatives)
                    ],
                }
            )
        elif layout == BY_ID:
            made.append(
                {
                    "query_id": query_id,
                    "query_text": query,
                    "positive_document_ids": positives,
                    "negative_document_ids": negatives,
                    "answers": answers,
                    "positive_scores": scores[:2],
                    "negative_scores": scores[2:],
                }
            )
        elif layout == "tokenised":
            tokens = {one: [len(word) for word in text[one]["text"].split()] for one in ids}
            made.append(
                {
                    "query": [len(word) for word in query.split()],
                    "positives": [tokens[one] for one in positives],
                    "negatives": [tokens[one] for one in negatives],
                }
            )
        else:
            shape = [
                {"title": one["title"], "text": one["text"], "score": 9, "passage_id": i}
                for i, one in text.items()
            ]
            made.append(
                {
                    "question": query,
                    "answers": answers,
                    "positive_ctxs": shape[place : place + 2],
                    "negative_ctxs": shape[5:],
                    "hard_negative_ctxs": shape[place + 2 : place + 5] if place else [],
                }
            )
    return made
