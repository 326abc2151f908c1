"""Compare runs on one page that opens from disk without a network, and in pictures.

  python -m scripts.report runs=pydocs
  python -m scripts.report runs=first,second out=compared.html
  python -m scripts.report runs=SWEEP                  all runs in a folder, such as a sweep's
  python -m scripts.report runs=pydocs out=loss.png    only the losses, as a picture

The page of a run or a sweep is report.html in its folder. A comparison of several is a page in
runs_dir, such as report-first,second.html. Beside the page are report-curves.png, and
report-slices.png if four or more finished runs differ in settings. Needs matplotlib (pip install
matplotlib).
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.launch import launch
from report.figures import PICTURES, write_picture
from report.page import open_runs, write
from report.pictures import loss_picture
from report.runs import choose
from setting import FilePath, FilePaths, setting
from terminal import counted, readable_size, say

PAGES = (".html", ".htm")
MAX_LETTERS = 60  # of the runs' names in the name of a page


@dataclass(frozen=True)
class ReportSettings:
    """The settings of a report."""

    runs: FilePaths = setting(
        "",
        "names or folders of runs, or of folders with runs, separated by commas; empty: the run "
        "that was trained last, or all runs of its sweep",
    )
    runs_dir: FilePath = setting("runs", "the folder that the names are in")
    out: FilePath = setting(
        "", "the page, .html; or a picture of the losses instead of a page: .png, .svg or .pdf")

    def problems(self) -> Iterator[str]:
        """One sentence for each invalid value."""
        if self.out and Path(self.out).suffix.lower() not in (*PAGES, *PICTURES):
            yield f"out={self.out} must end in .html, .png, .svg or .pdf."


def main(settings: ReportSettings) -> int:
    # Choose the runs, and the file.
    runs_dir = Path(settings.runs_dir)
    chosen, folders = choose(runs_dir, settings.runs)
    out = Path(settings.out) if settings.out else default_page(folders, runs_dir)
    if out.suffix.lower() in PICTURES:
        write_picture(str(out), lambda kind: loss_picture(open_runs(chosen), kind))
        return 0

    # Write the page and its pictures.
    page, *pictures = write(chosen, out, title_of(folders))
    size = readable_size(page.stat().st_size)
    say(f"Wrote {page} ({size}, {counted(len(chosen), 'run')}): open it in a browser.")
    for picture in pictures:
        say(f"Drew {picture}")
    return 0


def title_of(folders: list[Path]) -> str:
    """The names of what is compared, such as "first, second and 3 more"."""
    names = [folder.resolve().name for folder in folders]
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return ", ".join(names)


def default_page(folders: list[Path], runs_dir: Path) -> Path:
    """The page in the folder of a run or a sweep; for several, a page named by what is compared.

    Different comparisons have different pages, and the order of the names does not matter.
    """
    if len(folders) == 1:
        return folders[0] / "report.html"
    places = sorted(folder.resolve() for folder in folders)
    names = sorted(place.name for place in places)
    name = re.sub(r"[^\w.=+,-]", "_", ",".join(names))[:MAX_LETTERS]
    # Where the name can stand for other folders too, a digest of the paths is added.
    unique = name.split(",") == names
    if not unique or any(place.parent != runs_dir.resolve() for place in places):
        paths = "\n".join(map(str, places))
        name += "-" + hashlib.sha256(paths.encode()).hexdigest()[:8]
    return runs_dir / f"report-{name}.html"


if __name__ == "__main__":
    launch(main, ReportSettings, __doc__)
