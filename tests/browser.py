"""A headless Chromium for the tests of pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.chromium import Chromium, find_chromium

needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")


def browse(page: Path, script: str) -> tuple[object, str]:
    """Open the page and run `script`, which calls done(value); return that value and the console."""
    with Chromium(1400, 1000) as browser:
        browser.open(page.as_uri())
        value = browser.value(f"""new Promise((done) => {{
            const hover = (element) => element.dispatchEvent(new MouseEvent("mouseenter"));
            {script} }})""")
        return value, "\n".join(browser.console)
