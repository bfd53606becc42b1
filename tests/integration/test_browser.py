"""What a user sees: the curves of a run in MLflow's own pages, in a real browser."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from mlflow import MlflowClient

from mlflow_dr.tracking.status import curves_url

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
SECONDS_FOR_THE_PAGE = 300
SHOWN = ("val/mrr_at_10", "val/ndcg_at_10", "val/recall_at_100", "train/loss")


@pytest.fixture
def page(server: str) -> Iterator["Page"]:
    """A page of Chromium that reaches nothing but the server."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1050})
        page.set_default_timeout(1000 * SECONDS_FOR_THE_PAGE)
        page.route(
            lambda url: not url.startswith((server, "data:", "blob:")), lambda route: route.abort()
        )
        yield page
        browser.close()


@pytest.fixture
def output() -> Path:
    """The folder in which the screenshot is kept."""
    default = Path(__file__).parents[2] / "test-output"
    folder = Path(os.environ.get("MLFLOW_DR_TEST_OUTPUT") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_curves_grow_beside_the_training_loss(
    page: "Page", server: str, followed: SimpleNamespace, output: Path
) -> None:
    page.goto(curves_url(SimpleNamespace(id=followed.run_id, experiment_id="0"), server))
    search = page.get_by_placeholder("Search metric charts")
    search.fill("val/(mrr|ndcg|recall)|train/loss")  # the page takes a regular expression
    points = {metric: curve(page, metric) for metric in SHOWN}
    close_assistant(page)
    for metric in SHOWN:
        card(page, metric).wait_for()
    page.wait_for_timeout(1000)  # charts are drawn again at their new width
    page.screenshot(path=output / "run-page.png")
    assert points == {"val/mrr_at_10": 5, "val/ndcg_at_10": 5, "val/recall_at_100": 5} | {
        "train/loss": 10
    }
    box = card(page, "val/mrr_at_10").locator(".scatterlayer").bounding_box()
    assert box["width"] > 100
    assert box["height"] > 50
    assert box["y"] + box["height"] < 1050  # wholly in the screenshot


def card(page: "Page", metric: str) -> "Locator":
    """The chart that has this metric as its title."""
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.locator(f'h4[title="{metric}"]'))


def curve(page: "Page", metric: str) -> int:
    """Number of points of the drawn curve."""
    chart = card(page, metric)
    chart.scroll_into_view_if_needed()
    trace = chart.locator(".scatterlayer .trace").first  # MLflow draws it again to highlight it
    trace.locator("path.js-line").wait_for()
    return trace.locator("path.point").count()


def close_assistant(page: "Page") -> None:
    """Close the panel that newer servers open at the right."""
    button = page.locator('[data-component-id="mlflow.assistant.chat_panel.close"]')
    if button.count():
        button.click()


def test_the_overview_shows_collection_checkpoints_and_how_far_validation_is(
    page: "Page", server: str, followed: SimpleNamespace, collection: Path, output: Path
) -> None:
    page.goto(f"{server}/#/experiments/0/runs/{followed.run_id}")
    close_assistant(page)
    page.get_by_text("Best val/mrr_at_10: ").first.wait_for()  # the first line of the description
    for shown in (collection.name, "5 of 5 checkpoints done", "val/mrr_at_10", "step-20"):
        page.get_by_text(shown).first.wait_for(state="attached")
    figures = page.get_by_role("row").filter(has_text="val/mrr_at_10")
    assert "step-20" in figures.first.inner_text()
    page.screenshot(path=output / "run-overview.png")
    assert (
        page.get_by_role("link", name="Curves")
        .get_attribute("href")
        .endswith(f"/runs/{followed.run_id}/model-metrics?workflowType=machine_learning")
    )


def test_a_checkpoint_says_its_figures_and_how_to_load_it(
    page: "Page", server: str, followed: SimpleNamespace, checkpoints: Callable, output: Path
) -> None:
    model_id = checkpoints(MlflowClient(server), followed.run_id)[20].model_id
    page.goto(f"{server}/#/experiments/0/models/{model_id}?workflowType=machine_learning")
    page.get_by_text("Step 20 of run").first.wait_for()
    close_assistant(page)
    loading = f'encoder = load_model("models:/{model_id}")'
    page.get_by_text(loading).first.wait_for()
    assert "mrr_at_10" in page.get_by_text("ndcg_at_10").first.inner_text()
    page.screenshot(path=output / "model-page.png")
