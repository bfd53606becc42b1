import pytest

from mlflow_dr.reader.scoring import exact_match, f1, normalized

# predictions and answers of the kinds on which DPR's own evaluation was run
CASES = [
    ("Antigone", ["Antigone"], 1.0),
    ("21, 000", ["21,000"], 0.0),
    ("The  U.S.A.", ["usa"], 1.0),
    ("a an the", [""], 1.0),
    ("theory", ["ory"], 0.0),
    ("solimoes", ["Solimões"], 0.0),
    ("“mid”", ["mid"], 0.0),
    ("Sept. 4", ["x", "sept 4"], 1.0),
    ("", [], 0.0),
]


@pytest.mark.parametrize(("prediction", "answers", "expected"), CASES)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


def test_an_article_with_an_accent_is_a_word_of_its_own() -> None:
    assert normalized("the\u0301 state") == "the\u0301 state"
    assert normalized("The state") == "state"


def test_f1_is_of_words_and_of_the_nearest_answer() -> None:
    assert f1("the red cat sat", ["red cat", "dog"]) == pytest.approx(0.8)
    assert f1("red red", ["red"]) == pytest.approx(2 / 3)
    assert f1("the", ["a"]) == 1.0
    assert f1("red", []) == f1("red", ["the"]) == 0.0
