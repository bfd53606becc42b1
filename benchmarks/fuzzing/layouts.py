"""Sound training examples in each layout."""

from __future__ import annotations

from typing import Any

from benchmarks.fuzzing.collections import PASSAGES, QUERIES

BY_ID = "Tevatron by id"


def records_of(layout: str) -> list[dict[str, Any]]:
    """Three sound records."""
    text = {i: {"docid": i, "title": title, "text": body} for i, title, body in PASSAGES}
    ids = list(text)
    made: list[dict[str, Any]] = []
    for index, (query_id, query, answers) in enumerate(QUERIES[:3]):
        positives, negatives = ids[index : index + 2], ids[index + 2 : index + 5]
        scores = [1.5, 0.25, -3.0, 2.0, 0.0]
        if layout == "Tevatron":
            made.append(
                {
                    "query_id": query_id,
                    "query": query,
                    "answers": answers,
                    "positive_passages": [
                        {**text[passage_id], "score": scores[n]}
                        for n, passage_id in enumerate(positives)
                    ],
                    "negative_passages": [
                        {**text[passage_id], "score": scores[2 + n]}
                        for n, passage_id in enumerate(negatives)
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
            tokens = {
                passage_id: [len(word) for word in text[passage_id]["text"].split()]
                for passage_id in ids
            }
            made.append(
                {
                    "query": [len(word) for word in query.split()],
                    "positives": [tokens[passage_id] for passage_id in positives],
                    "negatives": [tokens[passage_id] for passage_id in negatives],
                }
            )
        else:
            shape = [
                {"title": passage["title"], "text": passage["text"], "score": 9, "passage_id": i}
                for i, passage in text.items()
            ]
            made.append(
                {
                    "question": query,
                    "answers": answers,
                    "positive_ctxs": shape[index : index + 2],
                    "negative_ctxs": shape[5:],
                    "hard_negative_ctxs": shape[index + 2 : index + 5] if index else [],
                }
            )
    return made
