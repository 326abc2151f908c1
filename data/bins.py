"""Use the token files of other programs: nanoGPT's plain integers, llm.c's and NumPy's files.

The files stay where they are and are read through memory maps, like our own shards.
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

import atomic
from data.bin_format import describe_bin
from data.config import TOKENIZERS
from data.files import File, matches, unreadable
from data.shards import SPLITS, Tokens, check, map_shard, read_meta, write_meta
from data.store import folder_for, make_once, sha256_of
from data.tokenizer import CharTokenizer, Tokenizer, bytes_of_counts
from data.tokenizer_json import fingerprint, open_tokenizer, read_tokenizer
from progress import ProgressBar

ENDINGS = (".bin", ".npy")
SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation"}


def prepare_bins(path: str, tokenizer_name: str, dtype: str = "auto") -> Path:
    """Describe the tokens in `path` in a folder of prepared tokens, and return the folder.

    The folder is updated if the files have moved. `dtype` is the type of files without a header, or
    "auto". Raises ValueError for files that are not tokens of the tokenizer's vocabulary.
    """
    files = find_bins(path)
    tokenizer = tokenizer_of(files["train"][0].parent, tokenizer_name)
    if tokenizer_name not in TOKENIZERS:
        tokenizer_name = "file"

    # All files are checked before the first one is hashed, which takes longer.
    shards, dtypes = {}, {}
    for split in SPLITS:
        shards[split] = [describe_bin(file, tokenizer.vocab_size, dtype) for file in files[split]]
        dtypes[split] = [shard["dtype"] for shard in shards[split] if not shard["offset"]]
    digests = {split: sha256_of(files[split]) for split in SPLITS}

    # The types of files without a header are in the recipe if they are not the usual ones.
    recipe = {"source": digests, "tokenizer": tokenizer_name,
              "tokenizer_fingerprint": fingerprint(tokenizer)}
    if {*dtypes["train"], *dtypes["val"]} - {"uint16"}:
        recipe["dtypes"] = dtypes
    folder = folder_for(f"bin-{tokenizer_name}", recipe)

    # No tokens are written, only a description of those in the files.
    def describe(folder: Path) -> None:
        splits, part = {}, {"source": "bin"}
        for split in SPLITS:
            splits[split] = count_tokens(shards[split], tokenizer)
            part[split] = splits[split] | {"shards": shards[split]}
        atomic.write_json(folder / "tokenizer.json", tokenizer.to_json())
        write_meta(folder, recipe, fingerprint(tokenizer), tokenizer.vocab_size,
                   {"splits": splits, "parts": [part]})

    for split in SPLITS:
        for shard, sha256 in zip(shards[split], digests[split], strict=True):
            shard["sha256"] = sha256
    # If the files have moved, only their paths change.
    make_once(folder, describe)
    [part] = read_meta(folder)["parts"]
    if any(part[split]["shards"] != shards[split] for split in SPLITS):
        describe(folder)
    check(folder, recipe)
    return folder


def tokenizer_of(folder: Path, name: str) -> Tokenizer:
    """The tokenizer that made the tokens in `folder`; ValueError if it needs a missing file."""
    if name == "char":
        # nanoGPT saves the characters in a pickle, which is not safe to load.
        text = folder / "input.txt"
        if not text.is_file():
            raise ValueError(f"{text} is missing: character tokens need their text beside them.")
        characters = set(chain.from_iterable(File(text).text_pieces()))
        return CharTokenizer("".join(sorted(characters)), with_end_of_text=False)
    if name != "bpe":
        return open_tokenizer(name)
    # A BPE of ours, saved beside its tokens.
    saved = folder / "tokenizer.json"
    if not saved.is_file():
        raise ValueError(f"{saved} is missing: name the tokenizer, as in data.tokenizer=gpt2.")
    return read_tokenizer(saved)


def find_bins(path: str) -> dict[str, list[Path]]:
    """The `.bin` or `.npy` files of each split, in a folder or of a glob, sorted by name.

    Raises ValueError for a split without files or with both endings, and for a file of both splits.
    """
    place = Path(path)
    reason = unreadable(place)
    if reason:
        raise ValueError(f"{path} {reason}.")

    # Sort the files into the splits that their names tell.
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in sorted(place.iterdir() if place.is_dir() else matches(place)):
        # macOS leaves a hidden ._train.bin beside a train.bin that it copies.
        is_other = place.is_dir() and file.suffix.lower() not in ENDINGS
        if is_other or file.name.startswith(".") or file.is_dir():
            continue
        for split, names in SPLIT_NAMES.items():
            if re.search(rf"(?<![a-z])({names})(?![a-z])", file.name.lower()):
                found[split].append(file)

    # No file may be in both splits, and no split without a file or with two copies of its tokens.
    both = set(found["train"]) & set(found["val"])
    if both:
        raise ValueError(f"{both.pop()} is named for both splits: name it for one of them.")
    missing = [split for split in SPLITS if not found[split]]
    if missing:
        raise ValueError(f"{path} has no .bin or .npy file with {' and none with '.join(missing)} "
                         f"in its name: give the folder with train.bin and val.bin, or a glob "
                         f"such as 'fineweb10B/*.bin'.")
    for split in SPLITS:
        if len({file.suffix.lower() for file in found[split]}) > 1:
            raise ValueError(f"{path} has both .bin and .npy files for {split}, which might hold "
                             f"the same tokens: name one kind, as in data.path='{path}/*.bin'.")
    return found


def check_ids(chunk: np.ndarray, start: int, vocab_size: int, shard: dict[str, Any]) -> None:
    """Raise ValueError for an id that is not below `vocab_size`; `chunk` begins at `start`."""
    for place in (int(chunk.argmax()), int(chunk.argmin())):
        if not 0 <= int(chunk[place]) < vocab_size:
            raise ValueError(f"{shard['file']} has the id {chunk[place]} (token {start + place}), "
                             f"beyond the vocabulary of {vocab_size}: set data.tokenizer= to the "
                             f"one that made it, or data.dtype= if it is not {shard['dtype']}.")


def count_tokens(shards: list[dict[str, Any]], tokenizer: Tokenizer) -> dict[str, Any]:
    """The documents, bytes and tokens in some shards; ValueError for an unknown id."""
    # Count each id.
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    total = sum(shard["tokens"] for shard in shards)
    with ProgressBar(desc="Counting tokens", total=total, unit="tokens", unit_scale=True,
                     leave=False, delay=2) as bar:
        for shard in shards:
            try:
                tokens = map_shard(Path(), shard)
            except ValueError:
                # Its message is for files in a folder of prepared tokens, and says to delete that.
                raise ValueError(f"{shard['file']} changed while it was read: run the command "
                                 "again when it is complete.") from None
            for start, chunk in Tokens([tokens]).chunks():
                check_ids(chunk, start, len(counts), shard)
                counts += np.bincount(chunk.astype(np.int64, copy=False), minlength=len(counts))
                bar.update(len(chunk))

    # Each end of text is a document, and has no bytes.
    documents = 0
    if tokenizer.end_of_text is not None:
        documents = int(counts[tokenizer.end_of_text])
        counts[tokenizer.end_of_text] = 0
    n_bytes = bytes_of_counts(counts, tokenizer)
    if not n_bytes:
        raise ValueError(f"{shards[0]['file']} has no text, only end-of-text tokens.")
    return {"documents": documents, "bytes": n_bytes, "tokens": total,
            "bytes_per_token": n_bytes / max(1, total)}
