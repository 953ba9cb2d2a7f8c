"""Headless Chromium through its driver, both from the system; it records what it asks for."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip


@contextmanager
def started() -> Iterator[Chrome]:
    """A browser of its own, closed in the end."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.fail("no Chromium and chromedriver on the path; on Debian: apt install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in _FLAGS:
        options.add_argument(flag)
    browser = Chrome(options=options, service=ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


def requests_of(browser: Chrome) -> list[str]:
    """Addresses that were asked for since the last call."""
    messages = (json.loads(entry["message"])["message"] for entry in _log(browser, "performance"))
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


def complaints_of(browser: Chrome) -> list[Any]:
    """Warnings and errors of the console since the last call."""
    return [entry for entry in _log(browser, "browser") if entry["level"] in {"WARNING", "SEVERE"}]


def _log(browser: Chrome, name: str) -> list[Any]:
    entries: list[Any] = browser.get_log(name)  # type: ignore[no-untyped-call]
    return entries
