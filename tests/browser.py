"""Headless Chromium for the tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jvlm.data.prepare.render.page import EXECUTABLES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start the Chromium of this machine."""
    from playwright.sync_api import sync_playwright

    found = next(path for name in EXECUTABLES if (path := shutil.which(name)))
    with sync_playwright() as library:
        browser = library.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Page]:
    """Open a page as its reader does, without scripts. In the end nothing may have been asked of a network, nor stand
    in the console."""
    asked, errors = [], []
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1300, "height": 900}, java_script_enabled=False).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.goto(path.as_uri())
        yield page
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []
