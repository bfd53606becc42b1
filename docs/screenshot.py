"""The picture in README.md: `python -m docs.screenshot` makes docs/run.png.

It starts an MLflow server, trains and validates the demo on it (3 minutes on 2 cores), opens the
curves of the run in Chromium, and takes the picture. `--tracking-uri URI --run-id RUN` takes the
picture of a finished run instead.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.server import Server

PICTURE = Path(__file__).parent / "run.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
SHOWN = ("train/loss", "val/mrr_at_10", "val/ndcg_at_10", "val/recall_at_100")
SIZE = {"width": 1280, "height": 1060}
SECONDS_TO_START = 60
COLOURS = 64


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracking-uri", help="Of a server that has the run.")
    parser.add_argument("--run-id", help="A finished run on it.")
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args()
    if given.run_id:
        take_picture(given.tracking_uri, given.run_id, given.output)
        return
    with tempfile.TemporaryDirectory() as directory, Server(Path(directory)) as server:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
        command = ["mlflow-dr", "run", "--dataset", "demo", "--run_name", "demo"]
        subprocess.run(command, env=environment, cwd=directory, check=True)
        (run,) = MlflowClient(server.uri).search_runs(["0"])
        take_picture(server.uri, run.info.run_id, given.output)


def take_picture(uri: str, run_id: str, output: Path) -> None:
    """Save a picture of the curves of a run, as MLflow's pages show them."""
    experiment = MlflowClient(uri).get_run(run_id).info.experiment_id
    with sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, BROWSERS)))
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(1000 * SECONDS_TO_START)
        page.route(
            lambda url: not url.startswith((uri, "data:", "blob:")), lambda route: route.abort()
        )
        page.goto(
            f"{uri}/#/experiments/{experiment}/runs/{run_id}/model-metrics"
            "?workflowType=machine_learning"
        )
        show_charts(page)
        picture = page.screenshot()
        browser.close()
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(COLOURS).save(output, optimize=True)
    sys.stdout.write(f"{output}: {output.stat().st_size} bytes\n")


def show_charts(page: Page) -> None:
    """Leave only the charts of the loss and of the measures, and wait until they are drawn."""
    search = page.get_by_placeholder("Search metric charts")
    search.fill("|".join(f"{name}$" for name in SHOWN))
    assistant = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    for name in SHOWN:
        card = cards.filter(has=page.locator(f'h4[title="{name}"]'))
        card.scroll_into_view_if_needed()
        card.locator(".scatterlayer path.js-line").first.wait_for()
    if assistant.count():
        assistant.click()
    cards.first.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)  # charts are drawn again at their new width


if __name__ == "__main__":
    main()
