"""Read weights that other programs wrote: folders of Hugging Face, and checkpoints of nanoGPT.

Files may come from a stranger. Nothing in them is run: a pickle is only opened with
`weights_only=True`, which loads tensors and plain values. model/pretrained.py knows the names of
the tensors, and model/formats.py the supported configurations.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import atomic
from checkpointing.weights import Weights
from conf.convert import rebuild
from data.hugging_face import byte_letters
from data.tokenizer import BPETokenizer, Tokenizer
from data.tokenizer_file import open_tokenizer
from model.config import GPTConfig
from model.formats import CLASSES, config_from, shown
from model.pretrained import table, weights_from
from terminal import counted, first_line
from training.memory import check_free

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"  # of these on the Hugging Face Hub
CONFIG, TENSORS = "config.json", "model.safetensors"
INDEX, PICKLED = "model.safetensors.index.json", "pytorch_model.bin"
NANOGPT = "ckpt.pt"
# Files that list the tokens of a folder.
VOCABULARY, TOKENIZER = "vocab.json", "tokenizer.json"

GPT2_TOKENS = 50257
# nanoGPT rounds the vocabulary of GPT-2 up to a multiple of 64.
PADDED_TOKENS = 50304
# Parameters of a model that is compared with transformers: loading it takes seconds.
MOST_COMPARED = 2**28
# The largest header of a safetensors file: that of GPT-2 XL has 0.1 MB.
MAX_HEADER_BYTES = 2**24


def is_folder_of_weights(folder: Path) -> bool:
    """Whether a folder is laid out as those of Hugging Face, or as an output folder of nanoGPT."""
    return (folder / CONFIG).exists() or (folder / NANOGPT).exists()


def read_folder(folder: Path) -> Weights:
    """The weights in a folder. Raises ValueError, in one sentence, if they are not supported."""
    if not (folder / CONFIG).exists():
        return read_nanogpt(folder / NANOGPT)
    # The shape, by the configuration of a supported class.
    published = read_json(folder / CONFIG)
    layout = published.get("model_type")
    if layout not in tuple(CLASSES):
        raise ValueError(f"{folder / CONFIG} has model_type={shown(layout)}, which is not "
                         f"supported: supported are {', '.join(CLASSES)}.")
    config = make_config(layout, published, folder / CONFIG)

    # The tensors. Large models are in several files.
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        content = read_pickled(path) if path.name == PICKLED else read_safetensors(path)
        for name, tensor in content.items():
            if name in tensors:
                raise ValueError(f"{path} has {shown(name)}, which another file of {folder} has, "
                                 "too: download the folder again.")
            tensors[name] = tensor
    state = restore(layout, config, tensors, folder)
    return Weights(folder, config, state, tokenizer_in(folder, config.vocab_size))


def read_nanogpt(path: Path) -> Weights:
    """The weights in a checkpoint of nanoGPT, without rows that only pad the vocabulary."""
    content = read_pickled(path)
    arguments, tensors = content.get("model_args"), content.get("model")
    if not isinstance(arguments, dict) or not isinstance(tensors, dict):
        raise ValueError(f"{path} is not a checkpoint of nanoGPT: it has no model and model_args.")

    # A pickle can have nested lists that are too long to print.
    arguments = {name: value for name, value in arguments.items() if isinstance(value, int | str)}
    config = make_config("nanogpt", arguments, f"{path}, model_args")
    state = restore("nanogpt", config, tensors, path)

    # Leave out the padding of the vocabulary, which is never predicted.
    note = ""
    if config.vocab_size == PADDED_TOKENS:
        padding = counted(PADDED_TOKENS - GPT2_TOKENS, "row")
        note = f" ({padding} that only pad the vocabulary left out)"
        config = replace(config, vocab_size=GPT2_TOKENS)
        state["wte.weight"] = state["wte.weight"][:GPT2_TOKENS]
    tokenizer = None
    if config.vocab_size == GPT2_TOKENS:
        tokenizer = BPETokenizer.published("gpt2")
    return Weights(path, config, state, tokenizer, note)


def make_config(layout: str, published: dict[str, Any], place: Path | str) -> GPTConfig:
    """The shape in a file. Raises ValueError if it is not supported."""
    values = config_from(layout, published, str(place))
    return rebuild(GPTConfig, values, str(place))


def restore(layout: str, config: GPTConfig, tensors: Mapping[str, Tensor],
            place: Path) -> dict[str, Tensor]:
    """The tensors under our names, in fp32. Raises ValueError naming the `place` they are from."""
    nbytes = 4 * sum(torch.Size(entry.shape).numel() for entry in table(layout, config))
    check_free(nbytes, place)
    # A pickle can hold anything that is plain data, and tensors of any kind.
    for name, tensor in tensors.items():
        is_plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided
        if not isinstance(name, str) or not is_plain or tensor.device.type != "cpu":
            name = shown(name) if isinstance(name, str) else "a tensor without a name"
            raise ValueError(f"{place} has {name}, which is no plain tensor.")
    try:
        return weights_from(layout, config, tensors)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


# Files


def weight_files(folder: Path) -> list[Path]:
    """The files with the tensors of a folder of Hugging Face."""
    # A small model is in one file.
    if (folder / TENSORS).exists():
        return [folder / TENSORS]
    # The index of a large one names the file of each tensor.
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{folder / INDEX} has no weight_map: download it again.")
        files = set(map(str, names.values()))
        for name in sorted(files):
            is_name = Path(name).name == name and "\0" not in name
            if not is_name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names {shown(name)}, which is not a "
                                 "safetensors file of its folder.")
        return [folder / name for name in sorted(files)]
    # Before safetensors, models were pickled.
    if (folder / PICKLED).exists():
        return [folder / PICKLED]
    raise ValueError(f"{folder} has no {TENSORS}: it is needed beside {CONFIG}.")


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """The regular file that `path` is, or links to. Errors become one sentence about the file."""
    try:
        # The cache of the Hugging Face Hub consists of links.
        found = Path(os.path.realpath(path))
        if not found.exists():
            raise FileNotFoundError(errno.ENOENT, "it does not exist")
        if not found.is_file():
            raise ValueError(f"{path} is not a regular file.")
        yield found
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise ValueError(f"{path} cannot be read: {reason}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    with reading(path) as found:
        try:
            value = atomic.read_json(found)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object: download it again.")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as views of the mapped file."""
    damaged = f"{path} is not a complete safetensors file: download it again"
    with reading(path) as found:
        # The file begins with the length of its header, which the library would allocate.
        with found.open("rb") as file:
            head = file.read(8)
        if len(head) < 8 or struct.unpack("<Q", head)[0] > MAX_HEADER_BYTES:
            raise ValueError(f"{damaged}.")
        try:
            with safe_open(found, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, RuntimeError) as error:
            reason = first_line(error)
            raise ValueError(f"{damaged} ({reason}).") from None


