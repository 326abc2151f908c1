"""Find the files of text that a path names, and read their documents in bounded memory.

A file is text, JSON, CSV or Parquet, plain or compressed. Knows no tokens.
"""

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import product
from pathlib import Path
from typing import BinaryIO

import atomic
from data import text_records
from data.document import Document, cut_into_pieces
from data.encodings import decoded
from data.parquet import parquet_texts
from data.records import SUFFIXES, BadRecord
from data.unpack import COMPRESSIONS, decompressed, plain_name, reading

# Of the files that are read in a folder. Parquet has its own compression.
COMPRESSIBLE = (".txt", ".md", *SUFFIXES[:-1])
KNOWN = (".parquet", *map("".join, product(COMPRESSIBLE, ("", *COMPRESSIONS))))
# The first bytes of a file whose content was not downloaded.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
HIDDEN = re.compile(r"\..*|.*~|#.*#", re.DOTALL)


def find(path: str, skipped: Counter[str] | None = None) -> list[Path]:
    """The files that `path` names, sorted: a file of any extension, a folder's, or a glob's.

    Skipped are hidden files and folders that `path` does not name, special files, and in a folder
    files with other extensions. `skipped` counts them. Raises ValueError if no file is left.
    """
    skipped = Counter() if skipped is None else skipped
    place = Path(path)
    # The characters of a glob can also be those of a file name.
    if atomic.is_regular(place):
        return [place]
    reason = unreadable(place)
    if reason:
        raise ValueError(f"{path} {reason}.")
    # All that is in the folder, or matches the glob.
    is_folder = place.is_dir()
    if is_folder:
        base, found = place, []
        for parent, subfolders, names in walk(place):
            found += map(parent.joinpath, names)
            # Runs and sweeps that are stored beside their text are no part of it.
            subfolders[:] = [name for name in subfolders if not holds_run(parent / name)]
    else:
        base, found = Path(place.anchor), matches(place)

    # Sorted, so that the order of documents does not depend on the file system.
    files = []
    for file in sorted(found):
        if file.is_dir():
            continue
        if is_hidden(file.relative_to(base), place):
            skipped["hidden"] += 1
        elif not atomic.is_regular(file):
            skipped["broken links, pipes, sockets or devices"] += 1
        elif is_folder and not file.name.lower().endswith(KNOWN):
            skipped[file.suffix.lower() or "without an extension"] += 1
        else:
            files.append(file)

    if not files:
        details = f" ({skipped_files(skipped)})" if skipped else ""
        raise ValueError(f"{path} holds no file to read{details}: put .txt, .md, .jsonl, .json, "
                         f".csv, .tsv (also compressed, {', '.join(COMPRESSIONS)}) or .parquet "
                         f"there, or name a single file of any extension.")
    return files


def holds_run(folder: Path) -> bool:
    """Whether a training or a sweep has written this folder."""
    # A folder that cannot be searched has none of these files: `walk` refuses it.
    found = {name for name in ("sweep.lock", "turn.lock", "lock", "config.yaml")
             if os.path.isfile(folder / name)}
    return bool(found & {"sweep.lock", "turn.lock"}) or {"lock", "config.yaml"} <= found


def unreadable(path: Path) -> str:
    """Why a path names no files that can be read twice; empty if it may, as a glob may."""
    if path.is_symlink() and not path.exists():
        return "is a symbolic link to itself or to nothing"
    if path.exists() and not (atomic.is_regular(path) or path.is_dir()):
        return "is a pipe, socket or device and cannot be read twice: write its content to a file"
    if not path.exists() and not set(str(path)) & set("*?["):
        return f"does not exist: check the spelling, and that it is relative to {Path.cwd()}"
    return ""


def is_hidden(file: Path, named: Path) -> bool:
    """Whether a part of `file` is hidden and no part of `named` stands for it (.trash/a.txt).

    Hidden are names that start with a dot, and the copies of editors (a.txt~, #a.txt#).
    """
    patterns = [part for part in named.parts if HIDDEN.fullmatch(part)]
    hidden = [part for part in file.parts if HIDDEN.fullmatch(part)]
    return any(not any(fnmatch(part, pattern) for pattern in patterns) for part in hidden)


