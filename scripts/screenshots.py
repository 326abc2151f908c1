"""Take the pictures of the README: the page of serve.py, a report, and the page of attention.

  python -m scripts.screenshots run=pydocs

Needs Chromium, and pip install starlette uvicorn matplotlib.
"""

from dataclasses import dataclass
from pathlib import Path

from conf.launch import launch
from setting import FilePath, SettingsBase, setting

WIDTH, HEIGHT = 1280, 800
PROMPT = "Return the number of"


@dataclass(frozen=True)
class ScreenshotSettings(SettingsBase):
    """The settings of the pictures."""

    run: FilePath = setting("", "name or folder of a run; empty: the run that was trained last")
    out: FilePath = setting("docs", "the folder for the pictures")


if __name__ == "__main__":
    # Before the imports below: --help and invalid settings need not wait for torch.
    launch("scripts.screenshots:main", ScreenshotSettings, __doc__)

import tempfile

import atomic
from checkpointing.find_runs import find_run
from report.page import write
from scripts import attention_map
from scripts.chromium import Chromium
from scripts.server import running_server
from terminal import readable_size, say


def main(settings: ScreenshotSettings) -> int:
    run = find_run(Path("runs"), settings.run)
    with Chromium(WIDTH, HEIGHT) as browser, tempfile.TemporaryDirectory() as folder:
        with running_server([f"run={run}"]) as address:
            browser.open(address)
            fill_in(browser)
            save(browser, settings, "page")
        # A report and a page of attention, which open from disk.
        report, page = Path(folder, "report.html"), Path(folder, "attention.html")
        write([(run, run.name)], report, run.name, pictures=False)
        browser.open(report.as_uri())
        save(browser, settings, "report")
        attention_map.main(attention_map.AttentionMapSettings(
            run=str(run), prompt=f"{PROMPT} items in the list.", out=str(page)))
        browser.open(page.as_uri())
        save(browser, settings, "attention-page")
    return 0


def fill_in(browser: Chromium) -> None:
    """Let the model write, and show the alternatives of a token."""
    browser.wait("document.querySelector('#settings input')")
    browser.click("#prompt")
    browser.type(PROMPT)
    browser.click("#ask .primary")
    browser.wait("document.getElementById('written').textContent.startsWith('Wrote')")
    browser.click("document.querySelectorAll('.panel .token')[2]")
    browser.value("scrollTo(0, 0)")


def save(browser: Chromium, settings: ScreenshotSettings, name: str) -> None:
    path, picture = Path(settings.out, f"{name}.png"), browser.picture()
    atomic.write_bytes(path, picture)
    say(f"Wrote {path} ({readable_size(len(picture))})")
