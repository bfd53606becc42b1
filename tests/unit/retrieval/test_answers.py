"""Answer matching against a slow implementation that shares no code with it."""

import random
import unicodedata
from collections.abc import Sequence

import pyarrow as pa
import pytest

from mlflow_dr.collection.corpus import Corpus
from mlflow_dr.errors import DataError, UsageError
from mlflow_dr.retrieval.answers import AnswerFinder, answer_tokens

ALPHABET = "aaAbÉéeıİΣσς1²½٣汉한-–'’.,%_ \u0301\u0307\u00a0\u200b\u00ad\t\n𝔸ﬁⅣ\u0915\u093e\ue000"  # noqa: RUF001


def finder(*texts: str, titles: Sequence[str] = ()) -> AnswerFinder:
    titles = titles or [""] * len(texts)
    ids = [f"p{number}" for number in range(len(texts))]
    return AnswerFinder(Corpus(pa.table({"id": ids, "title": titles, "text": list(texts)})))


def holds(text: str, *answers: str) -> bool:
    found = finder(text)
    return found.holds(0, found.sought(answers))


def slow_tokens(text: str) -> list[str]:
    """Character by character, by Unicode's categories."""
    tokens: list[str] = []
    inside = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            tokens = [*tokens[:-1], tokens[-1] + character] if inside else [*tokens, character]
        elif kind not in "ZC":
            tokens.append(character)
        inside = kind in "LNM"
    return [token.lower() for token in tokens]


def slow_holds(text: str, answer: str) -> bool:
    tokens, sought = slow_tokens(text), slow_tokens(answer)
    places = range(len(tokens) - len(sought) + 1)
    return bool(sought) and any(tokens[i : i + len(sought)] == sought for i in places)


def test_random_texts_are_judged_as_a_slow_implementation_judges_them() -> None:
    chance = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(4000):
        text = "".join(chance.choices(ALPHABET, k=chance.randint(0, 30)))
        answer = "".join(chance.choices(ALPHABET, k=chance.randint(0, 3)))
        if chance.random() < 0.3:
            start = chance.randrange(len(text) + 1)
            answer = text[start : start + chance.randint(1, 6)].swapcase()
        assert answer_tokens(text) == slow_tokens(text), ascii(text)
        assert holds(text, answer) == slow_holds(text, answer), ascii((text, answer))
        outcomes[slow_holds(text, answer)] += 1
    assert min(outcomes.values()) > 500


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It was built in 1889.", "1889"),
        ("the EIFFEL tower", "Eiffel Tower"),
        ("Beyonce\u0301 sang", "beyoncé"),
        ("Beyoncé sang", "BEYONCE\u0301"),
        ("a well-known fact", "well - known"),
        ("a 5 - 3 win", "5-3"),
        ("on\u00a0a\u2003Sunday\n night", "Sunday night"),
        ("it costs 20%.", "20 %"),
        ("ΟΔΟΣ", "οδος"),
        ("the U.S. Navy", "u. s."),
        ("中国 人", "中国"),
        ("in İstanbul", "i\u0307stanbul"),
        ("\u0915\u093e\u092e", "\u0915\u093e\u092e"),
    ],
)
def test_an_answer_is_found(text: str, answer: str) -> None:
    assert holds(text, answer)
    assert slow_holds(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It was built in 18890.", "1889"),  # a part of a token
        ("the towers", "tower"),
        ("Beyonce sang", "beyoncé"),
        ("well known", "well-known"),
        ("Eiffel's tower", "Eiffel tower"),
        ("tower Eiffel", "Eiffel tower"),
        ("中国人", "中国"),
        ("\u0915\u093e\u092e", "\u0915"),  # a vowel sign is a part of its word
        ("a b", "a b c"),
        ("", "a"),
    ],
)
def test_an_answer_is_not_found(text: str, answer: str) -> None:
    assert not holds(text, answer)
    assert not slow_holds(text, answer)