def skipped_files(skipped: Counter[str]) -> str:
    """The number of skipped files of each kind."""
    return "skipped " + ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def matches(glob: Path) -> list[Path]:
    """The files and folders that a glob matches. Raises ValueError if the glob is invalid.

    Raises PermissionError for a folder that cannot be listed, which `Path.glob` would leave out.
    """
    base, pattern = Path(glob.anchor), glob.relative_to(glob.anchor)
    try:
        for folders in reversed(pattern.parents[:-1]):
            part = pattern.parts[len(folders.parts)]
            mode = os.R_OK | os.X_OK if set(part) & set("*?[") else os.X_OK
            for folder in base.glob(str(folders)):
                if folder.is_dir() and not os.access(folder, mode):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return list(base.glob(str(pattern)))
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


# Read the documents of a file


@dataclass
class File:
    """A file of documents: each of its records, or else the whole file. Blank ones are skipped.

    `text_field` names a record's text. `encoding` is for files without a byte order mark; empty is
    UTF-8. `errors` says what to do with bytes that are not text, "strict" or "replace", and
    `on_bad_record` with records without text, "stop" or "skip". `read_record` makes the text, or a
    whole document, of a JSON record; by default it is the text of its field.
    """

    path: Path
    text_field: str = "text"
    errors: str = "strict"
    encoding: str = ""
    on_bad_record: str = "stop"
    read_record: text_records.RecordReader | None = None
    bad_records: int = field(default=0, init=False)  # in the latest reading
    raw: BinaryIO | None = field(default=None, init=False)

    @property
    def kind(self) -> str:
        """The suffix of a format of records, or "text"."""
        name = plain_name(self.path)
        return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "text")

    def documents(self) -> Iterator[Document]:
        """Raises ValueError naming the file and the place that cannot be read."""
        self.bad_records = 0
        # A plain text is one document.
        if self.kind == "text":
            document = Document(self.text_pieces)
            first = next((piece for piece in document.pieces() if not piece.isspace()), "")
            if text_records.is_json_lines(first):
                raise ValueError(
                    f"{self.path} has JSON records, but its name is that of a plain text: give it "
                    f"the extension .jsonl, or, to train on the JSON itself, set data.separator, "
                    f"as in data.separator='\\n' (each line is a document).")
            if first:
                yield document
            return

        # Of other files, each record is one.
        for text in self.records():
            if isinstance(text, BadRecord):
                if self.on_bad_record == "stop":
                    raise text.refusal(str(self.path))
                self.bad_records += 1
            elif isinstance(text, Document):
                yield text
            elif text and not text.isspace():
                yield Document.of(text)

    def position(self) -> int:
        """The number of bytes on disk that have been read: 0 before reading, all after it."""
        if self.raw is None:
            return 0
        return self.path.stat().st_size if self.raw.closed else self.raw.tell()

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """A stream of the decompressed content.

        Raises ValueError for damage, and if the file changes meanwhile.
        """
        with reading(self.path), open(self.path, "rb") as self.raw:
            before = os.fstat(self.raw.fileno())
            if self.raw.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{self.path} is a pointer of Git LFS to its content: run git lfs "
                                 f"pull there.")
            self.raw.seek(0)
            yield decompressed(self.raw, self.path)
            # By path: the file may have been replaced.
            after = os.stat(self.path)
        if file_version(before) != file_version(after):
            raise ValueError(
                f"{self.path} changed while it was read: run the command again when it is complete."
            )

    def decoded(self, stream: BinaryIO) -> Iterator[str]:
        return decoded(stream, self.path, self.encoding or "utf-8", self.errors)

    def text_pieces(self) -> Iterator[str]:
        """The file as text, in pieces that end where tokens end. Line ends are kept."""
        with self.opened() as stream:
            yield from cut_into_pieces(self.decoded(stream))

    def records(self) -> Iterator[str | Document | BadRecord]:
        """The text of each record, or what `read_record` makes of it."""
        with self.opened() as stream:
            text, kind = self.decoded(stream), self.kind
            if kind in text_records.DELIMITERS:
                yield from text_records.csv_records(text, kind, self.text_field, self.path)
            elif kind != ".parquet":
                read = self.read_record or partial(text_records.text_of, field=self.text_field)
                yield from text_records.json_records(text, kind, read, self.path)
            elif self.path.suffix.lower() in COMPRESSIONS:
                raise ValueError(f"{self.path} is a compressed Parquet file: decompress it.")
            else:
                yield from parquet_texts(stream, self.text_field, self.path)


def file_version(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
