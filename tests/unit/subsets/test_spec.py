"""The words for a subset."""

from pathlib import Path

import pytest

from mlflow_dr.errors import UsageError
from mlflow_dr.subsets.spec import ALL, SubsetSpec, SubsetTerm, parse_subset


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("full", ""),
        ("random:2000", "random_2000"),
        ("random:5%", "random_5_percent"),
        ("bm25@5+random:2.5%", "bm25_at_5-random_2_5_percent"),
        ("bm25@50", "bm25_at_50"),
        ("bm25@50+random:10000", "bm25_at_50-random_10000"),
        ("encoder:sentence-transformers/all-MiniLM-L6-v2@10", "encoder_all-MiniLM-L6-v2_at_10"),
        ("encoder:models:/m-1@best@10", "encoder_m-1_best_at_10"),
        ("encoder:step-100@50", "encoder_step-100_at_50"),
        ("queries:200", "full-queries_200"),
        ("full+queries:200", "full-queries_200"),
        ("bm25@5+queries:20", "bm25_at_5-queries_20"),
        ("ranking:a/b+c@d.trec@100", "ranking_b_c_d_at_100"),
        ("pool:one.trec,two.txt.gz@7", "pool_one_two_at_7"),
        ("rerank:top.tsv@100", "rerank_top_at_100"),
    ],
)
def test_each_subset_form_has_a_metric_name(text: str, slug: str) -> None:
    assert parse_subset(text).slug == slug
    written = "full+queries:200" if text == "queries:200" else text
    assert str(parse_subset(text)) == written


@pytest.mark.parametrize(
    "text",
    [
        *("", "random", "random:", "random:x", "random:0", "random:-3", "bm25:50", "bm25", "bm25@"),
        *("ranking:file", "ranking:@5", "pool:a,,b@5", "full@3", "top@50", "encoder:@5", "full+"),
        *("bm25@50+", "rerank:a@b", "queries@5"),
    ],
)
def test_an_invalid_subset_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(UsageError, match=r"^subset '.*expected|whole number above 0"):
        parse_subset(text)


@pytest.mark.parametrize("text", [f"bm25@{'9' * 5000}", f"random:{'9' * 13}", "x" * 200_000])
def test_too_long_specifications_are_refused_in_one_short_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^subset '") as error:
        parse_subset(text)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("share", ["0%", "101%", "1000%", "-5%", "5.%", "%", "x%", "1e1%", "nan%"])
def test_a_share_is_above_0_and_up_to_100_percent(share: str) -> None:
    with pytest.raises(UsageError, match=r"^subset .* is not a share above 0% and up to 100%"):
        parse_subset(f"random:{share}")


def test_a_share_is_rounded_to_whole_passages_and_is_at_least_one() -> None:
    (term,) = parse_subset("random:5%").terms
    assert [term.count_of(total) for total in (3, 50, 1010, 20_958)] == [1, 2, 50, 1048]
    assert parse_subset("random:100%").terms[0].count_of(7) == 7
    assert parse_subset("random:12").terms[0].count_of(7) == 12


@pytest.mark.parametrize("text", ["bm25@5%", "ranking:file@5%"])
def test_only_random_samples_take_a_share(text: str) -> None:
    with pytest.raises(UsageError, match="whole number"):
        parse_subset(text)


def test_a_step_of_thousands_of_digits_is_refused() -> None:
    (part,) = parse_subset(f"encoder:step-{'9' * 5000}@5").terms
    assert part.step is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("full+bm25@5", "joins with queries:N only"),
        ("rerank:a@5+random:10", "each query its own passages"),
        ("bm25@5+bm25@5", "twice"),
        ("queries:5+queries:6", "twice"),
    ],
)
def test_contradictory_options_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_subset(text)


def test_seed_and_judged_are_in_the_name_when_they_matter() -> None:
    assert parse_subset("random:5", seed=3).slug == "random_5-seed_3"
    assert parse_subset("bm25@5", seed=3).slug == "bm25_at_5"
    assert parse_subset("bm25@5", judged=ALL).slug == "bm25_at_5-all_judged"
    assert parse_subset("full", seed=3, judged=ALL).slug == ""
    with pytest.raises(UsageError, match="judged"):
        parse_subset("bm25@5", judged="some")


def test_seed_and_judged_are_ignored_when_they_cannot_matter() -> None:
    assert parse_subset("full", seed=3, judged=ALL) == SubsetSpec()
    assert parse_subset("bm25@5", seed=3) == parse_subset("bm25@5")
    assert parse_subset("queries:5", seed=3, judged=ALL) == parse_subset("queries:5", seed=3)
    assert parse_subset("queries:5", seed=3) != parse_subset("queries:5")
    assert parse_subset("rerank:a@5", judged=ALL) != parse_subset("rerank:a@5")


def test_a_file_is_found_from_any_directory_and_shown_without_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "top.trec").touch()
    monkeypatch.chdir(tmp_path)
    spec = parse_subset("ranking:top.trec@5")
    assert spec.terms == (SubsetTerm("ranking", 5, (str(tmp_path / "top.trec"),)),)
    assert spec.shown == "ranking:top.trec@5"


def test_a_long_name_is_cut_and_stays_unique() -> None:
    slugs = {parse_subset(f"pool:{','.join(['name' * 9] * 5)},{end}@5").slug for end in "ab"}
    assert len(slugs) == 2
    assert all(len(slug) <= 100 for slug in slugs)


def test_the_whole_corpus_is_the_default() -> None:
    assert parse_subset("full") == SubsetSpec()
