from typing import Any

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.reader.sequences import SequenceBuilder, as_characters, find_spans


@pytest.mark.parametrize("title", ["title", "", "a red mat"])
@pytest.mark.parametrize("length", [512, 12, 11, 10, 8, 7])
def test_the_head_is_the_tokenizers_own_pair(tokenizer: Any, title: str, length: int) -> None:
    builder = SequenceBuilder(tokenizer, length)
    for question in ("who is it", "where is the red cat the dog", "a"):
        pair = tokenizer([question], [title], truncation=True, max_length=length)
        first, second = builder.bare([question, title])
        assert builder.head(first, second) == pair["input_ids"][0]


def test_a_tokenizer_without_separators_is_refused(tokenizer: Any) -> None:
    def bare(*texts: str, **options: Any) -> Any:
        if isinstance(texts[0], list):
            return {"input_ids": [[ord(text)] for text in texts[0]]}
        return {"input_ids": [ord(text) for text in texts]}

    with pytest.raises(UsageError, match="no token between two texts"):
        SequenceBuilder(bare)


def test_spans_come_by_answer_then_by_position_with_repeats() -> None:
    passage = as_characters([7, 7, 7, 8])
    answers = [as_characters(ids) for ids in ([7, 7], [], [8], [7, 7])]
    assert find_spans(passage, answers) == [(0, 1), (1, 2), (3, 3), (0, 1), (1, 2)]


def test_words_are_places_in_the_text_as_it_is(builder: SequenceBuilder) -> None:
    offsets, words = builder.words("  The cats, ran")
    assert offsets.tolist() == [[2, 5], [6, 9], [9, 10], [10, 11], [12, 15]]
    assert words == [0, 1, 1, 2, 3]
