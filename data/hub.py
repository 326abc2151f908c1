"""A dataset of the Hugging Face Hub, or a folder with the same layout, as a source of documents.

Knows text and the optional package `datasets`; knows no tokens. `datasets` finds the files of a
configuration and a split. They are read by range requests, and nothing of them is stored.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import atomic
from data import parquet, records
from data.config import DataConfig
from data.dataset_card import is_file_in, refuse_paths_outside
from data.document import Document
from data.store import data_root, sha256_of
from optional import import_optional
from terminal import first_line, say

TIMEOUT_SECONDS = 10  # for the commit of a revision


class Hub:
    """A split of a dataset, OWNER/NAME on the Hub or a folder.

    The last answers of the Hub are stored, so that prepared tokens need neither network nor
    `datasets`. Null is always skipped, as `datasets` returns it for a missing field.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config, self.name = config, config.hub_name
        self.bad_records = 0  # in the latest reading
        self.done = 0.0
        folder = Path(self.name)
        self.folder = folder.resolve() if folder.is_dir() else None
        names = filter(None, (self.name, config.hub_config, config.split))
        file_name = re.sub(r"[^-+.0-9A-Z_a-z]+", "--", "-".join(names))
        self.memory = data_root() / "hub" / f"{file_name}.json"

    def fingerprint(self) -> str:
        """Changes with the content of any file of the split, and not with the dataset card.

        Raises ValueError if the dataset does not exist, or the Hub does not answer and never did.
        """
        config = self.config
        recipe = ["hub", config.hub_config, config.split, config.text_field, self.version[1]]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """The text of each example that is not blank.

        Raises ValueError with the number of an example that cannot be read, and ConnectionError if
        the connection breaks.
        """
        builder = self.builder(self.version[0])
        # Parquet is read here, other formats by `datasets`.
        read = self.parquet_values if builder.name == "parquet" else self.streamed_values
        self.done, self.bad_records, number = 0.0, 0, 0
        try:
            for number, value in enumerate(read(builder), 1):
                text = records.as_text(value, self.config.text_field, f"example {number:,}")
                if isinstance(text, records.BadRecord):
                    if value is not None and self.config.on_bad_record == "stop":
                        raise text.refusal(self.name)
                    self.bad_records += 1
                elif text and not text.isspace():
                    yield Document.of(text)
        except Exception as error:
            # Any exception of the libraries that read this format, or of the network.
            if type(error) is ValueError:
                raise
            place = f"at example {number + 1:,} ({first_line(error)})"
            if isinstance(error, ValueError) or self.folder:
                raise ValueError(f"{self.name} cannot be read {place}.") from None
            raise ConnectionError(f"The connection to {self.name} broke {place}: the same command "
                                  f"resumes.") from None

    def fraction(self) -> float:
        return self.done

    def description(self) -> str:
        return self.name + records.skipped_records(self.bad_records)

    # Find the files

    @cached_property
    def version(self) -> tuple[str, str]:
        """The commit, empty for a folder, and a hash of the split's files.

        If the Hub does not answer, those that were last seen.
        """
        # A folder has no commit.
        if self.folder:
            return "", self.files_hash("")
        # What the Hub answered the last time.
        revision = self.config.hub_revision
        known = self.remembered()
        last = known["commits"].get(revision)
        try:
            # The content of a commit never changes.
            commit = revision if revision in known["files"] else self.latest_commit()
            files = known["files"].get(commit) or self.files_hash(commit)
        except ValueError as error:
            if not last:
                raise
            say(f"{error} Using {self.name} as it was last seen, at commit {last}.")
            return last, known["files"][last]

        # Say if the dataset has changed, and remember the answer.
        if last and known["files"][last] != files:
            say(f"{self.name} has changed on the Hugging Face Hub since it was last seen: use "
                f"data.hub_revision={last} for the old version.")
        if last != commit:
            known["commits"][revision] = commit
            known["files"][commit] = files
            # The folder of prepared tokens may be read-only.
            with suppress(OSError):
                atomic.write_json(self.memory, known, indent=2)
        return commit, files

    def remembered(self) -> dict[str, dict[str, Any]]:
        """The commits of revisions and the file hashes of commits that were seen before."""
        with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            known = atomic.read_json(self.memory)
            if known["files"].keys() >= set(known["commits"].values()):
                return known
        # There are none, or the file is damaged.
        return {"commits": {}, "files": {}}

    def latest_commit(self) -> str:
        """The revision's commit on the Hub. Raises ValueError if there is none, or no answer."""
        import_datasets()
        from huggingface_hub import HfApi, errors

        # Ask for nothing but the commit.
        revision = self.config.hub_revision
        try:
            info = HfApi().dataset_info(
                self.name, revision=revision or None, timeout=TIMEOUT_SECONDS, expand=["sha"])
        except errors.RevisionNotFoundError:
            raise ValueError(
                f"data.hub_revision={revision}: {self.name} has no such branch, tag or commit."
            ) from None
        except (errors.HFValidationError, errors.RepositoryNotFoundError):
            raise ValueError(f"data.hub_name={self.name} is neither a folder nor a dataset on the "
                             f"Hugging Face Hub that you can access: check the spelling, or, if it "
                             f"is private, log in with hf auth login.") from None
        except Exception as error:
            # Each library below has its own exceptions.
            raise no_answer(error) from None
        return info.sha

    def files_hash(self, commit: str) -> str:
        """A hash of the split's files at a commit. Raises ValueError if it cannot be opened."""
        paths = self.paths(self.builder(commit))
        if self.folder:
            hashes = sha256_of([Path(path) for path in paths])
        else:
            from huggingface_hub import HfFileSystem

            try:
                # The Git blob ids of files change with their content.
                hashes = [HfFileSystem().info(path)["blob_id"] for path in paths]
            except Exception as error:
                raise no_answer(error) from None
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def builder(self, commit: str) -> Any:
        """The DatasetBuilder of `datasets` for the configuration at a commit.

        Raises ValueError if there is none.
        """
        datasets = import_datasets()
        # `datasets` opens the files that the card names, before `paths` can check them.
        if self.folder:
            refuse_paths_outside(self.folder)
        try:
            builder = datasets.load_dataset_builder(
                str(self.folder or self.name), self.config.hub_config or None,
                revision=commit or None)
        except Exception as error:
            raise ValueError(self.open_error(error)) from None
        if builder.name == "cache":
            # Without an answer, `datasets` falls back to an earlier download of any commit.
            raise ValueError(f"{self.name} cannot be opened: the Hugging Face Hub does not answer.")
        return builder

    def open_error(self, error: Exception) -> str:
        """Why `datasets` cannot open the dataset, and what to do."""
        # The library tells these cases apart by the text of its messages only.
        reason = first_line(error)
        # A script, a license to accept, no data.
        if "scripts are no longer supported" in reason:
            return (f"{self.name} is loaded by a script, which is not run: use the Hub's copy "
                    f"without one, data.hub_revision=refs/convert/parquet, if it exists.")
        if "gated" in reason:
            return (f"{self.name} is gated: accept its terms at https://huggingface.co/datasets/"
                    f"{self.name}, then log in with hf auth login, or set HF_TOKEN.")
        if isinstance(error, FileNotFoundError):
            return f"{self.name} holds no files that can be read as a dataset: {reason}."
        # No configuration of that name.
        configs = re.search(r"[Cc]onfig.*\[(.*)\]", str(error), re.DOTALL)
        if configs:
            names = configs[1].replace("'", "")
            return (f"data.hub_config={self.config.hub_config}: {self.name} has the configurations "
                    f"{names}; choose one of them.")
        return f"{self.name} cannot be opened: {reason}."

    def paths(self, builder: Any) -> list[str]:
        """The files of the split, or of several (train+test).

        Raises ValueError if there is no such split.
        """
        files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
        splits = self.config.split.split("+")
        if not set(splits) <= set(files):
            raise ValueError(
                f"data.split={self.config.split}: {self.name} has the splits {', '.join(files)}.")
        # A folder from a stranger can name files anywhere.
        paths = list(chain.from_iterable(files[split] for split in splits))
        for path in paths:
            if self.folder and not is_file_in(self.folder, path):
                raise ValueError(f"{self.name} names {path}, which is not a file inside that "
                                 f"folder: only its own files are read.")
        return paths

    # Read the files

    def parquet_values(self, builder: Any) -> Iterator[Any]:
        """The text of each row. Large other columns are not downloaded.

        The reader of `datasets` leaves threads running if it is stopped early, which can abort or
        hang Python at exit (https://github.com/apache/arrow/issues/45214).
        """
        # It opens local and remote files, and retries for minutes.
        from datasets.utils.file_utils import xopen

        paths = self.paths(builder)
        for index, path in enumerate(paths):
            with xopen(path, "rb") as file, parquet.open_parquet(file) as opened:
                values = parquet.parquet_column(opened, self.config.text_field, self.name)
                for row, value in enumerate(values, 1):
                    self.done = (index + row / opened.metadata.num_rows) / len(paths)
                    yield value

    def streamed_values(self, builder: Any) -> Iterator[Any]:
        """The text of each example in any other format."""
        # Checks the splits.
        self.paths(builder)
        splits, infos = self.config.split.split("+"), builder.info.splits or {}
        total = sum(infos[split].num_examples or 0 for split in splits if split in infos)
        examples = chain.from_iterable(map(builder.as_streaming_dataset, splits))
        for number, example in enumerate(examples, 1):
            value = records.look_up(example, self.config.text_field)
            if value is records.MISSING:
                raise records.no_field(self.name, self.config.text_field, list(example))
            if total:
                self.done = min(1.0, number / total)
            yield value


def import_datasets() -> Any:
    return import_optional("datasets", "data=hub needs the package datasets", "datasets")


def no_answer(error: Exception) -> ValueError:
    return ValueError(
        f"The Hugging Face Hub does not answer ({first_line(error)}): check the network.")
