"""Take the pictures of the README: the page of serve.py, a report, and the page of attention.

  python -m scripts.screenshots run=pydocs

Needs Chromium, and pip install starlette uvicorn matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.launch import launch
from setting import FilePath, setting

WIDTH, HEIGHT = 1280, 800


@dataclass(frozen=True)
class ScreenshotSettings:
    """The settings of the pictures."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    runs_dir: FilePath = setting("runs", "the folder that the name is in")
    prompt: str = setting("Return the number of", "the text to continue")
    out: FilePath = setting("docs", "the folder for the pictures")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if not self.prompt:
            yield "prompt is empty: give a text to continue."


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.screenshots:main", ScreenshotSettings, __doc__)

import tempfile

import atomic
from checkpointing.find_runs import find_run
from conf.schema import compose
from report.page import write
from scripts import attention_map
from scripts.chromium import Chromium
from scripts.server import running_server
from terminal import readable_size, say


def main(settings: ScreenshotSettings) -> int:
    run = find_run(Path(settings.runs_dir), settings.run)
    with Chromium(WIDTH, HEIGHT) as browser, tempfile.TemporaryDirectory() as folder:
        with running_server([f"run={run}"]) as address:
            browser.open(address)
            fill_in(browser, settings.prompt)
            save(browser, settings, "page")
        report = Path(folder) / "report.html"
        write([(run, run.name)], report, run.name, pictures=False)
        browser.open(report.as_uri())
        save(browser, settings, "report")
        page = Path(folder) / "attention.html"
        words = [f"run={run}", f"prompt={settings.prompt} items in the list.", f"out={page}"]
        attention_map.main(compose(attention_map.AttentionMapSettings, words))
        browser.open(page.as_uri())
        save(browser, settings, "attention-page")
    return 0


def fill_in(browser: Chromium, prompt: str) -> None:
    """Let the model write, and show the alternatives of a token."""
    browser.wait("document.querySelector('#settings input')")
    browser.click("#prompt")
    browser.type(prompt)
    browser.click("#ask .primary")
    browser.wait("document.getElementById('written').textContent.startsWith('Wrote')")
    browser.click("document.querySelectorAll('.panel .token')[2]")
    browser.value("scrollTo(0, 0)")


def save(browser: Chromium, settings: ScreenshotSettings, name: str) -> None:
    path = Path(settings.out) / f"{name}.png"
    picture = browser.picture()
    atomic.write_bytes(path, picture)
    say(f"Wrote {path} ({readable_size(len(picture))})")
