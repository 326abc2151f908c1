"""Where documents come from. Each source yields texts and can say, without reading far, what it would yield.

Knows files and text; knows no tokens.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import os
import platform
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import atomic

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class DataConfig:
    """What to learn from, and in which tokens."""

    source: Literal["pydocs", "shakespeare", "text"] = "pydocs"
    path: str = ""  # text: a file, or a folder of .txt and .md; shakespeare: a local copy
    tokenizer: Literal["char", "byte", "gpt2", "bpe"] = "bpe"
    vocab_size: int = 2048  # of a tokenizer that is trained here (bpe); the others have their own
    val_fraction: float = 0.1  # held out to validate on, never trained on

    def problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work."""
        if self.source == "text" and not self.path:
            yield "path is missing: name a UTF-8 file or a folder of .txt and .md files, as in data.path=book.txt."
        if self.path and not Path(self.path).exists():
            yield f"path={self.path} does not exist: check the spelling, and that it is relative to {Path.cwd()}."
        if not 257 <= self.vocab_size <= 100_000:
            yield f"vocab_size={self.vocab_size} is out of range: a byte-pair vocabulary has 257 to 100000 tokens."
        if not 1e-6 <= self.val_fraction < 1:
            yield f"val_fraction={self.val_fraction} must lie between 0.000001 and 1: 0.1 holds out a tenth."


def data_root() -> Path:
    """The folder for prepared tokens and downloads: `data/prepared`, or where NANOHYDRA_DATA says."""
    return Path(os.environ.get("NANOHYDRA_DATA") or Path(__file__).parent / "prepared")


def open_source(config: DataConfig) -> PyDocs | TextFiles:
    """The source that `config` names. Downloads where that is what it takes."""
    if config.source == "pydocs":
        return PyDocs()
    if config.source == "shakespeare":
        return TextFiles(Path(config.path) if config.path else fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256))
    return TextFiles(Path(config.path))


class PyDocs:
    """The English inside every Python: the language reference of `pydoc_data`, and all docstrings.

    Read with `ast`, never by importing. It varies with the Python version, so figures name that.
    """

    def __init__(self, library: Path | None = None) -> None:
        self.stdlib = library or Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
        self.files = sorted(path for path in self.stdlib.rglob("*.py")
                            if skipped.isdisjoint(path.relative_to(self.stdlib).parts))

    def fingerprint(self) -> str:
        """Changes with the Python version or any file's name or size."""
        names = "\n".join(f"{path.relative_to(self.stdlib)} {path.stat().st_size}" for path in self.files)
        return hashlib.sha256(f"pydocs {platform.python_version()}\n{names}".encode()).hexdigest()

    def documents(self) -> Iterator[str]:
        yield from self.texts

    @cached_property
    def texts(self) -> list[str]:
        """All of them, about 2 MB: parsing takes seconds, so it is done once."""
        texts: list[str] = []
        for path in tqdm(self.files, desc="Reading the standard library", unit="file", leave=False):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue  # a template or an example of broken code: nothing to read
            if path.relative_to(self.stdlib).as_posix() == "pydoc_data/topics.py":
                texts.extend(self.topics(tree))
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    texts.append(ast.get_docstring(node) or "")
        return [text for text in texts if text.strip()]

    @staticmethod
    def topics(tree: ast.Module) -> Iterator[str]:
        """The values of the dictionary of help topics, `topics = {...}`."""
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from ast.literal_eval(node.value).values()


class TextFiles:
    """A UTF-8 file, or all .txt and .md files below a folder in the order of their names; each is a document."""

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            self.files = sorted(file for file in path.rglob("*")
                                if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
            if not self.files:
                raise ValueError(f"data.path={path} holds no .txt or .md file: "
                                 f"put some there, or name a single file of any ending.")
        else:
            self.files = [path]

    def fingerprint(self) -> str:
        """Changes with any byte of any file."""
        digest = hashlib.sha256(b"text")
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        for path in self.files:
            content = path.read_bytes()
            try:
                text = content.decode().removeprefix("\ufeff")  # a byte order mark is no text
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}; "
                                 f"convert it (iconv -t utf-8) or leave it out.") from None
            if text.strip():
                yield text


def fetch(url: str, sha256: str) -> Path:
    """Download a file once and check what arrived; return where it lies.

    Raises ValueError, saying where to put the file by hand, if it cannot be had or is not the one meant.
    """
    path = data_root() / "downloads" / f"{sha256[:8]}-{url.rsplit('/', 1)[-1]}"
    by_hand = f"Download {url} yourself and put it at {path}, or name your copy with data.path=FILE."
    if not path.exists():
        print(f"Downloading {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"No download of {url}: {getattr(error, 'reason', error)}. {by_hand}") from None
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise ValueError(f"{url} holds another file than expected "
                             f"(sha256 {found[:12]}..., not {sha256[:12]}...). {by_hand}")
        atomic.write_bytes(path, content)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged (its sha256 is not {sha256[:12]}...): delete it to download it again.")
    return path