def read_pickled(path: Path) -> dict[Any, Any]:
    """The tensors and plain values that `torch.save` wrote."""
    with reading(path) as found, warnings.catch_warnings(action="ignore"):
        try:
            is_zip = zipfile.is_zipfile(found)
            if is_zip:
                refuse_compressed(found)
            content = torch.load(found, map_location="cpu", weights_only=True, mmap=is_zip)
        except OSError:
            raise
        except Exception as error:
            # The content decides which error this is.
            if type(error).__name__ == "UnpicklingError":
                raise ValueError(f"{path} holds more than tensors and plain values, which could "
                                 "run code when it is loaded: use a safetensors file.") from None
            raise ValueError(f"{path} is not a complete file of torch.save: copy or download it "
                             "again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no tensors by name.")
    return content


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip with compressed entries: unpacked, they could fill the memory."""
    with zipfile.ZipFile(path) as entries:
        for entry in entries.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("torch.save compresses nothing")


# Tokenizers


def tokenizer_in(folder: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a folder, or GPT-2's; None if the folder has none and another vocabulary.

    Raises ValueError if it is not supported or does not fit the weights.
    """
    # The tokens and ids that the folder lists, in one of two formats.
    content = {}
    if (folder / TOKENIZER).exists():
        model = read_json(folder / TOKENIZER).get("model")
        content = model.get("vocab") if isinstance(model, dict) else None
    elif (folder / VOCABULARY).exists():
        content = read_json(folder / VOCABULARY)

    # GPT-2's tokens need no file, since tiktoken has them.
    if vocab_size == GPT2_TOKENS:
        tokenizer = BPETokenizer.published("gpt2")
        if not content or content == gpt2_vocabulary(tokenizer):
            return tokenizer
        if not (folder / TOKENIZER).exists():
            raise ValueError(f"{folder / VOCABULARY} does not have the tokens of GPT-2, and there "
                             f"is no {TOKENIZER}: remove it if it does not belong to the weights.")

    if not (folder / TOKENIZER).exists():
        return None
    tokenizer = open_tokenizer(str(folder))
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"{folder / TOKENIZER} has {tokenizer.vocab_size:,} tokens, the weights "
                         f"beside it have {vocab_size:,}: restore the file that belongs to them.")
    return tokenizer


