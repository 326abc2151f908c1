"""The checkpoint format: a folder of safetensors and JSON files.

    RUN/checkpoints/step_00000300/
        model.safetensors      the weights
        optimizer.safetensors  the state of the optimizers
        state.json             counters, settings, shape of the model, environment
        tokenizer.json         the tokenizer
        manifest.json          size and SHA-256 of each file above, and of itself

Of a large model that several processes train, each process writes a part of the tensors.
snapshot.py writes this format, and checkpoint.py reads it.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.sharding import Divided

FORMAT = 3
# As format 3, but several processes have each written a part of the tensors:
# model-00001-of-00004.safetensors and so on, as Hugging Face names the parts of large models.
FORMAT_IN_PARTS = 4
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, TOKENIZER, MANIFEST = "state.json", "tokenizer.json", "manifest.json"
FILES = (MODEL, OPTIMIZER, STATE, TOKENIZER)

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.float64: "F64", torch.int64: "I64"}
# 35 years of one-millisecond steps. Times the sequences of a step, it still fits 63 bits.
MAX_COUNT = 2**40
COUNT = (int, 0, MAX_COUNT)
LOSS = (float | None, 0, sys.float_info.max)
# The fields of state.json: type, and the lowest and highest value of a number.
STATE_FIELDS: dict[str, tuple[Any, ...]] = {
    "step": COUNT, "max_steps": (int, 1, 2**63 - 1), "replanned": (bool,),
    "seconds": (float, 0, MAX_COUNT), "batches_skipped": COUNT, "nonfinite": COUNT,
    "scheduled": (bool,), "val_loss": LOSS, "best_val_loss": LOSS, "stale_evaluations": COUNT,
    "settings": (dict,), "model": (dict,), "environment": (dict,), "scaler": (dict,),
}

Tensors = dict[str, Tensor | Divided]
FileEntry = dict[str, int | str]  # "bytes" and "sha256"


def part_names(name: str, count: int) -> list[str]:
    """The names of the files that `count` processes write instead of the file `name`."""
    stem, suffix = name.split(".")
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]


def parts_of(name: str, files: Iterable[str]) -> list[str]:
    """The names in `files` that begin as those of the parts of `name` do, in order."""
    stem, _ = name.split(".")
    return sorted(file for file in files if file.startswith(f"{stem}-"))


def is_complete(files: Iterable[str]) -> bool:
    """Whether these are the names of the files of a checkpoint, and all of them."""
    found = set(files)
    expected = set()
    for name in FILES:
        parts = parts_of(name, found)
        if name in (MODEL, OPTIMIZER) and parts:
            expected |= set(part_names(name, len(parts)))
        else:
            expected.add(name)
    return found == expected


def step_name(step: int) -> str:
    """The folder name of a checkpoint."""
    return f"step_{step:08d}"


def find_problem(state: dict[str, Any]) -> str:
    """What is wrong with the content of state.json; empty if it is valid."""
    if state.keys() != STATE_FIELDS.keys():
        return f"must have exactly the fields {', '.join(STATE_FIELDS)}"
    for key, (kind, *bounds) in STATE_FIELDS.items():
        value = state[key]
        # To Python, True is an int.
        valid = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if valid and bounds and value is not None:
            valid = bounds[0] <= value <= bounds[1]
        if not valid:
            return f"has {key}={ascii(value)[:40]}, which is invalid"
    return ""


def checksum(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest, which it contains itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
