"""What a study says, writes and draws."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr.loaders.cell import Cell
from mlflow_dr.loaders.pictures import PICTURES
from mlflow_dr.loaders.report import (
    advised_flags,
    findings,
    study_text,
    write_study,
)
from mlflow_dr.loaders.results import CellFigures, LoaderStudy

MakeCell = Callable[..., CellFigures]
MakeStudy = Callable[..., LoaderStudy]


@pytest.fixture
def measured() -> MakeCell:
    """Makes a measured cell of three repeats; the rate is documents a second."""

    def make(store: str, rate: float, private: float = 170.0, **settings: Any) -> CellFigures:
        figures = {
            "samples": 1000,
            "samples_per_s": rate,
            "samples_per_cpu_s": rate / max(1, settings.get("workers", 0)),
            "open_s": 0.01,
            "first_batch_s": 0.1,
            "wait_p99_ms": 5.0,
            "host_next_s": 1.0,
            "cpu_lookup_s": 0.5,
            "private_start_mb": private - 1,
            "private_end_mb": private,
            "private_mb_per_100k": 0.5,
            "memory_series": [[0, private - 1], [1000, private]],
        }
        takes = settings.pop("model_takes", None)
        if takes is not None:
            figures["model_samples_per_s"] = takes
        figures |= settings.pop("figures", {})
        repeats = [{**figures, "samples_per_s": rate * factor} for factor in (0.9, 1.0, 1.2)]
        return CellFigures(Cell(store=store, **settings), repeats)

    return make


@pytest.fixture
def study(measured: MakeCell) -> Callable[..., LoaderStudy]:
    """Makes a study of cells."""

    def make(*cells: CellFigures, payload: str = "ids") -> LoaderStudy:
        return LoaderStudy("sea", 100, payload, "tiny", cells, {"lookup": 0.5})

    return make


@pytest.fixture
def usual(measured: MakeCell, study: MakeStudy) -> LoaderStudy:
    return study(
        measured("memory", 3800, 900, model_takes=1000),
        measured("lookup", 4000, 160, model_takes=1000),
        measured("lookup", 6600, 400, workers=2, model_takes=1000),
        measured("tokens", 420_000, 170, model_takes=1000),
        measured("tokens", 800_000, 180, workers=2, threads=True, model_takes=1000),
        measured("memory", 6000, 2200, workers=2, start_method="forkserver", model_takes=1000),
        measured("lookup", 7000, 320, ranks=2, model_takes=1000),
        measured("lookup", 3000, 160, cache="cold", model_takes=1000),
        CellFigures(
            Cell(store="lookup", ramdisk=True), [], "/dev/shm has 60 MB; 381 MB are needed"
        ),
    )


def test_the_table_has_a_line_for_each_cell(usual: LoaderStudy) -> None:
    text = study_text(usual)
    lines = text.splitlines()
    assert lines[0] == (
        "8 ways to load documents, of 100 passages of sea; token ids reach the training process"
    )
    line = next(line for line in lines if line.startswith("memory, 2 workers, forkserver"))
    assert line.split("  ")[0] == "memory, 2 workers, forkserver"
    assert "2199-2200" in line
    assert "  lookup, RAM disk: /dev/shm has 60 MB; 381 MB are needed" in lines


def test_the_findings_are_sentences(usual: LoaderStudy) -> None:
    assert findings(usual) == [
        "tokens, 2 threads supplies the most: 800000 documents a second, 800 times what the model "
        "takes (1000), with 0.18 GB of private memory.",
        "Tokenising at load time supplies 4000 documents a CPU second, so it takes one worker to "
        "keep up with the model.",
        "Without workers, stores of text are within 5% of each other: the store decides memory, "
        "opening and reading from disk, not speed.",
        "memory, 2 workers, forkserver takes 2.15 GB of private memory, 14 times as much as lookup "
        "without workers.",
        "Use `mlflow-dr train --token_table false --document_store lookup --dataloader_num_workers "
        "0`.",
    ]


def test_without_a_model_the_fastest_way_is_recommended(
    measured: MakeCell, study: MakeStudy
) -> None:
    found = study(measured("lookup", 4000), measured("tokens", 420_000, 200))
    assert "105 times what tokenising at load time does in a CPU second" in " ".join(
        findings(found)
    )
    assert advised_flags(found) == (
        "Use `mlflow-dr train --token_table true --dataloader_num_workers 0`."
    )


def test_a_model_that_takes_more_than_any_cell_supplies_gets_the_fastest(
    measured: MakeCell, study: MakeStudy
) -> None:
    found = study(
        measured("lookup", 4000, model_takes=9000),
        measured("lookup", 8000, 400, workers=2, model_takes=9000),
    )
    assert "takes 3 workers to keep up" in " ".join(findings(found))
    assert advised_flags(found) == (
        "Use `mlflow-dr train --token_table false --document_store lookup --dataloader_num_workers "
        "2`."
    )


def test_nothing_is_recommended_where_no_token_ids_arrive(
    measured: MakeCell, study: MakeStudy
) -> None:
    found = study(measured("lookup", 900_000), measured("arrow", 90_000), payload="lookup")
    assert findings(found) == [
        "lookup without workers supplies the most: 900000 documents a second, with 0.17 GB of "
        "private memory.",
        "Without workers, lookup is 10.0 times as fast as arrow in a CPU second.",
    ]


def test_growing_memory_is_named(measured: MakeCell, study: MakeStudy) -> None:
    growth = {"private_mb_per_100k": 200, "private_start_mb": 700}
    found = study(measured("memory", 4000, 1300, figures=growth), measured("lookup", 4000))
    assert "Private memory was still growing at the end of: memory." in findings(found)


def test_files_have_every_figure(usual: LoaderStudy, tmp_path: Path) -> None:
    files = write_study(usual, tmp_path / "study")
    assert [file.name for file in files] == ["report.txt", "table.csv", *PICTURES]
    assert files[0].read_text() == study_text(usual) + "\n"
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 3
    assert rows[0]["cell"] == "memory"
    assert [float(row["samples_per_s"]) for row in rows[:3]] == pytest.approx([3420, 3800, 4560])
    assert "memory_series" not in rows[0]
    for file in files[2:]:
        assert file.read_bytes().startswith(b"\x89PNG")


def test_pictures_name_every_cell(usual: LoaderStudy) -> None:
    figure = PICTURES["memory_and_speed.png"](usual, 1000)
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == [cell.cell.label for cell in usual.measured]
    figure = PICTURES["speed_by_workers.png"](usual, 1000)
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["memory", "lookup", "tokens", "tokens, threads", "what the model takes"]
    figure = PICTURES["where_time_goes.png"](usual, 1000)
    assert len(figure.axes[0].get_yticklabels()) == 8


def test_the_metrics_of_a_cell_are_those_of_each_repeat(usual: LoaderStudy) -> None:
    assert usual.measured[0].metrics[1]["loaders/samples_per_s"] == 3800


def test_the_text_says_how_long_stores_took_to_build(usual: LoaderStudy) -> None:
    assert "building took: lookup 0.5 s" in study_text(usual)