def gpt2_vocabulary(tokenizer: BPETokenizer) -> dict[str, int]:
    """The ids of the tokens as Hugging Face's files have them."""
    letters = byte_letters()
    vocabulary = dict(tokenizer.special)
    for token, rank in tokenizer.merged.items():
        vocabulary["".join(letters[byte] for byte in token)] = rank
    return vocabulary


# Programs of others


def is_comparable(weights: Weights) -> bool:
    """Whether transformers is installed, and loads the folder of these weights within seconds."""
    folder = weights.place
    has_tensors = (folder / TENSORS).exists() or (folder / INDEX).exists()
    is_small = sum(tensor.numel() for tensor in weights.tensors.values()) <= MOST_COMPARED
    # The classes of transformers have no n-gram embeddings.
    has_class = (folder / CONFIG).exists() and weights.config.ngrams == 1
    is_installed = importlib.util.find_spec("transformers") is not None
    return has_class and has_tensors and is_small and is_installed


def logits_of_transformers(weights: Weights, ids: Tensor) -> Tensor | None:
    """The logits `[1, T, V]` of the package transformers for comparable weights.

    None if its version does not have their class.
    """
    import transformers

    folder = weights.place
    name = CLASSES[read_json(folder / CONFIG)["model_type"]]
    if not hasattr(transformers, name):
        return None
    model = getattr(transformers, name).from_pretrained(folder, local_files_only=True,
                                                        use_safetensors=True)
    return model.float().eval()(ids).logits


def find_published(name: str) -> Path:
    """The folder of a published model: ./NAME, or in the cache of the Hugging Face Hub.

    It is downloaded if necessary. Raises ValueError, saying which files are needed, if that fails.
    """
    if (Path(name) / CONFIG).exists():
        return Path(name)
    files = (f"put {CONFIG} and {TENSORS} from https://huggingface.co/{OWNER}/{name} into a "
             "folder, and pass init_from=FOLDER")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"init_from={name} needs the package huggingface_hub: pip install "
                         f"huggingface_hub; or {files}.") from None
    # The cache has the model under its present name, or under its name before the Hub had owners.
    places = [(f"{OWNER}/{name}", True), (name, True), (f"{OWNER}/{name}", False)]
    for repository, is_cached in places:
        try:
            if not is_cached and not getproxies():
                # Without a network, this fails at once. The library tries again for half a minute.
                host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
                socket.getaddrinfo(urlsplit(host).hostname, None)
            config, _ = [hf_hub_download(repository, file, local_files_only=is_cached)
                         for file in (CONFIG, TENSORS)]
            return Path(config).parent
        except Exception as error:
            # The library and its HTTP client have many kinds of errors.
            if not is_cached:
                raise ValueError(f"init_from={name} is not in the cache of the Hugging Face Hub, "
                                 f"and could not be downloaded ({type(error).__name__}): {files}."
                                 ) from None
    raise AssertionError
