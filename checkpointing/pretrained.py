"""Find and read weights that other programs wrote: folders of Hugging Face, nanoGPT's checkpoints.

Files may come from a stranger: weight_files.py reads them. model/pretrained.py knows the names of
the tensors, and model/formats.py the supported configurations.
"""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from checkpointing.weight_files import read_json, read_pickled, read_safetensors
from checkpointing.weights import Weights
from conf.convert import rebuild
from data.bpe import BPETokenizer
from data.hugging_face import byte_letters
from data.tokenizer import Tokenizer
from data.tokenizer_json import open_tokenizer
from hardware import check_free
from model.config import GPTConfig
from model.formats import CLASSES, config_from, shown
from model.layouts import table
from model.pretrained import weights_from
from optional import import_optional
from terminal import counted

CONFIG, TENSORS = "config.json", "model.safetensors"
PICKLED = "pytorch_model.bin"  # before safetensors
# The file of each tensor, if a large model is in several files.
INDEX_SUFFIX = ".index.json"
NANOGPT = "ckpt.pt"
# Files that list the tokens of a folder.
VOCABULARY, TOKENIZER = "vocab.json", "tokenizer.json"

# The published sizes of GPT-2, and their owner on the Hub.
PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"
GPT2_TOKENS = 50257
# nanoGPT rounds the vocabulary of GPT-2 up to a multiple of 64.
PADDED_TOKENS = 50304


def find_published(name: str) -> Path:
    """The folder of a published model: ./NAME, or in the cache of the Hugging Face Hub.

    It is downloaded if necessary. Raises ValueError, saying which files are needed, if that fails.
    """
    if (Path(name) / CONFIG).exists():
        return Path(name)
    by_hand = (f"put {CONFIG} and {TENSORS} from https://huggingface.co/{OWNER}/{name} into a "
               "folder, and pass init_from=FOLDER")
    hub = import_optional("huggingface_hub", f"init_from={name} needs the package huggingface_hub",
                          f"huggingface_hub; or {by_hand}")

    def fetch(repository: str, is_cached: bool) -> Path:
        files = [hub.hf_hub_download(repository, file, local_files_only=is_cached)
                 for file in (CONFIG, TENSORS)]
        return Path(files[0]).parent

    # The library and its HTTP client have many kinds of errors. The cache has the model under its
    # present name, or under its name before the Hub had owners.
    for repository in (f"{OWNER}/{name}", name):
        with suppress(Exception):
            return fetch(repository, is_cached=True)
    try:
        # Without a network, this fails at once. The library tries again for half a minute.
        if not getproxies():
            host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
            socket.getaddrinfo(urlsplit(host).hostname, None)
        return fetch(f"{OWNER}/{name}", is_cached=False)
    except Exception as error:
        raise ValueError(f"init_from={name} is not in the cache of the Hugging Face Hub, and could "
                         f"not be downloaded ({type(error).__name__}): {by_hand}.") from None


def read_folder(folder: Path) -> Weights:
    """The weights in a folder of Hugging Face.

    Raises ValueError, in one sentence, if they are not supported.
    """
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
        content = read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)
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
    tokenizer = BPETokenizer.published("gpt2") if config.vocab_size == GPT2_TOKENS else None
    return Weights(path, config, state, tokenizer, note)


def make_config(layout: str, published: dict[str, Any], place: Path | str) -> GPTConfig:
    """The shape in a file. Raises ValueError if it is not supported."""
    return rebuild(GPTConfig, config_from(layout, published, str(place)), str(place))


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


def weight_files(folder: Path) -> list[Path]:
    """The files with the tensors of a folder of Hugging Face: safetensors, or else pickles."""
    for whole in (folder / TENSORS, folder / PICKLED):
        index = whole.with_name(f"{whole.name}{INDEX_SUFFIX}")
        if whole.exists():
            return [whole]
        if index.exists():
            return indexed_files(index, whole.suffix)
    raise ValueError(f"{folder} has no {TENSORS}: it is needed beside {CONFIG}.")


def indexed_files(index: Path, suffix: str) -> list[Path]:
    """The files that an index names. Raises ValueError for a name of any other kind of file."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index} has no weight_map: download it again.")
    names = sorted(set(map(str, files.values())))
    for name in names:
        is_name = Path(name).name == name and "\0" not in name
        if not is_name or not name.endswith(suffix):
            raise ValueError(f"{index} names {shown(name)}, which is not a {suffix} file of its "
                             "folder: download it again.")
    return [index.with_name(name) for name in names]


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
