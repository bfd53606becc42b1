"""The pictures in README.md and the guides: `python -m docs.screenshot` makes docs/*.png.

It starts an MLflow server, trains and validates the demo on it, at first for too few steps and then
with its recipe (5 minutes on 2 cores), writes a report, opens MLflow's pages and the report in
Chromium, and takes the pictures. `--tracking-uri URI --run-id RUN` takes the pictures of a finished
run instead.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.server import Server
from mlflow_dr.decisions.best import find_best
from mlflow_dr.tracking.client import connect
from mlflow_dr.tracking.descriptions import BEST_VALUE, charts_address
from mlflow_dr.tracking.runs import TrackedRun, find_run

FOLDER = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
FEWER_STEPS = ["--max_steps", "100", "--publish_steps", "100", "--publish_initial", "false"]
SHOWN = ("train/loss", "val/mrr_at_10", "val/ndcg_at_10", "val/recall_at_100")
SECONDS_TO_START = 300
COLOURS = 128
TRAINING = "?workflowType=machine_learning"


class Picture(NamedTuple):
    """A page, what is done on it, and the size of the picture."""

    address: str
    prepare: Callable[[Page], None]
    size: tuple[int, int]


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking-uri", help="Of a server that has the run.")
    parser.add_argument("--run-id", help="A finished run on it.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="The folder of the pictures.")
    given = parser.parse_args()
    if given.run_id:
        take_pictures(given.tracking_uri, given.run_id, given.output)
        return
    with tempfile.TemporaryDirectory() as directory, Server(Path(directory)) as server:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
        command = ["mlflow-dr", "run", "--dataset", "demo"]
        for more in (FEWER_STEPS, []):
            subprocess.run([*command, *more], env=environment, cwd=directory, check=True)
        run = MlflowClient(server.uri).search_runs(["0"])[0]
        take_pictures(server.uri, run.info.run_id, given.output)


def take_pictures(uri: str, run_id: str, output: Path) -> None:
    """Save pictures of the list of runs, a run, its curves, its best checkpoint and its report.

    Raises:
        SystemExit: the run lacks a metric whose chart is shown.
    """
    run = find_run(connect(uri), run_id)
    if missing := [name for name in SHOWN if name not in run.fetch().data.metrics]:
        raise SystemExit(f"run {run_id} has no {', '.join(missing)}, whose charts are shown")
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.html"
        argv = ["mlflow-dr", "report", run_id, "--tracking-uri", uri, "--output", str(report)]
        subprocess.run(argv, check=True)
        with sync_playwright() as driver:
            path = next(filter(None, map(shutil.which, BROWSERS)))
            browser = driver.chromium.launch(executable_path=path, args=FLAGS)
            page = browser.new_page()
            page.set_default_timeout(1000 * SECONDS_TO_START)
            allowed = (uri, "data:", "blob:", "file:")
            page.route(lambda url: not url.startswith(allowed), lambda route: route.abort())
            for name, picture in pictures(uri, run, report).items():
                width, height = picture.size
                page.set_viewport_size({"width": width, "height": height})
                page.goto("about:blank")  # MLflow's pages differ after the # alone
                page.goto(picture.address)
                picture.prepare(page)
                save(page.screenshot(), output / name)
            browser.close()


def pictures(uri: str, run: TrackedRun, report: Path) -> dict[str, Picture]:
    """The pictures by the names of their files."""
    experiment = f"{uri}/#/experiments/{run.experiment_id}"
    best = find_best(run)
    checkpoint = f"{experiment}/models/{best.checkpoint.model_id}{TRAINING}"
    column = f"{BEST_VALUE}{best.metric}"
    return {
        "run-list.png": Picture(
            f"{experiment}/runs{TRAINING}", lambda page: show_column(page, run, column), (1700, 420)
        ),
        "run-page.png": Picture(
            f"{experiment}/runs/{run.id}{TRAINING}",
            show_description,
            (1500, 925),
        ),
        "run.png": Picture(f"{uri}/{charts_address(run)}", show_charts, (1280, 1060)),
        "model-page.png": Picture(checkpoint, lambda page: show_text(page, "Step "), (1280, 675)),
        "report.png": Picture(report.as_uri(), lambda page: None, (1150, 1250)),
    }


def save(picture: bytes, path: Path) -> None:
    """Save a picture with few colours."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS).save(path, optimize=True)
    sys.stdout.write(f"{path}: {path.stat().st_size} bytes\n")


def show_text(page: Page, text: str) -> None:
    """Wait until a page shows a text."""
    page.get_by_text(text).first.wait_for()
    settle(page)


def show_description(page: Page) -> None:
    """Unfold the description of a run, which has the curve of its report."""
    show_text(page, "Best ")
    page.get_by_text("Show more").first.click()
    settle(page)


def show_column(page: Page, run: TrackedRun, column: str) -> None:
    """Let the list of runs show a tag as a column, and leave out columns that say little."""
    page.get_by_text(run.name).first.wait_for()
    settle(page)
    page.get_by_role("button", name="Columns").click()
    search = page.get_by_placeholder("Search columns")
    for name in ("Source", column):
        search.fill(name)
        page.get_by_text(name, exact=True).last.click()
    page.keyboard.press("Escape")
    settle(page)
    header = page.locator(".ag-header-cell", has_text=column)
    header.locator(".ag-header-cell-resize").dblclick()  # as wide as its values
    settle(page)


def show_charts(page: Page) -> None:
    """Leave only the charts of the loss and of the measures, and wait until they are drawn."""
    search = page.get_by_placeholder("Search metric charts")
    search.fill("|".join(f"{name}$" for name in SHOWN))
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    for name in SHOWN:
        card = cards.filter(has=page.locator(f'h4[title="{name}"]'))
        card.scroll_into_view_if_needed()
        card.locator(".scatterlayer path.js-line").first.wait_for()
    settle(page)
    cards.first.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)  # charts are drawn again at their new width


def settle(page: Page) -> None:
    """Close MLflow's assistant, and wait until the page is drawn at its new width."""
    assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    if assistant.count():
        assistant.first.click()
    page.wait_for_timeout(3000)


if __name__ == "__main__":
    main()
