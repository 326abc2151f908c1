"""Compare runs on one page that opens from disk, without a network, and in pictures. Needs matplotlib.

  python -m scripts.report runs=pydocs
  python -m scripts.report runs=first,second out=compared.html
  python -m scripts.report runs=SWEEP            all runs in a folder, such as a sweep's
  python -m scripts.report runs=pydocs out=loss.png    only the losses, as a picture

Settings, each with its default:
  runs=NAMES       runs, or folders of runs, separated by commas; without it, the run that was trained last,
                   or all runs of its sweep
  out=FILE         the page; without it, report.html in the run's or the sweep's folder. A comparison of several
                   is a page of its own in runs_dir, such as report-first,second.html. Pictures are beside it:
                   report-curves.png, and report-slices.png where four or more finished runs differ in settings.
                   out=NAME.png, .svg or .pdf draws a picture of the losses instead of the page
  runs_dir=runs
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: --help and a wrong setting need not wait for torch.
    launch("scripts.report:main", "scripts.report:ReportSettings", __doc__)

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import atomic
from report.curves import loss_picture
from report.figures import PICTURES
from report.history import choose
from report.page import open_runs, write
from setting import FilePath, FilePaths
from terminal import counted, readable_size, say

PAGES = (".html", ".htm")
MOST_LETTERS = 60  # of the names in the name of a page


@dataclass(frozen=True)
class ReportSettings:
    """Which runs a report is about, and where it goes."""

    runs: FilePaths = ""  # names or folders, with commas between; empty: the run or sweep trained last
    runs_dir: FilePath = "runs"
    out: FilePath = ""  # empty: see page_of

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.out and Path(self.out).suffix.lower() not in (*PAGES, *PICTURES):
            yield f"out={self.out} must end in .html, .png, .svg or .pdf."


def main(settings: ReportSettings) -> int:
    chosen, folders = choose(Path(settings.runs_dir), settings.runs)
    out = Path(settings.out) if settings.out else page_of(folders, Path(settings.runs_dir))
    kind = out.suffix.lower()
    if kind in PICTURES:
        atomic.write_bytes(out, loss_picture(open_runs(chosen), kind.lstrip(".")))
        say(f"Drew {out}")
        return 0
    first, *rest = write(chosen, out, title_of(folders))
    say(f"Wrote {first} ({readable_size(first.stat().st_size)}, {counted(len(chosen), 'run')}): open it in a browser.")
    for picture in rest:
        say(f"Drew {picture}")
    return 0


def title_of(folders: list[Path]) -> str:
    """What is compared, such as "first, second and 3 more"."""
    names = [folder.resolve().name for folder in folders]
    if len(names) > 3:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    return ", ".join(names)


def page_of(folders: list[Path], runs_dir: Path) -> Path:
    """A page for each comparison, so that none replaces another: named by what is compared, in any order.

    A run or a sweep has its page in its own folder.
    """
    if len(folders) == 1:
        return folders[0] / "report.html"
    names = sorted(folder.resolve().name for folder in folders)
    name = re.sub(r"[^\w.=+,-]", "_", ",".join(names))[:MOST_LETTERS]
    unmistakable = name.split(",") == names and all(folder.resolve().parent == runs_dir.resolve() for folder in folders)
    if not unmistakable:
        places = "\n".join(sorted(str(folder.resolve()) for folder in folders))
        name += "-" + hashlib.sha256(places.encode()).hexdigest()[:8]
    return runs_dir / f"report-{name}.html"
