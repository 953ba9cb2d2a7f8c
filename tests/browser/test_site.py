"""The documentation in headless Chromium, served on localhost; `make test-docs`.

Needs Chromium and its driver, on Debian `apt install chromium chromium-driver`.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser.chromium import complaints_of, requests_of, started

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
SECONDS = 20  # until something must have appeared


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # noqa: S603
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with started() as driver:
        yield driver


def test_every_page_loads_without_an_error_or_a_request_to_another_host(
    browser: Chrome, site: Path, address: str
) -> None:
    for page in sorted(site.rglob("*.html")):
        browser.get(f"{address}/{page.relative_to(site).as_posix()}")
        foreign = [url for url in requests_of(browser) if not url.startswith((address, "data:", "blob:"))]
        assert (page.name, complaints_of(browser), foreign) == (page.name, [], [])


def test_search_finds_calibration(browser: Chrome, address: str) -> None:
    browser.get(f"{address}/index.html")
    field = browser.find_element(By.CSS_SELECTOR, "input.md-search__input")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys("calibration")
    found = _wait(browser, "a.md-search-result__link")
    assert any("concepts/calibration.html" in (link.get_attribute("href") or "") for link in found)


def test_the_zoo_filters_by_name_and_sorts_by_flops(browser: Chrome, address: str) -> None:
    browser.get(f"{address}/zoo.html")
    (field,) = _wait(browser, "input.table-filter")
    everything = _cells(browser, 1)
    field.send_keys("resnet")
    names = _cells(browser, 1)
    assert 0 < len(names) < len(everything)
    assert all("resnet" in name for name in names)

    (heading,) = [
        one for one in browser.find_elements(By.CSS_SELECTOR, "table[data-sortable] th button") if one.text == "GFLOPs"
    ]
    for descending in (False, True):
        browser.execute_script("arguments[0].click()", heading)
        flops = [float(cell) for cell in _cells(browser, 3) if cell]
        assert len(flops) > 1
        assert flops == sorted(flops, reverse=descending)


def test_a_recipe_page_shows_the_file_and_every_field(browser: Chrome, address: str) -> None:
    browser.get(f"{address}/recipes/resnet20-cifar10-3.6x.html")
    text = browser.find_element(By.TAG_NAME, "article").text
    for expected in ("budget: 3.6x", "one_shot.rho", "finalize.lr", "Measured:", "Limitations"):
        assert expected in text


def test_dark_mode_switches(browser: Chrome, address: str) -> None:
    browser.get(f"{address}/index.html")
    body = browser.find_element(By.TAG_NAME, "body")
    seen = set()
    for _ in range(2):
        seen.add((body.get_attribute("data-md-color-scheme"), body.value_of_css_property("background-color")))
        label = next(one for one in browser.find_elements(By.CSS_SELECTOR, "form label") if one.is_displayed())
        label.click()
    assert {scheme for scheme, _ in seen} == {"default", "slate"}
    assert len({color for _, color in seen}) == 2


def test_a_phone_scrolls_down_only(browser: Chrome, site: Path, address: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    for page in sorted(site.rglob("*.html")):
        browser.get(f"{address}/{page.relative_to(site).as_posix()}")
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert (page.name, width) == (page.name, 360)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def _wait(browser: Chrome, selector: str) -> list[WebElement]:
    def found(driver: Chrome) -> list[WebElement]:
        return driver.find_elements(By.CSS_SELECTOR, selector)

    return WebDriverWait(browser, SECONDS).until(found) or []


def _cells(browser: Chrome, column: int) -> list[str]:
    script = """
        const rows = [...document.querySelector("table[data-sortable]").tBodies[0].rows];
        return rows.filter(row => !row.hidden).map(row => row.cells[arguments[0] - 1].textContent);
    """
    texts: list[str] = browser.execute_script(script, column)
    return texts
