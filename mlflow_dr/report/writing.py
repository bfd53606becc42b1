"""Writing a report: to files, and to the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mlflow_dr.errors import UsageError
from mlflow_dr.files import atomic_write, scratch
from mlflow_dr.report.contents import RunReport
from mlflow_dr.report.figures import curve_figure
from mlflow_dr.report.page import report_page
from mlflow_dr.report.tables import latex_table, markdown_table
from mlflow_dr.tracking.artifacts import REPORT_FOLDER, log_study
from mlflow_dr.tracking.descriptions import REPORT_TAG, describe_run

PAGE, TABLE = "report.html", "table.md"
PICTURES = (".svg", ".png", ".pdf")
DPI = 150
TABLES: Mapping[str, Callable[[RunReport], str]] = {"md": markdown_table, "latex": latex_table}


def check_picture(path: Path) -> None:
    """Refuse a picture of an unknown format.

    Raises:
        UsageError: with the formats.
    """
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{path}: the name of a picture ends in {', '.join(PICTURES)}")


def write_report_page(report: RunReport, path: Path) -> None:
    """Write the page."""
    with atomic_write(path) as partial:
        partial.write_text(report_page(report), encoding="utf-8")


def write_picture(report: RunReport, path: Path) -> None:
    """Write the curve of the measure that decides, in the format that the name says."""
    check_picture(path)
    kind = path.suffix.lower().removeprefix(".")
    with atomic_write(path) as partial:
        curve_figure(report).savefig(partial, format=kind, dpi=DPI)


def log_report(report: RunReport) -> None:
    """Keep page, curve and table as artifacts of the run; later ones replace them.

    Raises:
        TrackingError: the server did not take them.
    """
    with scratch() as directory:
        directory.mkdir()
        write_report_page(report, directory / PAGE)
        for kind in (".svg", ".png"):
            write_picture(report, directory / f"curve{kind}")
        (directory / TABLE).write_text(markdown_table(report) + "\n", encoding="utf-8")
        log_study(report.run, sorted(directory.iterdir()), REPORT_FOLDER)
    report.run.set_tags({REPORT_TAG: f"{REPORT_FOLDER}/{PAGE}"})
    describe_run(report.run)
