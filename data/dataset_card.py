"""The files that a dataset card names, and whether they are inside the dataset's folder.

A folder laid out like a dataset of the Hugging Face Hub may come from a stranger, and must not make
a program open other files.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from terminal import first_line

CARD_BYTES = 2**22  # read of a dataset card


def refuse_paths_outside(folder: Path) -> None:
    """Raises ValueError if a dataset card names files outside its folder or on other machines."""
    for card in (folder / "README.md", folder / ".huggingface.yaml"):
        if not os.path.lexists(card):
            continue
        if not is_file_in(folder, str(card)):
            raise ValueError(f"{card} is not a file inside the folder: replace it by a copy.")
        for path in data_files(read_card(card)):
            is_url = "://" in path or "::" in path
            if is_url or ".." in Path(path).parts or path.startswith(("/", "~")):
                raise ValueError(f"{card} names {path}, which is not inside the folder: only its "
                                 f"own files are read.")


def read_card(card: Path) -> Any:
    """The YAML header of a README.md, or all of a .yaml file."""
    with open(card, "rb") as file:
        text = file.read(CARD_BYTES).decode("utf-8-sig", "replace")
    if card.suffix == ".md":
        header = re.match(r"---\r?\n(.*?)^---", text, re.DOTALL | re.MULTILINE)
        text = header[1] if header else ""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"The YAML header of {card} is invalid ({first_line(error)}).") from None


def data_files(card: Any) -> Iterator[str]:
    """The paths and patterns of files in the configurations of a dataset card."""
    # Configurations can hold names in lists and dictionaries of any depth.
    waiting: list[Any] = []
    match card:
        case {"configs": list(configs)}:
            for config in configs:
                if isinstance(config, dict):
                    waiting += [config.get("data_files"), config.get("data_dir")]
    # YAML aliases can repeat the same list exponentially often.
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


def is_file_in(folder: Path, path: str) -> bool:
    """Whether a path is a regular file below `folder` after all symbolic links are followed.

    If `folder` is a snapshot in the Hub's cache, its files may be in that cache's `blobs`.
    """
    file, folder = Path(path).resolve(), folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parents[1] / "blobs")
    return file.is_file() and any(file.is_relative_to(parent) for parent in allowed)
