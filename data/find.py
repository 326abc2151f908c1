"""Find the files of text that a path names: a file, all those in a folder, or those of a glob.

Opens no file.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from data.records import SUFFIXES
from data.unpack import COMPRESSIONS, plain_name

# Parquet has its own compression.
COMPRESSIBLE = (".txt", ".md", *SUFFIXES[:-1])
HIDDEN = re.compile(r"\..*|.*~|#.*#", re.DOTALL)


def find(path: str, skipped: Counter[str] | None = None) -> list[Path]:
    """The files that `path` names, sorted: a file of any extension, a folder's, or a glob's.

    Skipped are hidden files and folders that `path` does not name, special files, and in a folder
    files with other extensions. `skipped` counts them. Raises ValueError if no file is left.
    """
    skipped = Counter() if skipped is None else skipped
    place = Path(path)
    # The characters of a glob can also be those of a file name.
    if place.is_file():
        return [place]
    reason = unreadable(place)
    if reason:
        raise ValueError(f"{path} {reason}.")
    is_folder = place.is_dir()
    base, found = Path(place.anchor), []
    if is_folder:
        base = place
        for parent, _, names in walk(place):
            found += map(parent.joinpath, names)
    else:
        found = matches(place)

    # Sorted, so that the order of documents does not depend on the file system.
    files = []
    for file in sorted(found):
        if file.is_dir():
            continue
        if is_hidden(file.relative_to(base), place):
            skipped["hidden"] += 1
        elif not file.is_file():
            skipped["broken links, pipes, sockets or devices"] += 1
        elif is_folder and not has_known_suffix(file):
            skipped[file.suffix.lower() or "without an extension"] += 1
        else:
            files.append(file)

    if not files:
        details = f" ({skipped_files(skipped)})" if skipped else ""
        raise ValueError(f"{path} holds no file to read{details}: put .txt, .md, .jsonl, .json, "
                         f".csv, .tsv (also compressed, {', '.join(COMPRESSIONS)}) or .parquet "
                         f"there, or name a single file of any extension.")
    return files


def unreadable(path: Path) -> str:
    """Why an existing path is not a file that can be read twice; empty if it may be one."""
    if path.is_symlink() and not path.exists():
        return "is a symbolic link to itself or to nothing"
    if path.exists() and not (path.is_file() or path.is_dir()):
        return "is a pipe, socket or device and cannot be read twice: write its content to a file"
    return ""


def is_hidden(file: Path, named: Path) -> bool:
    """Whether a part of `file` is hidden and no part of `named` stands for it (.trash/a.txt).

    Hidden are names that start with a dot, and the copies of editors (a.txt~, #a.txt#).
    """
    patterns = [part for part in named.parts if HIDDEN.fullmatch(part)]
    hidden = [part for part in file.parts if HIDDEN.fullmatch(part)]
    return any(not any(fnmatch(part, pattern) for pattern in patterns) for part in hidden)


def has_known_suffix(path: Path) -> bool:
    return plain_name(path).endswith(COMPRESSIBLE) or path.suffix.lower() == ".parquet"


def skipped_files(skipped: Counter[str]) -> str:
    """The number of skipped files of each kind."""
    return "skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def matches(glob: Path) -> list[Path]:
    """The files and folders that a glob matches. Raises ValueError if the glob is invalid."""
    base = Path(glob.anchor)
    try:
        return list(base.glob(str(glob.relative_to(base))))
    except ValueError:
        raise ValueError(
            f"{glob} is not a valid glob: ** stands for whole folders, as in 'corpus/**/*.txt'."
        ) from None


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Like `os.walk`, but follows symbolic links and visits each folder once.

    Raises OSError for a folder that cannot be listed, which `os.walk` would leave out.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen = set()
    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            subfolders.clear()
        else:
            seen.add((status.st_dev, status.st_ino))
            yield Path(place), subfolders, names
