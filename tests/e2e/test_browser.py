"""The main journey in a real browser: every page renders, charts are drawn, no error on the console, links work."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGES = ("Overview", "Forecasts", "Triage", "Anomalies", "Backtests", "Explanations", "Dynamics", "Data", "Runs")
VIEWPORT = {"width": 1400, "height": 1500}
PATIENCE = 120_000  # milliseconds; a machine under load draws slowly
# A page opened by its own address first looks for the server below that address, then at the root.
_PROBE = re.compile(r"http://localhost:\d+/\w+/_stcore/(health|host-config)")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard(filled_workspace: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "tsforge", "dashboard", "--port", str(port), "--home", str(filled_workspace)]
    own = {name: value for name, value in os.environ.items() if name not in ("TSFORGE_DATABASE_URL", "PYTHONWARNINGS")}
    own.pop("MLFLOW_TRACKING_URI", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=own)
    address = f"http://localhost:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=5) as answer:
                if answer.status == 200:
                    break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "the dashboard ended at once"
            assert time.monotonic() < deadline, "the dashboard did not answer within two minutes"
            time.sleep(0.3)
    yield address
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "Traceback" not in out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visitor:
    """A browser page that remembers what went wrong on it and what it asked of other hosts."""

    def __init__(self, browser: Any, colours: str = "light") -> None:
        self.page = browser.new_page(viewport=VIEWPORT, color_scheme=colours)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not _PROBE.fullmatch(str(message.location.get("url", ""))):
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def _request(self, request: Any) -> None:
        if request.url.startswith("http") and not request.url.startswith("http://localhost:"):
            self.outside.append(request.url)

    def open(self, url: str) -> None:
        self.page.goto(url, timeout=PATIENCE)
        self.settle()

    def choose(self, title: str) -> None:
        """Follow a link of the navigation."""
        self.page.get_by_test_id("stSidebarNav").get_by_role("link", name=title, exact=True).click(timeout=PATIENCE)
        self.page.wait_for_selector(f"h1:has-text('{title}')", timeout=PATIENCE)
        self.settle()

    def settle(self) -> None:
        """Wait until the script has ended and every chart is drawn."""
        self.page.wait_for_selector("h1", timeout=PATIENCE)
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=PATIENCE)
        self.page.wait_for_function(
            "[...document.querySelectorAll('.stPlotlyChart')].every(chart => chart.querySelector('.main-svg'))"
            " && [...document.querySelectorAll('[data-testid=stDataFrame]')].every("
            "    table => table.closest('details:not([open])') || table.querySelector('canvas'))"
            " && !document.querySelector('[data-testid=stSkeleton]')",
            timeout=PATIENCE,
        )

    def shoot(self, name: str) -> None:
        """Keep a picture of the whole page below ``TSFORGE_SCREENSHOTS``, if that is set."""
        shots = os.environ.get("TSFORGE_SCREENSHOTS")
        if shots:
            Path(shots).mkdir(parents=True, exist_ok=True)
            inner = "document.querySelector('[data-testid=stMain]').scrollHeight"
            self.page.set_viewport_size({"width": 1400, "height": min(int(self.page.evaluate(inner)) + 20, 4000)})
            self.page.wait_for_timeout(1000)
            self.page.screenshot(path=str(Path(shots) / f"{name}.png"))
            self.page.set_viewport_size(VIEWPORT)

    def check(self) -> None:
        assert self.page.get_by_test_id("stException").count() == 0
        assert self.page.get_by_test_id("stAlertContentError").count() == 0
        assert self.errors == []
        assert self.outside == []


@pytest.fixture(scope="module")
def visitor(dashboard: str, browser: Any) -> Iterator[Visitor]:
    """One person who walks through the pages, starting at the front door."""
    made = Visitor(browser)
    made.open(dashboard)
    yield made
    made.page.close()


@pytest.mark.parametrize("title", PAGES)
def test_page_renders(visitor: Visitor, title: str) -> None:
    visitor.choose(title)
    visitor.shoot(title.lower())
    visitor.check()
    charts = visitor.page.locator(".js-plotly-plot .main-svg").count()
    assert charts > 0 or title in ("Overview", "Runs")
    assert visitor.page.get_by_test_id("stDataFrame").count() > 0 or title == "Forecasts"


def test_another_cutoff_redraws_the_forecast(visitor: Visitor) -> None:
    visitor.choose("Forecasts")
    before = visitor.page.locator("text=the model sees nothing").first.inner_text()
    thumb = visitor.page.get_by_role("slider").first
    thumb.focus()
    for _ in range(5):
        thumb.press("ArrowRight")
    visitor.page.wait_for_function("new URL(location.href).searchParams.get('back') === '5'", timeout=PATIENCE)
    visitor.settle()
    assert visitor.page.locator("text=the model sees nothing").first.inner_text() != before
    visitor.check()


def test_a_finding_can_be_sent_as_a_link(visitor: Visitor, browser: Any) -> None:
    visitor.choose("Anomalies")
    link = visitor.page.url
    assert "event=" in link
    assert "series=" in link
    shown = visitor.page.locator("p:has-text('Event of')").first.inner_text()
    other = Visitor(browser, colours="dark")
    other.open(link)
    assert other.page.locator("p:has-text('Event of')").first.inner_text() == shown
    assert other.page.url == link
    other.shoot("anomalies-dark")
    other.check()
    other.page.close()


def test_the_back_button_leads_from_choice_to_choice_and_out(dashboard: str, browser: Any) -> None:
    visitor = Visitor(browser)
    visitor.open(dashboard)
    visitor.choose("Data")
    first = visitor.page.url
    box = visitor.page.get_by_test_id("stSelectbox").filter(has_text="Series").locator("input")
    shown = box.get_attribute("value")
    box.click(timeout=PATIENCE)
    visitor.page.get_by_role("option").nth(1).click(timeout=PATIENCE)
    visitor.page.wait_for_function("url => location.href !== url", arg=first, timeout=PATIENCE)
    visitor.settle()
    assert box.get_attribute("value") != shown
    visitor.page.go_back()
    visitor.page.wait_for_function(
        "shown => [...document.querySelectorAll('[data-testid=stSelectbox] input')].some(box => box.value === shown)",
        arg=shown,
        timeout=PATIENCE,
    )
    visitor.settle()
    assert visitor.page.url == first
    for _ in range(2):  # over the address without choices that the page was opened with
        visitor.page.go_back()
        visitor.page.wait_for_timeout(300)
        visitor.settle()
    visitor.page.wait_for_selector("h1:has-text('Overview')", timeout=PATIENCE)
    visitor.check()
    visitor.page.close()


def test_the_first_page_has_an_address_of_its_own(dashboard: str, browser: Any) -> None:
    visitor = Visitor(browser)
    visitor.open(f"{dashboard}/overview")
    visitor.page.wait_for_selector("h1:has-text('Overview')", timeout=PATIENCE)
    assert visitor.page.get_by_role("dialog").count() == 0
    assert visitor.page.get_by_test_id("stSidebarNav").get_by_role("link", name="Overview").count() == 1
    visitor.check()
    visitor.page.close()


def test_kernels_of_a_state_space_model_are_drawn(filled_workspace: Path, dashboard: str, browser: Any) -> None:
    model = next(path.name for path in (filled_workspace / "artifacts").iterdir() if path.name.startswith("s4"))
    visitor = Visitor(browser)
    visitor.open(f"{dashboard}/forecasts?artifact={model}")
    visitor.page.get_by_text("What the model learnt").click(timeout=PATIENCE)
    for tab in ("timescales", "kernels"):
        visitor.page.get_by_role("tab", name=tab).click(timeout=PATIENCE)
        visitor.page.wait_for_function(
            "[...document.querySelectorAll('[role=tabpanel] .js-plotly-plot .main-svg')]"
            ".some(chart => chart.getBoundingClientRect().width > 300)",
            timeout=PATIENCE,
        )
        visitor.shoot(f"forecasts-{tab}")
    visitor.check()
    visitor.page.close()


@pytest.mark.parametrize("colours", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_coupling_and_time_scales_of_chimera_are_drawn(
    filled_workspace: Path, dashboard: str, browser: Any, colours: str
) -> None:
    model = next(path.name for path in (filled_workspace / "artifacts").iterdir() if path.name.startswith("chimera"))
    visitor = Visitor(browser, colours=colours)
    visitor.open(f"{dashboard}/forecasts?artifact={model}")
    visitor.page.get_by_text("What the model learnt").click(timeout=PATIENCE)
    for tab in ("time scales", "coupling"):
        visitor.page.get_by_role("tab", name=tab).click(timeout=PATIENCE)
        visitor.page.wait_for_function(
            "[...document.querySelectorAll('[role=tabpanel] .js-plotly-plot .main-svg')]"
            ".some(chart => chart.getBoundingClientRect().width > 300)",
            timeout=PATIENCE,
        )
        visitor.shoot(f"forecasts-{tab.replace(' ', '-')}-{colours}")
    visitor.check()
    visitor.page.close()


@pytest.mark.parametrize("colours", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_graphs_are_drawn(dashboard: str, browser: Any, colours: str) -> None:
    visitor = Visitor(browser, colours=colours)
    visitor.open(f"{dashboard}/graphs")
    visitor.page.wait_for_function(
        "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 10", timeout=PATIENCE
    )
    visitor.shoot(f"graphs-{colours}")
    visitor.check()
    visitor.page.close()


@pytest.mark.parametrize(("colours", "width"), [("light", 1400), ("dark", 480)])
def test_triage_is_walked_by_keys_in_wide_and_narrow_windows(
    dashboard: str, browser: Any, colours: str, width: int
) -> None:
    visitor = Visitor(browser, colours=colours)
    visitor.page.set_viewport_size({"width": width, "height": 2200})
    visitor.open(f"{dashboard}/triage?show=all")
    visitor.page.wait_for_function("new URL(location.href).searchParams.get('event') !== null", timeout=PATIENCE)
    first = visitor.page.evaluate("new URL(location.href).searchParams.get('event')")
    visitor.page.keyboard.press("j")
    visitor.page.wait_for_function(
        "first => ![null, first].includes(new URL(location.href).searchParams.get('event'))",
        arg=first,
        timeout=PATIENCE,
    )
    visitor.settle()
    assert visitor.page.get_by_text("2 of ").count() == 1
    wider = "document.querySelector('[data-testid=stMain]').scrollWidth > window.innerWidth"
    assert not visitor.page.evaluate(wider), "the page must not scroll sideways"
    if width == VIEWPORT["width"]:
        visitor.shoot(f"triage-{colours}-{width}")
    visitor.check()
    visitor.page.close()
