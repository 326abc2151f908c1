"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "headless_shell"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1400,1000"]


def browse(page: Path, tmp_path: Path, script: str) -> tuple[object, str]:
    """Open a copy of the page that also runs `script`, which calls done(value); return that value and the console."""
    tried = tmp_path / "tried.html"
    tried.write_text(page.read_text().replace("</body>", f"""<pre id="result"></pre><script>
      window.addEventListener("error", (event) => console.error("uncaught", event.message));
      const done = (value) => {{ document.getElementById("result").textContent = JSON.stringify(value); }};
      const hover = (element) => element.dispatchEvent(new MouseEvent("mouseenter"));
      {{ {script} }}</script></body>"""))
    ran = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
                          tried.as_uri()], capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="result">(.*?)</pre>', ran.stdout, re.DOTALL)[1]
    return json.loads(html.unescape(result)), "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)
