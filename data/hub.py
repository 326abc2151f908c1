"""A data set of the Hugging Face Hub, or a folder laid out like one, as a source of documents.

Knows the `datasets` package, which is optional, and text; knows no tokens. `datasets` finds the files of a configuration
and a split; they are read as they arrive, and nothing of them is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

import atomic
from data.files import Document
from data.records import MISSING, BadRecord, as_text, look_up, parquet_column, skipped_records
from terminal import say

if TYPE_CHECKING:
    from datasets import DatasetBuilder

ASK_SECONDS = 10  # the longest that the Hub may take to say which commit a revision is
CARD_BYTES = 2**22  # of a card, which is far more than one has


class Version(NamedTuple):
    """One state of a data set: its commit, empty for a folder, and a hash of the content of the split's files."""

    commit: str
    files: str


class Hub:
    """A split of a data set: `name` is OWNER/NAME on the Hub, or a folder; an empty `config` or `revision` is the default.

    What the Hub said last is remembered in the folder `memory`, so that prepared tokens need no network, nor `datasets`.
    `on_bad_record` says what to do with an example whose field is not text, "stop" or "skip". Null
    is always skipped, as `datasets` gives it for a missing field. `bad_records` counts both in the
    reading that was started last.
    """

    def __init__(self, name: str, config: str, split: str, text_field: str, revision: str, memory: Path,
                 on_bad_record: str = "stop") -> None:
        self.name, self.config, self.split, self.text_field, self.revision = name, config, split, text_field, revision
        self.on_bad_record = on_bad_record
        self.bad_records = 0
        self.folder = Path(name).expanduser().resolve() if Path(name).expanduser().is_dir() else None
        words = "-".join(filter(None, (name, config, split)))
        self.memory = memory / f"{re.sub(r'[^-+.0-9A-Z_a-z]+', '--', words)}.json"
        self.done = 0.0

    def fingerprint(self) -> str:
        """Changes with the content of any file of the split, not with the rest of the data set, such as its card.

        Raises ValueError where there is no such data set, or the Hub cannot be asked and was not before.
        """
        recipe = ["hub", self.config, self.split, self.text_field, self.version.files]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Each example's text; blank ones are left out. Raises ValueError with the example that cannot be read.

        Raises ConnectionError where the network fails in between.
        """
        builder = self.builder(self.version.commit)
        is_parquet = builder.name == "parquet"
        values = self.parquet_values(builder) if is_parquet else self.streamed_values(builder)
        self.done, number, self.bad_records = 0.0, 0, 0
        try:
            for number, value in enumerate(values, 1):
                text = as_text(value, self.text_field, f"example {number:,}", [])
                if isinstance(text, BadRecord):
                    if value is not None and self.on_bad_record == "stop":
                        raise text.refusal(self.name)
                    self.bad_records += 1
                elif text and not text.isspace():
                    yield Document.of(text)
        except Exception as error:  # of whichever library reads this format, or speaks to the network
            if type(error) is ValueError:
                raise  # a sentence already
            place = f"at example {number + 1:,} ({in_one_line(error)})"
            if isinstance(error, ValueError) or self.folder:
                raise ValueError(f"{self.name} cannot be read {place}.") from None
            raise ConnectionError(f"{self.name} broke off {place}: run the same command again, which goes on where it "
                                  f"was.") from None

    def fraction(self) -> float:
        """How far the reading that was begun last has come, from 0 to 1; 0 where the data set does not say its size."""
        return self.done

    def description(self) -> str:
        return self.name + skipped_records(self.bad_records)

    # What there is to read

    @cached_property
    def version(self) -> Version:
        """The data set as it is now, or, where that cannot be known, as it was when it was last seen."""
        if self.folder:
            return self.look("")
        known = self.seen()
        last = known["commits"].get(self.revision)
        try:
            commit = self.revision if self.revision in known["files"] else self.ask()  # a commit stays what it is
            version = Version(commit, known["files"][commit]) if commit in known["files"] else self.look(commit)
        except ValueError as error:
            if not last:
                raise
            say(f"{error} {self.name} is taken as it was when it was last seen, at commit {last}.")
            return Version(last, known["files"][last])
        if last and known["files"][last] != version.files:
            say(f"{self.name} has changed on the Hugging Face Hub since it was last seen: data.hub_revision={last} stays "
                  f"with what it was.")
        if last != commit:
            known["commits"][self.revision] = commit
            known["files"][commit] = version.files
            with suppress(OSError):  # prepared tokens can lie where this user may only read
                atomic.write_bytes(self.memory, json.dumps(known, indent=2).encode())
        return version

    def seen(self) -> dict[str, dict[str, Any]]:
        """The commits of the data set that were seen, and their files. A damaged record of them is forgotten."""
        try:
            known = atomic.read_json(self.memory)
        except (OSError, ValueError):
            known = None
        whole = isinstance(known, dict) and all(isinstance(known.get(key), dict) for key in ("commits", "files"))
        if not whole or any(str(commit) not in known["files"] for commit in known["commits"].values()):
            return {"commits": {}, "files": {}}
        return known

    def ask(self) -> str:
        """The commit that the revision is now on the Hub. Raises ValueError if there is none, or no answer."""
        datasets_package()
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
        try:
            return HfApi().dataset_info(self.name, revision=self.revision or None, timeout=ASK_SECONDS, expand=["sha"]).sha
        except RevisionNotFoundError:
            raise ValueError(f"data.hub_revision={self.revision}: {self.name} has no such branch, tag or commit.") from None
        except (HFValidationError, RepositoryNotFoundError):
            raise ValueError(f"data.hub_name={self.name} is no folder here, and no data set that the Hugging Face Hub shows "
                             f"you: check the spelling, or, if it is private, log in with hf auth login.") from None
        except Exception as error:  # of whichever library speaks to the network
            raise no_answer(error) from None

    def look(self, commit: str) -> Version:
        """The data set at a commit. Raises ValueError where it cannot be opened."""
        digest = hashlib.sha256()
        for path in self.paths(self.builder(commit)):
            digest.update(self.content(path).encode())
        return Version(commit, digest.hexdigest())

    def content(self, path: str) -> str:
        """What changes with the content of a file: of one on the Hub, the name that Git has for it."""
        if self.folder:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        from huggingface_hub import HfFileSystem
        try:
            return HfFileSystem().info(path)["blob_id"]
        except Exception as error:  # of whichever library speaks to the network
            raise no_answer(error) from None

    def builder(self, commit: str) -> DatasetBuilder:
        """What `datasets` knows of the configuration at a commit. Raises ValueError saying why it knows nothing."""
        datasets = datasets_package()
        if self.folder:
            refuse_paths_outside(self.folder)
        try:
            place = str(self.folder or self.name)
            found = datasets.load_dataset_builder(place, self.config or None, revision=commit or None)
            if found.name == "cache":  # what it falls back to: another download of this user, of whatever commit
                raise ConnectionError("the Hugging Face Hub does not answer")
            return found
        except Exception as error:  # of whichever library speaks to the network
            raise ValueError(self.complaint(error)) from None

    def complaint(self, error: Exception) -> str:
        """Why `datasets` cannot open the data set, with what to do."""
        said = in_one_line(error)
        if "scripts are no longer supported" in said:
            return (f"{self.name} comes with a program that makes it, which is not run: data.hub_revision="
                    f"refs/convert/parquet names the Hub's own copy of it without one, if there is one.")
        if "gated" in said:
            return (f"{self.name} is for those who agreed to its terms: agree at https://huggingface.co/datasets/"
                    f"{self.name}, then log in with hf auth login, or set HF_TOKEN.")
        if isinstance(error, FileNotFoundError):
            return f"{self.name} holds no files that can be read as a data set: {said}."
        if names := re.search(r"[Cc]onfig.*\[(.*)\]", str(error), re.DOTALL):
            there = names[1].replace("'", "")
            return f"data.hub_config={self.config}: {self.name} has the configurations {there}; choose one of them."
        return f"{self.name} cannot be opened: {said}."

    def paths(self, builder: DatasetBuilder) -> list[str]:
        """The files of the split, or of several, as in train+test. Raises ValueError naming the splits that there are."""
        found = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
        splits = self.split.split("+")
        if not set(splits) <= set(found):
            raise ValueError(f"data.split={self.split}: {self.name} has the splits {', '.join(found)}.")
        paths = [path for split in splits for path in found[split]]
        for path in paths:
            if self.folder and not is_file_in(self.folder, path):
                raise ValueError(f"{self.name} names {path}, which is not a file inside that folder: "
                                 f"only its own files are read.")
        return paths

    # Reading it

    def parquet_values(self, builder: DatasetBuilder) -> Iterator[Any]:
        """The text of each row; of large other columns nothing is downloaded.

        `datasets` itself leaves threads behind where a reader stops early, and they can abort or hang Python at its exit
        (https://github.com/apache/arrow/issues/45214).
        """
        from datasets.utils.file_utils import xopen  # open, of what is on the Hub too; for minutes it tries again
        from pyarrow.parquet import ParquetFile
        paths = self.paths(builder)
        for index, path in enumerate(paths):
            with xopen(path, "rb") as file, ParquetFile(file) as parquet:
                for row, value in enumerate(parquet_column(parquet, self.text_field, self.name), 1):
                    self.done = (index + row / parquet.metadata.num_rows) / len(paths)
                    yield value

    def streamed_values(self, builder: DatasetBuilder) -> Iterator[Any]:
        """The text of each example of any other format."""
        self.paths(builder)  # which knows the splits
        splits, stated, number = self.split.split("+"), builder.info.splits or {}, 0
        examples = sum(stated[split].num_examples or 0 for split in splits if split in stated)
        for split in splits:
            for example in builder.as_streaming_dataset(split=split):
                value = look_up(example, self.text_field)
                if value is MISSING:
                    raise ValueError(f"{self.name} has no field {self.text_field} (its fields are "
                                     f"{', '.join(list(example)[:10])}): set data.text_field=NAME.")
                number += 1
                self.done = min(1.0, number / examples) if examples else 0.0
                yield value


def datasets_package() -> Any:
    """The package. Raises ValueError saying how to install it."""
    try:
        import datasets
    except ImportError:
        raise ValueError("data=hub needs the package datasets: pip install datasets.") from None
    return datasets


def refuse_paths_outside(folder: Path) -> None:
    """Raises ValueError if a data set's card names files outside its folder or on other machines.

    `datasets` would look for them before it says which they are.
    """
    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        if not os.path.lexists(card):
            continue
        if not is_file_in(folder, str(card)):
            raise ValueError(f"{card} is not a file inside the folder: replace it by a copy.")
        for path in named_paths(head_of(card)):
            parts = Path(path).parts
            if "://" in path or "::" in path or ".." in parts or path.startswith(("/", "~")):
                raise ValueError(f"{card} names {path}, which is not inside the folder: only its "
                                 f"own files are read.")


def head_of(card: Path) -> Any:
    """The YAML at the beginning of a README.md, or all of a .yaml file."""
    with open(card, "rb") as file:
        text = file.read(CARD_BYTES).decode("utf-8", "replace").removeprefix("\ufeff")
    if card.suffix == ".md":
        head = re.match(r"---\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
        text = head[1] if head else ""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = in_one_line(error)
        raise ValueError(f"{card} is not valid YAML at its beginning ({reason}).") from None


def named_paths(head: Any) -> Iterator[str]:
    """The paths and patterns of files that the head of a card names."""
    configs = head.get("configs") if isinstance(head, dict) else None
    waiting = []
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            waiting += [config.get("data_files"), config.get("data_dir")]
    # A YAML file can hold the same list very often, by aliases.
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value


def is_file_in(folder: Path, path: str) -> bool:
    """Whether a path is a regular file below `folder` after all symbolic links are followed.

    Or, where `folder` is a snapshot in the cache of the Hub, a file that this cache keeps for it.
    """
    place, folder = Path(path).resolve(), folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parents[1] / "blobs")
    return place.is_file() and any(place.is_relative_to(home) for home in homes)


def no_answer(error: Exception) -> ValueError:
    return ValueError(f"The Hugging Face Hub does not answer ({in_one_line(error)}): check the network.")


def in_one_line(error: Exception) -> str:
    """What an error says, without the advice that follows in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
