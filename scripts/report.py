"""Compare runs on one page that opens from disk, without a network, and in pictures. Needs matplotlib.

  python -m scripts.report runs=pydocs
  python -m scripts.report runs=first,second out=compared.html
  python -m scripts.report runs=SWEEP            all runs in a folder, such as a sweep's

Settings, each with its default:
  runs=NAMES       runs, or folders of runs, separated by commas; without it, the run that was trained last
  out=FILE         the page; without it, report.html in the run's or the sweep's folder, or in runs_dir. The pictures
                   lie beside it: report-curves.png, and where runs differ in settings report-slices.png
  runs_dir=runs
"""

from __future__ import annotations

from conf.launch import launch

if __name__ == "__main__":
    # Before the imports below: torch takes a second or more, which --help and a mistake need not wait for.
    launch("scripts.report:main", "scripts.report:ReportSettings", __doc__)

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.schema import FilePath, FilePaths
from report.history import choose
from report.page import write
from terminal import counted, readable_size


@dataclass(frozen=True)
class ReportSettings:
    """Which runs a report is about, and where it goes."""

    runs: FilePaths = ""  # names or folders, separated by commas; empty: the run that was trained last
    runs_dir: FilePath = "runs"
    out: FilePath = ""  # empty: report.html in the folder that is about them all

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.out and Path(self.out).suffix.lower() not in (".html", ".htm"):
            yield f"out={self.out} must end in .html."


def main(settings: ReportSettings) -> int:
    chosen, folder = choose(Path(settings.runs_dir), settings.runs)
    out = Path(settings.out) if settings.out else folder / "report.html"
    first, *rest = write(chosen, out)
    print(f"Wrote {first} ({readable_size(first.stat().st_size)}, {counted(len(chosen), 'run')}): open it in a browser.")
    for picture in rest:
        print(f"Drew {picture}")
    return 0
