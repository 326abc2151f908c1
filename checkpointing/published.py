"""Find the published sizes of GPT-2: in a folder, or by the cache of the Hugging Face Hub."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from checkpointing.pretrained import CONFIG, TENSORS

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# Their owner on the Hub.
OWNER = "openai-community"


def find_published(name: str) -> Path:
    """The folder of a published model: ./NAME, or in the cache of the Hugging Face Hub.

    It is downloaded if necessary. Raises ValueError, saying which files are needed, if that fails.
    """
    if (Path(name) / CONFIG).exists():
        return Path(name)
    by_hand = (f"put {CONFIG} and {TENSORS} from https://huggingface.co/{OWNER}/{name} into a "
               "folder, and pass init_from=FOLDER")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(f"init_from={name} needs the package huggingface_hub: pip install "
                         f"huggingface_hub; or {by_hand}.") from None

    def fetch(repository: str, is_cached: bool) -> Path:
        files = [hf_hub_download(repository, file, local_files_only=is_cached)
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
