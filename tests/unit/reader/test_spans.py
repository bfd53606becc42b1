import numpy as np
import pytest

from mlflow_dr.reader.spans import Span, best_passages, best_span, whole_words


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_the_best_span_is_that_of_a_search_over_all_spans(length: int) -> None:
    generator = np.random.default_rng(7)
    for _ in range(30):
        # whole numbers, so that scores are often equal
        starts, ends = generator.integers(0, 3, (2, int(generator.integers(1, 7)))).astype(float)
        spans = [
            Span(start, end, starts[start] + ends[end])
            for start in range(len(starts))
            for end in range(start, min(start + length, len(starts)))
        ]
        expected = min(spans, key=lambda span: (-span.score, span.start, span.end))
        assert best_span(starts, ends, length) == expected


def test_a_span_grows_to_whole_words_also_behind_the_cut() -> None:
    words = [0, 1, 1, 1, 2, None, None]
    assert whole_words(2, 2, words) == (1, 3)
    assert whole_words(0, 1, words) == (0, 3)
    assert whole_words(5, 5, words) == (5, 5)


def test_the_most_relevant_of_the_first_n_passages_is_chosen_if_it_has_tokens() -> None:
    relevance = np.array([0.0, 2.0, 5.0, 2.0])
    usable = np.array([False, True, False, True])
    assert best_passages(relevance, usable, [1, 2, 3, 4, 99]) == [-1, 1, 1, 1, 1]
