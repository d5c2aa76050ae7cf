"""Headless Chromium of the system, without access to any server but the one under test."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Visit:
    """An open page, and what happened on it.

    Attributes:
        page: Playwright's page.
        refused: addresses outside of the allowed prefix that the page asked for; none of them is reached.
        errors: messages of the console of type "error", and uncaught exceptions.
    """

    page: Any
    refused: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def open_page(address: str, allowed: str) -> Iterator[Visit]:
    """Open a page in headless Chromium.

    The test is skipped if playwright or a Chromium is not installed.

    Args:
        address: address of the page.
        allowed: beginning of all addresses that may be requested.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        visit = Visit(browser.new_page(viewport={"width": 1280, "height": 1000}))
        visit.page.set_default_timeout(240_000)  # on a busy machine, a browser needs minutes
        visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
        visit.page.on(
            "console", lambda message: message.type == "error" and visit.errors.append(message.text)
        )

        def check(route: Any) -> None:
            url = route.request.url
            if url.startswith((allowed, "data:", "blob:")):
                route.continue_()
            else:
                visit.refused.append(url)
                route.abort()

        visit.page.route("**/*", check)
        visit.page.goto(address)
        yield visit
        browser.close()
