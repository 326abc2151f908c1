"""Find and read the tokenizer that `data.tokenizer=` names by its path: a file, a run, a folder."""

from __future__ import annotations

from pathlib import Path

from data.bpe import PUBLISHED_SIZES
from data.from_hugging_face import from_hugging_face
from data.tokenizer import ByteTokenizer, Tokenizer
from data.tokenizer_json import from_json, read_json


def find_tokenizer(path: str) -> Path:
    """The file of a tokenizer: `path` itself, a run's, or the `tokenizer.json` in a folder.

    Raises ValueError if there is none.
    """
    place = Path(path)
    if place.is_file():
        return place
    # Of a run, the tokenizer in its last checkpoint.
    saved = sorted(place.glob("checkpoints/step_*/tokenizer.json"))
    found = saved[-1] if saved else place / "tokenizer.json"
    if not found.is_file():
        raise ValueError(f"data.tokenizer={path} has no tokenizer.json: name such a file, or the "
                         f"folder of a run, of prepared tokens or of a model.")
    return found


def open_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`, in nanohydra's or in Hugging Face's format.

    Raises ValueError if there is none, and for a tokenizer with features that are not supported.
    """
    file = find_tokenizer(path)
    content = read_json(file)
    if isinstance(content, dict) and "kind" in content:
        return from_json(content, str(file))
    return from_hugging_face(content, str(file))


def planned_size(name: str, vocab_size: int) -> int | None:
    """The number of tokens of `data.tokenizer=NAME`; None where the text decides it."""
    sizes = {**PUBLISHED_SIZES, "byte": ByteTokenizer.vocab_size, "bpe": vocab_size, "char": None}
    return sizes[name] if name in sizes else open_tokenizer(name).vocab_size