def matches(text: str, *answers: str) -> bool:
    corpus = Corpus(pa.table({"id": ["p0"], "title": ["title"], "text": [text]}))
    found = AnswerFinder(corpus, match="regex")
    return found.holds(0, found.sought(answers))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("It was built in 18890.", "1889"),
        ("in FEBRUARY of 1906", r"Feb(?:ruary)?\s+(?:of\s+)?1906"),
        ("one\nTwo", r"^two$"),
        ("Beyonce\u0301", "BEYONC\u00c9"),
        ("\u4e2d\u56fd", r"\p{Han}{2}"),
        ("a", "(?V1)[[a-z]--[eiou]]"),
        ("a", ""),
        ("12 years", r"(?<=(?:^|\s))\d+(?= years)"),
    ],
)
def test_a_regular_expression_is_found(text: str, pattern: str) -> None:
    assert matches(text, pattern)
    assert matches(text, "nothing of it", pattern)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [("the ferry", ["^ferry"]), ("a\nb", ["a.b"]), ("", ["a"]), ("a", []), ("a", [" "])],
)
def test_a_regular_expression_is_not_found(text: str, patterns: list[str]) -> None:
    assert not matches(text, *patterns)


@pytest.mark.parametrize(
    "pattern", ["(", "+", "[a", "a{99999999999999999999}", "(" * 5000, "a|" * 10_000]
)
def test_invalid_regular_expressions_are_refused(pattern: str) -> None:
    """By DPR's rule no passage holds it; `faults` says why."""
    assert not matches(f"text {pattern}", pattern)
    assert matches("text", pattern, "TEXT")
    corpus = Corpus(pa.table({"id": [], "title": [], "text": []}))
    (fault,) = AnswerFinder(corpus, match="regex").faults(["text", pattern])
    assert fault.startswith(f"'{pattern[:90]}")
    assert not AnswerFinder(corpus).faults(["text", pattern])


def test_a_search_that_would_take_years(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow_dr.retrieval.answers.SECONDS_PER_MATCH", 0.05)
    with pytest.raises(DataError, match=r"aa\)\+\$': .* takes more than 0.05 s on passage 'p0'"):
        matches("a" * 100 + "b", "(a|aa)+$")


@pytest.mark.parametrize(
    ("text", "answer", "holds"),
    [
        ("The Cats' home", "cat", True),
        ("a man, a plan", "Man plan", True),
        ("theatre", "the", True),  # nothing is left of the answer
        ("U.S. Navy", "us navy", True),
        ("Beyonce\u0301", "Beyonc\u00e9", False),
        ("caf\u00e9 \u2013 bar", "caf\u00e9 bar", False),
        ("anything", "\u200b", False),
        ("", "cat", False),
    ],
)
def test_answers_are_found_by_kilts_rule(text: str, answer: str, holds: bool) -> None:
    corpus = Corpus(pa.table({"id": ["p0"], "title": [""], "text": [text]}))
    found = AnswerFinder(corpus, match="kilt")
    assert found.holds(0, found.sought([answer])) is holds
    assert not found.faults(["("])


def test_an_unknown_way_to_match_is_refused() -> None:
    with pytest.raises(UsageError, match="match 'glob': expected one of string, regex, kilt"):
        AnswerFinder(Corpus(pa.table({"id": [], "title": [], "text": []})), match="glob")


@pytest.mark.parametrize("answer", ["", "  ", "\u200b", "\n\u00a0"])
def test_an_answer_without_tokens_is_in_no_passage(answer: str) -> None:
    assert not holds("some text", answer)
    assert not holds("", answer)
    assert holds("some text", answer, "text")


def test_any_of_several_answers_counts_and_no_answer_matches_nothing() -> None:
    assert holds("the ferry leaves at six", "noon", "six")
    assert not holds("the ferry leaves at six", "noon", "five")
    assert not holds("the ferry leaves at six")


def test_the_title_does_not_count() -> None:
    found = finder("It was built in 1889.", titles=["Eiffel Tower"])
    assert not found.holds(0, found.sought(["Eiffel Tower"]))


def test_a_passage_is_read_once() -> None:
    found = finder("the ferry", "the harbour")
    reads = []
    read = found._corpus.__class__.__getitem__

    class Counting(Corpus):
        def __getitem__(self, row: int):  # type: ignore[no-untyped-def]
            reads.append(row)
            return read(self, row)

    found._corpus.__class__ = Counting
    for _ in range(3):
        assert found.holds(1, found.sought(["harbour"]))
        assert not found.holds(0, found.sought(["harbour"]))
    assert sorted(reads) == [0, 1]
